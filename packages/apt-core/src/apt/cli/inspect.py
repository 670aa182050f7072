"""`apt inspect`: what a run is made of and what it has saved.

It opens a run whose plugins are not here, and one that is damaged: what cannot be read is said in its place. Nothing of
the run is imported or built, and torch is not needed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from apt.cli.screen import columns, heading, in_bytes
from apt.core.errors import AptError, CheckpointError
from apt.core.runs import RunFolder, find_run


def run_inspect_command(args: Namespace) -> int:
    """Show the run `args.run_name`."""
    run = find_run(args.run_name)
    facts = inspect_run(run, args.checkpoint)
    if args.json:
        import json

        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    print(f"{heading('Run')}\n" + "\n".join(columns(_run_rows(facts))))
    sections = (
        ("Profile, where it is not the default", _profile_lines(facts["profile"])),
        ("Providers in effect", _provider_lines(facts["providers"])),
        ("Plugins", _plugin_lines(facts["plugins"])),
        ("Checkpoints", _checkpoint_lines(facts["checkpoints"])),
        (f"Tensors of the model{_of_step(facts)}", _tensor_lines(facts)),
    )
    for title, lines in sections:
        print(f"\n{heading(title)}\n" + "\n".join(lines))
    return 0


def inspect_run(run: RunFolder, checkpoint: str | int | None = None) -> dict[str, Any]:
    """All that `apt inspect --json` prints.

    Args:
        checkpoint: whose tensors to list: "best", "last" or a step; None for the last that is whole.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    from apt.checkpoint.lock import read_lock
    from apt.checkpoint.summary import best_of, summaries, tensors_of
    from apt.core.profiles import load_profile_data

    problems: list[str] = []
    profile: dict[str, Any] = {}
    lock: dict[str, Any] = {"slots": [], "plugins": []}
    try:
        profile = load_profile_data(run.profile)[0]
    except AptError as error:
        problems.append(str(error))
    try:
        lock = read_lock(run.lock)
    except AptError as error:
        problems.append(str(error))
    found = summaries(run.checkpoints)
    best = best_of(found)
    whole = [summary for summary in found if summary.problem is None]
    if checkpoint in (None, "last"):
        chosen = whole[-1] if whole else None
    elif checkpoint == "best":
        if best is None:
            raise CheckpointError("no checkpoint of this run has a validation loss", hint="use last, or a step")
        chosen = best
    else:
        chosen = next((summary for summary in found if summary.step == checkpoint), None)
        if chosen is None:
            there = ", ".join(str(summary.step) for summary in found) or "none"
            raise CheckpointError(f"{run.path} has no checkpoint of step {checkpoint}", hint=f"there are: {there}")
    tensors = tensors_of(chosen.folder) if chosen is not None else []
    return {
        "run": str(run.path),
        "problems": problems,
        "step": whole[-1].step if whole else None,
        "epoch": whole[-1].epoch if whole else None,
        "profile": profile,
        "providers": [_slot(record) for record in lock["slots"]],
        "plugins": [record | _whether_here(record["distribution"], record["version"]) for record in lock["plugins"]],
        "checkpoints": [
            {
                "step": summary.step,
                "folder": str(summary.folder),
                "bytes": summary.bytes,
                "whole": summary.problem is None,
                "problem": summary.problem,
                "best": summary is best,
                "epoch": summary.epoch,
                "metrics": summary.metrics,
                "dropped": summary.dropped,
                "states": summary.states,
            }
            for summary in found
        ],
        "tensors_of_step": chosen.step if chosen is not None else None,
        "numbers": sum(tensor.numbers for tensor in tensors),
        "tensors": [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in tensors],
    }


def _slot(record: Mapping[str, Any]) -> dict[str, Any]:
    """A slot of the lock without its weights' shapes, which are among the tensors."""
    kept = {key: value for key, value in record.items() if key not in ("weights", "weights_sha256")}
    numbers = sum(_product(shape) for shape in record["weights"].values())
    return kept | {"numbers": numbers} | _whether_here(record["distribution"], record["distribution_version"])


