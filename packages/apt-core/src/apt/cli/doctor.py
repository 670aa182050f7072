"""`apt doctor`: what this machine has, what is installed, and what would fall back and why."""

from __future__ import annotations

import platform
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence

from apt.cli.commands import look_at_plugins, plugin_lines
from apt.cli.screen import columns, heading, in_bytes
from apt.cli.system_apt import find_system_apt
from apt.core.catalogue import DEFAULTS, PROVIDERS, how_to_install
from apt.core.errors import AptError, AptWarning
from apt.core.registry import Registry
from apt.core.requirements import missing_requirements

LIBRARIES = (
    "torch", "numpy", "pluggy", "pydantic", "ruamel.yaml", "rich", "safetensors", "tokenizers", "psutil",
    "pyarrow", "tensorboard",
)  # fmt: skip

INDISPENSABLE = {"dataset", "tokenizer", *DEFAULTS}
"""Kinds without which there is nothing to train, or on."""


def run_doctor_command(args: Namespace) -> int:
    """Show what there is. It only looks, and finds no fault that would stop it: the exit code is 0."""
    if is_system_python():
        warnings.warn(
            f"{sys.executable} is the system's own Python, whose tools import python3-apt under the name of apt; "
            "install APT into an environment of its own: python3 -m venv .venv && .venv/bin/pip install apt-core",
            AptWarning,
            stacklevel=2,
        )
    plugins = look_at_plugins()
    _show("System", columns(_system()))
    _show("Versions", columns(_versions()))
    _show("Hardware", columns(_hardware()))
    _show("Plugins", plugin_lines(plugins))
    _show("Providers", _providers(plugins.registry))
    absent = columns(_not_installed(plugins.registry))
    _show("Not here, and how to get it", absent or ["  nothing more that core knows of"], last=True)
    return 0


def is_system_python() -> bool:
    """Whether this is the Python that the system's own tools run on, and not an environment of it."""
    return sys.prefix == sys.base_prefix == "/usr"


def _system() -> list[tuple[str, str]]:
    from apt.core import cache

    kind = (
        "an environment"
        if sys.prefix != sys.base_prefix
        else "the system's own"
        if is_system_python()
        else "no environment"
    )
    size = cache.size()
    return [
        ("python", f"{platform.python_version()}, {sys.executable} ({kind})"),
        ("platform", platform.platform()),
        ("cache", f"{cache.cache_root()} ({in_bytes(size) if size else 'empty'})"),
        ("system's apt", find_system_apt() or "none"),
    ]


def _versions() -> list[tuple[str, str]]:
    from importlib_metadata import PackageNotFoundError, version

    from apt import __version__

    rows = [("apt-core", __version__)]
    for name in LIBRARIES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _hardware() -> list[tuple[str, str]]:
    from apt.core.device import BF16_MIN_WIDTH, TENSORS_PER_WEIGHT, describe_hardware, memory_of, pick_device

    machine, device = describe_hardware(), pick_device()
    bytes_each = 4 * TENSORS_PER_WEIGHT
    most = (memory_of(device) or 0) / bytes_each
    bf16 = f"yes; mixed_precision: auto uses it from d_model {BF16_MIN_WIDTH} on" if machine.cpu_bf16 else "no"
    gpus = [("gpu", f"{name}, {memory / 2**30:.1f} GiB") for name, memory in machine.gpus] or [("gpu", "none")]
    return [
        ("cpu", f"{machine.cpu}, {machine.cores} cores for this process"),
        ("cpu's bf16", bf16),
        ("memory", f"{machine.memory / 2**30:.1f} GiB, {machine.free / 2**30:.1f} GiB of them free"),
        *gpus,
        ("device: auto", str(device)),
        ("room for", f"{most / 1e9:.2f} B parameters in training ({bytes_each} bytes each), before any activation"),
    ]


def _providers(registry: Registry) -> list[str]:
    """What of the installed providers cannot be used here, and what happens to a run that names it."""
    good, lines = 0, []
    for kind, names in registry.list_providers().items():
        for name in names:
            problem, fix = _problem(registry, kind, name)
            if problem is None:
                good += 1
                continue
            lines += [f"  {kind}:{name}: {_instead(registry, kind, name)}", f"    {problem}"]
            lines += [f"    fix: {fix}"] if fix else []
    return [f"  {good} can be used here" + (", these cannot:" if lines else ""), *lines]


def _problem(registry: Registry, kind: str, name: str) -> tuple[str | None, str | None]:
    """(what is wrong with a provider, how to mend it)."""
    try:
        info = registry.get_info(kind, name)
    except AptError as error:
        return error.message, error.hint
    missing = [said for _, said in missing_requirements(info["dependencies"])]
    wanted = " ".join(f'"{requirement}"' for requirement in info["dependencies"])
    return ("; ".join(missing), f"pip install {wanted}") if missing else (None, None)


def _instead(registry: Registry, kind: str, name: str) -> str:
    stand_in = registry.fallback_of(kind, name)
    if stand_in:
        return f"gives way to {kind}:{stand_in}"
    return "stops a run that names it" if kind in INDISPENSABLE else "left out of a run that names it"


def _not_installed(registry: Registry) -> list[tuple[str, ...]]:
    """(package, its providers and what a run does without them), of what core knows by name and nobody registered."""
    known = registry.list_providers()
    groups: dict[tuple[str, str], list[str]] = {}
    for (kind, name), package in PROVIDERS.items():
        if name not in known.get(kind, []):
            groups.setdefault((package, _instead(registry, kind, name)), []).append(f"{kind}:{name}")
    return [(how_to_install(package), f"{', '.join(slots)}: {instead}") for (package, instead), slots in groups.items()]


def _show(title: str, lines: Sequence[str], *, last: bool = False) -> None:
    print(heading(title), *lines, sep="\n", end="\n" if last else "\n\n")
