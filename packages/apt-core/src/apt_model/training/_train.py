"""Training as 1.x called it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt.training.trainer import Trainer
from apt_model._tokenizer import OldTokenizer
from apt_model.config._options import APTConfig, say_once
from apt_model.modeling._model import APTLargeModel
from apt_model.training._run import default_config, prepare
from apt_model.training._saved import load_model


def train_model(
    epochs: int = 20,
    batch_size: int = 8,
    learning_rate: float = 3e-5,
    save_path: str | Path = "apt_model",
    logger: Any = None,
    resource_monitor: Any = None,
    multimodal_config: Any = None,
    tokenizer_type: str | None = None,
    language: str | None = None,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    *,
    config: APTConfig | None = None,
    **options: Any,
) -> tuple[APTLargeModel, OldTokenizer, APTConfig]:
    """Train a model on texts, each its own source and target, and leave a run in `save_path`.

    A tenth of the texts is held out and measured after each epoch. A run that is in `save_path` is renamed, with an
    AptWarning.

    Args:
        logger: a `logging.Logger` that hears of each record of the metrics.
        resource_monitor: its `check_resources()` is called after each step.
        tokenizer_type: `bpe`, `char`, `byte`, a name of 1.x or the path of a tokenizer.json; `bpe` if left out.
        language: kept in the config.
        texts: what to learn; the lines of the file train.txt if left out.
        tokenizer: one to use and not to learn, of the kernel, of `tokenizers` or a fast one of `transformers`.
        config: the model to train; 4 and 4 layers of width 768 if left out. Its vocabulary is the tokenizer's.
        multimodal_config, **options: passed over, with an AptWarning where they are given.

    Returns:
        The trained model in evaluation mode, its tokenizer and its config.

    Raises:
        AptError: what `apt.api.Trainer` raises, and DataError where there are no texts.
    """
    if multimodal_config is not None:
        options["multimodal_config"] = multimodal_config
    if options:
        say_once(f"train_model: {', '.join(options)} not used: nothing reads it any more")
    folder, config = Path(save_path), config or default_config()
    profile, asked = prepare(
        folder,
        texts,
        config,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        tokenizer=tokenizer,
        tokenizer_type=tokenizer_type,
    )
    trainer = Trainer(profile, overrides=asked, run_dir=folder)
    if logger is not None:
        trainer.register_hook(_Log(logger))
    if resource_monitor is not None:
        trainer.register_hook(_Watch(resource_monitor))
    trainer.train()
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), trainer.tokenizer.eos_id)
    trained = {
        **config.to_dict(),
        **ids,
        "vocab_size": trainer.model.vocab_size,
        "base_lr": learning_rate,
        "tokenizer_type": tokenizer_type,
        "language": language,
    }
    APTConfig.from_dict(trained).save_pretrained(folder)
    return load_model(folder)


class _Log:
    """Tells a logger of each record."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def on_log(self, record: Mapping[str, Any]) -> None:
        self.logger.info("%s", ", ".join(f"{name} {value}" for name, value in record.items()))


class _Watch:
    """Has a resource monitor look after each step."""

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor

    def on_step_end(self) -> None:
        self.monitor.check_resources()