def _whether_here(distribution: str | None, version: str | None) -> dict[str, Any]:
    """Which version of a distribution is installed now, and what to do for the one that was used."""
    if distribution is None:
        return {"installed": None, "install": None}
    from importlib_metadata import PackageNotFoundError
    from importlib_metadata import version as installed_version

    from apt import __version__

    here: str | None
    try:
        here = installed_version(distribution)
    except PackageNotFoundError:
        here = __version__ if distribution == "apt-core" else None  # a source tree on the path, without its metadata
    return {"installed": here, "install": None if here == version else f'pip install "{distribution}=={version}"'}


# The screen


def _run_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = [("folder", facts["run"])]
    if name := facts["profile"].get("name"):
        rows.append(("profile", f"{name}: {facts['profile'].get('description') or 'no description'}"))
    done = "nothing" if facts["step"] is None else f"{facts['step']:,} steps, epoch={facts['epoch']}"
    rows.append(("done", done))
    rows += [("problem", problem) for problem in facts["problems"]]
    return rows


def _profile_lines(profile: Mapping[str, Any]) -> list[str]:
    from apt.core.config import RunConfig

    usual = _flat(RunConfig().model_dump(mode="json"))
    rows = [
        (key, _shown(value))
        for key, value in _flat(profile).items()
        if key not in ("name", "description") and not (key in usual and usual[key] == value)
    ]
    return columns(rows) if rows else ["  everything is"]


def _provider_lines(providers: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for slot in providers:
        origin = " ".join(filter(None, (slot["distribution"], slot["distribution_version"]))) or "a script"
        title = f"{slot['name']} {slot['version']}" if slot["name"] else "none"
        weights = f"{slot['numbers']:,} numbers" if slot["numbers"] else ""
        asked = f"instead of {slot['requested']}: {slot['reason']}" if slot["fallback"] else ""
        rows.append((slot["kind"], title, origin if slot["name"] else "", weights, asked or _missing(slot)))
    return columns(rows) if rows else ["  not known"]


def _plugin_lines(plugins: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for plugin in plugins:
        package = " ".join(filter(None, (plugin["distribution"], plugin["version"]))) or "no distribution"
        digest = f"SHA-256 {plugin['sha256'][:12]}..." if plugin["sha256"] else ""
        rows.append((plugin["name"], package, digest, _missing(plugin)))
    return columns(rows) if rows else ["  not recorded"]


def _checkpoint_lines(checkpoints: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for checkpoint in checkpoints:
        loss = checkpoint["metrics"].get("val_loss")
        rows.append(
            (
                f"step-{checkpoint['step']:08d}",
                in_bytes(checkpoint["bytes"]),
                f"val_loss {loss:.4f}" if loss is not None else "",
                "best" if checkpoint["best"] else "",
                "whole" if checkpoint["whole"] else f"not whole: {checkpoint['problem']}",
                f"with state of {', '.join(checkpoint['states'])}" if checkpoint["states"] else "",
                f"without {', '.join(checkpoint['dropped'])}" if checkpoint["dropped"] else "",
            )
        )
    return columns(rows) if rows else ["  none"]


def _tensor_lines(facts: Mapping[str, Any]) -> list[str]:
    tensors = facts["tensors"]
    if not tensors:
        return ["  none can be read"]
    rows = [
        (t["name"], " x ".join(map(str, t["shape"])) or "one number", t["dtype"], f"{_product(t['shape']):,}")
        for t in tensors
    ]
    return [*columns(rows), f"  {facts['numbers']:,} numbers in {len(tensors)} tensors"]


def _of_step(facts: Mapping[str, Any]) -> str:
    return f" at step {facts['tensors_of_step']:,}" if facts["tensors_of_step"] is not None else ""


def _missing(record: Mapping[str, Any]) -> str:
    if record["install"] is None:
        return ""
    here = f"{record['installed']} is installed" if record["installed"] else "not installed"
    return f"{here}: {record['install']}"


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _product(shape: Sequence[int]) -> int:
    import math

    return math.prod(shape)
