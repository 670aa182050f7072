"""`apt chat` under its name in 1.x."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt_model.config._options import say_once
from apt_model.training._folder import refuse_weights_of_old


def chat_with_model(
    model_path: str = "apt_model",
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_length: int = 50,
    logger: Any = None,
    keep_history: bool = True,
    max_history_length: int = 6,
    show_metrics: bool = True,
    custom_prompts: dict[str, str] | None = None,
    tokenizer_type: str | None = None,
    force_cpu: bool = False,
) -> None:
    """Answer messages from standard input, line by line, until it ends or one of them is `/exit`.

    Each message is a source of its own: what was said before is not seen. Of the rest, as of `logger`, no part of a
    chat has a use any more, which an AptWarning says where it is set.

    Args:
        model_path: the folder of a run.
        temperature, top_p, max_length: of each reply; `max_length` in tokens.
        force_cpu: use no GPU.

    Raises:
        AptError: the run cannot be opened, or a setting is out of range.
    """
    from apt.cli.parser import parse_arguments
    from apt.cli.text_commands import run_chat_command

    unread = {
        "logger": logger is not None,
        "max_history_length": max_history_length != 6,
        "custom_prompts": custom_prompts is not None,
        "tokenizer_type": tokenizer_type is not None,
    }
    if any(unread.values()):
        say_once(f"chat_with_model: {', '.join(name for name in unread if unread[name])} not used: nothing reads it")
    refuse_weights_of_old(Path(model_path))
    options = ["--temperature", str(temperature), "--top-p", str(top_p), "--max-tokens", str(max_length)]
    run_chat_command(parse_arguments(["chat", model_path, *options, "--device", "cpu" if force_cpu else "auto"]))
