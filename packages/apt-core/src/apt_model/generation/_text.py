"""Text from a model of 1.x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apt_model._tokenizer import encoded
from apt_model.modeling._model import APTModel


def generate_natural_text(
    model: APTModel,
    tokenizer: Any,
    prompt: str,
    max_steps: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
) -> tuple[str, Tensor, float, float]:
    """The target that the model writes for a prompt.

    Args:
        tokenizer: the model's own: of `load_model`, of the kernel, of `tokenizers` or `transformers`.
        max_steps: tokens to write beyond as many as the prompt has, at most `config.max_seq_len` in all.
        temperature, top_p: as for `APTModel.generate`.

    Returns:
        The text, the ids int64 [1, T] with those that start and end it, the temperature, and top_p.

    Raises:
        ConfigError, DataError: as `APTModel.generate`; and DataError for characters that the tokenizer does not know.
    """
    ids = encoded(tokenizer, prompt)
    output_BT = model.generate(torch.tensor([ids]), len(ids) + max_steps, temperature, top_p)
    config = model.config
    special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    text = tokenizer.decode([token for token in output_BT[0].tolist() if token not in special])
    return text, output_BT, temperature, top_p
