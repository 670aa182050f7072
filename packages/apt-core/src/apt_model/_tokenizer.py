"""The tokenizer of 1.x, on a tokenizer of the kernel; and the other way round."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apt.core.errors import ConfigError
from apt.core.providers.tokenizer import Tokenizer
from apt.data.tokenizers import HFTokenizer


class OldTokenizer:
    """A tokenizer as code of 1.x calls it.

    One token starts a text, ends it and pads it: the kernel's end of a document.

    Args:
        tokenizer: of the kernel, with a token that ends a document.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size, self.eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self.bos_token_id = self.eos_token_id = self.pad_token_id = tokenizer.eos_id

    def __len__(self) -> int:
        return self.vocab_size

    def encode(
        self,
        text: str,
        return_tensors: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = False,
    ) -> Any:
        """The ids of a text, without special tokens: a list, or int64 [1, T] with `return_tensors="pt"`.

        Args:
            max_length: how many, with `truncation`.
            add_special_tokens: says nothing here.

        Raises:
            DataError: the text holds characters that the tokenizer does not know.
        """
        ids = list(self.tokenizer.encode(text))[: max_length if truncation else None]
        if return_tensors is None:
            return ids
        import torch

        return torch.tensor([ids], dtype=torch.int64)

    def decode(self, token_ids: Iterable[Any], skip_special_tokens: bool = False) -> str:
        """The text of ids, which may be a tensor [T]."""
        ids = [int(token) for token in token_ids]
        return self.tokenizer.decode([i for i in ids if i != self.eos_id] if skip_special_tokens else ids)

    def save(self, path: Path) -> None:
        """Write it to one file, as the kernel's tokenizers are."""
        self.tokenizer.save(path)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` into a folder, which is made if it is not there."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "tokenizer.json")


def kernel_tokenizer(tokenizer: Any) -> Tokenizer:
    """What the kernel can keep and load again: for a tokenizer of the kernel itself, and for those of the libraries
    `tokenizers` and `transformers` (the fast ones) a copy.

    Raises:
        ConfigError: it is another one, or has no token to end a text.
    """
    if isinstance(tokenizer, OldTokenizer):
        return tokenizer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    kept: Tokenizer = HFTokenizer(type(backend).from_str(backend.to_str())) if hasattr(backend, "to_str") else tokenizer
    if not all(hasattr(kept, name) for name in ("vocab_size", "eos_id", "save")):
        raise ConfigError(
            f"a run cannot keep a {type(tokenizer).__name__}",
            hint="give a fast tokenizer of transformers, a tokenizers.Tokenizer, or none: one is then learnt",
        )
    if kept.eos_id is None:
        raise ConfigError(
            f"the {type(tokenizer).__name__} has no token to end a text", hint="add <|endoftext|> or </s> to it"
        )
    return kept


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text by whichever tokenizer old code has."""
    ids = tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))
