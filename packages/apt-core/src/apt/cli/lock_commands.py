"""`apt plugin-lock`: the plugins and providers that a profile comes to, written down for `apt train --frozen`."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from apt.cli.overrides import parse_overrides
from apt.core.errors import CheckpointError
from apt.core.profiles import find_profile, is_shipped, resolve

SUFFIX = ".lock.json"


def lock_of(profile: str) -> Path:
    """Where the lock of a profile lies: beside it, as NAME.lock.json; that of one that ships in the current folder."""
    path = find_profile(profile)
    return Path(path.stem + SUFFIX) if is_shipped(path) else path.with_suffix(SUFFIX)


def selection(args: Namespace) -> dict[str, Any]:
    """The options that say which plugins may be used, and whether anything may stand in for one."""
    return {name: getattr(args, name) for name in ("plugins", "no_plugin", "no_plugins", "strict")}


def run_plugin_lock_command(args: Namespace) -> int:
    """Write the lock of `args.profile`."""
    profile = resolve(args.profile, parse_overrides(args.overrides))
    path = Path(args.output) if args.output is not None else lock_of(args.profile)

    from apt.checkpoint.lock import write_lock
    from apt.core.hooks import TRAINING
    from apt.training.choice import choose_plugins

    plugins = choose_plugins(profile, **selection(args))

    from apt.training.plan import plan

    in_use, model, builder = plan(profile.config, plugins.registry, strict=args.strict)
    slots = list(in_use.slots.values())
    used = plugins.used({slot.registration.plugin for slot in slots if slot.registration}, TRAINING)
    try:
        write_lock(path, slots, model, builder.modules_by_slot(model), used)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint="write it elsewhere: --output FILE") from error

    from apt.cli.screen import columns
    from apt.training.progress import describe_slot

    rows = [("plugin", f"{plugin.name} ({plugin.distribution} {plugin.version})") for plugin in used]
    rows += [(slot.kind, describe_slot(slot)) for slot in slots]
    print("\n".join(columns(rows)))
    print(f"Written to {path}")
    frozen = ["--frozen"] if args.output is None else ["--frozen", str(path)]
    # What changed the profile or the choice of plugins here has to be said there too, or the lock refuses the run.
    print(f"Next: {shlex.join(['apt', 'train', '-p', args.profile, *_options(args), *frozen])}")
    return 0


def _options(args: Namespace) -> list[str]:
    """The overrides and the selection of plugins, as they are typed."""
    options = [f"--{key}={text}" for key, text in args.overrides.items()]
    if args.plugins:
        options += ["--plugins", *args.plugins]
    options += [f"--no-plugin={name}" for name in args.no_plugin]
    return options + [f"--{name}" for name in ("no-plugins", "strict") if getattr(args, name.replace("-", "_"))]
