"""`apt train` and `apt eval`: the commands that make a run and measure it."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt.cli.lock_commands import lock_of, selection
from apt.cli.overrides import parse_overrides
from apt.core.errors import AptWarning, UsageError
from apt.core.profiles import resolve
from apt.core.runs import RunFolder, find_run

SHORT = {"epochs": "training.max_epochs", "batch_size": "training.batch_size"}
"""Option of `apt train` -> the key of the profile that it stands for."""

KEYS_IN_USE = {"chat": ("chat.",), "eval": ("data.answers_", "data.train_path", "data.val_path", "data.dataset")}
"""Command -> the beginnings of the keys of a run's profile that may be given to it beside those of the model."""

MAX_SHOWN = 6


def run_train_command(args: Namespace) -> int:
    """Train, or go on with a run."""
    overrides = parse_overrides(args.overrides)
    source, run = find_source(args.profile, args.resume, overrides)
    for option, key in SHORT.items():
        value = getattr(args, option)
        if value is not None and key in overrides:
            name = "--" + option.replace("_", "-")
            raise UsageError(f"apt train: {name} and --{key} are the same key", hint="give one of them")
        if value is not None:
            overrides[key] = value
    if run is not None and args.run_dir is not None:
        raise UsageError("apt train: --resume goes on in the run's own folder", hint="leave --run-dir out")
    if args.run_dir == "":
        raise UsageError("apt train: --run-dir is empty", hint="name a folder, or leave it out")
    _read_what_is_named(overrides)
    if run is not None and args.profile is not None:
        _tell_differences(args.profile, run, overrides, strict=args.strict)

    profile = resolve(source, overrides)
    several = args.nproc is not None and args.nproc > 1

    from apt.checkpoint.lock import read_lock
    from apt.training.choice import choose_plugins

    # What is wrong with the profile is said before torch is imported, which takes seconds.
    with warnings.catch_warnings():
        if several:
            warnings.simplefilter("ignore")  # the processes will say it
        plugins = choose_plugins(profile, read_lock(run.lock) if run is not None else None, **selection(args))
    if several:
        return _train_in_processes(args.nproc, args.arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch's transports remark on in each process

    from apt.training.trainer import Trainer

    trainer = Trainer(
        profile,
        plugins=plugins,
        strict=args.strict,
        run_dir=Path(args.run_dir) if args.run_dir is not None else None,
        resume=run,
        frozen=_frozen(args, run),
        quiet=args.quiet,
        options=args,
    )
    trainer.train()
    return 0


def _train_in_processes(count: int, arguments: Sequence[str]) -> int:
    """Run this very command in so many processes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("apt train: --nproc within a launcher, which has started the processes", hint="leave it out")
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--nproc":
            next(rest)
        elif not argument.startswith("--nproc="):
            kept.append(argument)

    from apt.training.launch import launch

    return launch(count, [*kept, *(["--debug"] if "--debug" in sys.argv else [])])


def run_eval_command(args: Namespace) -> int:
    """Measure a run's model on its held-out text."""
    run = find_run(args.run_name)

    from apt.evaluation.evaluate import evaluate_run

    metrics = evaluate_run(run, batches=args.batches, voter=args.voter, options=args, **of_the_run(args))
    measured = {"run": str(run.path)} | ({"state": args.state} if args.state is not None else {})
    if args.json:
        import json

        print(json.dumps({**measured, **metrics}))
        return 0
    from apt.cli.screen import columns

    rows = [*measured.items(), *((name, _readable(value)) for name, value in metrics.items())]
    print("\n".join(columns(rows, indent=0)))
    return 0


def find_source(
    profile: str | None, resume: str | None, overrides: Mapping[str, Any]
) -> tuple[str | Path, RunFolder | None]:
    """What to train: the profile, and the run to go on with, whose own resolved profile is then the one.

    Args:
        profile: the option of that name.
        resume: likewise; None: not given, "": given without a run.
        overrides: {dotted key: value} from the command line.

    Raises:
        UsageError: neither is given.
        ConfigError: there is no such profile or run.
    """
    if resume is None:
        if profile is None:
            raise UsageError("apt train: which profile?", hint="start with: apt train --profile tiny_debug")
        return profile, None
    name, output_dir = None, str(overrides.get("output_dir", "runs"))
    if profile is not None:
        config = resolve(profile, overrides).config
        name, output_dir = config.name, config.output_dir
    run = find_run(resume or None, output_dir, name)
    return run.profile, run


def _read_what_is_named(overrides: dict[str, Any]) -> None:
    """Who names a text wants it read, whatever the profile reads."""
    if "data.train_path" in overrides:
        overrides.setdefault("data.dataset", None)


def _tell_differences(profile: str, run: RunFolder, overrides: Mapping[str, Any], *, strict: bool) -> None:
    """Say in which keys the profile that was named is not the one that the run was made with.

    Raises:
        UsageError: it is another run's; or there are such keys, and nothing is to be passed over.
    """
    named_name, own_name = (resolve(source).config.name for source in (profile, run.profile))
    if named_name != own_name:
        raise UsageError(f"apt train: {run.path} is a run of {own_name}, not of {named_name}", hint="leave -p out")
    named, own = (_flat(resolve(source, overrides).config.model_dump(mode="json")) for source in (profile, run.profile))
    different = [key for key in sorted(named.keys() | own.keys()) if named.get(key) != own.get(key)]
    if not different:
        return
    shown = [f"{key} ({named.get(key)}, the run has {own.get(key)})" for key in different[:MAX_SHOWN]]
    more = f" and {len(different) - MAX_SHOWN} more" if len(different) > MAX_SHOWN else ""
    what = f"{run.path} goes on with its own profile, from which {profile} differs in {', '.join(shown)}{more}"
    if strict:
        raise UsageError(f"apt train: {what}", hint="leave -p out, and give the keys that are to change as options")
    warnings.warn(f"{what}; to change the run, give the keys as options", AptWarning, stacklevel=2)


def _frozen(args: Namespace, run: RunFolder | None) -> Path | None:
    """The lock that `--frozen` means; None without it."""
    if args.frozen is None:
        return None
    path = Path(args.frozen) if args.frozen else run.lock if run is not None else lock_of(args.profile)
    path = RunFolder(path).lock if path.is_dir() else path
    if not path.is_file():
        wanted = args.profile or "PROFILE"
        raise UsageError(f"apt train --frozen: there is no lock {path}", hint=f"write one: apt plugin-lock -p {wanted}")
    return path


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def of_the_run(args: Namespace) -> dict[str, Any]:
    """What `load_run` is to open, and with what."""
    names = ("device", "checkpoint", "state")
    overrides = _overrides(args)
    return (
        {name: getattr(args, name) for name in names}
        | selection(args)
        | ({"overrides": overrides} if overrides else {})
    )


def _overrides(args: Namespace) -> dict[str, Any]:
    """Keys of the run's profile that were given as options: those of its model, and those that this command reads."""
    overrides, also = parse_overrides(args.overrides), KEYS_IN_USE.get(args.command, ())
    for key in overrides:
        if not key.startswith(("model.", *also)):
            other = "".join(f" or {prefix}{'*' if prefix[-1] in '._' else ''}" for prefix in also)
            raise UsageError(
                f"apt {args.command}: --{key} is no key of the model{other}",
                hint="a run cannot be trained otherwise afterwards; its keys are for apt train --resume",
            )
    _read_what_is_named(overrides)
    return overrides


def _readable(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}"
