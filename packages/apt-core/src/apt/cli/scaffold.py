"""`apt plugin-new`: a distribution with one provider that works, for its author to change.

The files are templates beside this module: those in `templates/all` are written for every kind of provider, those in
`templates/KIND` for that kind alone. `$name` in them is filled in by `string.Template`, and PACKAGE in a path is the
name of the package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template

from apt import __version__
from apt.core.catalogue import ENTRY_POINTS, KINDS, PLUGINS, PROVIDERS
from apt.core.errors import ConfigError, UsageError, did_you_mean
from apt.hookspecs import API_VERSION

TEMPLATES = Path(__file__).parent / "templates"
PACKAGE, ENDING = "PACKAGE", ".tmpl"
LONGEST = 28
"""Letters of a name: a line of the templates has room for no more."""
NEAR = 0.85
"""How alike two names are that a slip of the finger tells apart, from 0 to 1: my-align is not align, aligm is."""


@dataclass(frozen=True, slots=True)
class Starter:
    """What the templates of one kind hold."""

    suffix: str
    """What the provider's class is called, behind the plugin's own name."""
    summary: str
    use: str
    """A command that uses it."""
    register: str = ""
    """Further arguments of `registry.register`."""


STARTERS = {
    "attention": Starter(
        "Attention",
        "Causal softmax attention with rotary positions and a cache",
        "apt train --profile tiny_debug --model.attention_name $plugin",
    ),
    "ffn": Starter(
        "FFN",
        "A feed-forward layer with a gate through a GELU",
        "apt train --profile tiny_debug --model.ffn_name $plugin",
    ),
    "router": Starter(
        "Router",
        "A mixture of experts in which each token visits one",
        "apt train --profile tiny_debug --model.router_name $plugin --model.moe.enabled true",
        '\n        section="moe",',
    ),
    "align": Starter(
        "Align",
        "A loss that keeps a model near the average of its own weights",
        "apt train --profile tiny_debug --model.align_name $plugin",
    ),
    "retrieval": Starter(
        "Retrieval",
        "Passages found by the words they share with a query",
        "apt plugin-check retrieval:$plugin",
    ),
    "voter": Starter(
        "Voter",
        "The answer that most of several continuations give",
        "apt generate --prompt 'def ' --voter $plugin",
    ),
    "quant": Starter(
        "Quant",
        "Weights as integers of 8 bits, with one scale for each row",
        "apt quantize --scheme $plugin",
    ),
    "dataset": Starter(
        "Dataset",
        "The text files of a folder, or sums that are made up",
        "apt train --profile tiny_debug --data.dataset $plugin",
    ),
    "tokenizer": Starter(
        "Tokenizer",
        "Common words, and bytes for everything else",
        "apt train --profile tiny_debug --data.tokenizer $plugin --model.vocab_size null",
    ),
    "tracker": Starter(
        "Tracker",
        "A run's metrics as a table of comma-separated values",
        "apt train --profile tiny_debug --training.trackers '[$plugin]'",
    ),
}


@dataclass(frozen=True, slots=True)
class Names:
    """What one name is called in each place."""

    plugin: str
    """The plugin, its provider and that one's section: sliding_window."""
    distribution: str
    """What pip installs: apt-sliding-window."""
    package: str
    """What Python imports: apt_sliding_window."""
    stem: str
    """The beginning of the classes' names: SlidingWindow."""


def run_plugin_new_command(args: Namespace) -> int:
    """Write a new plugin, and say what to do with it."""
    names = names_of(args.name)
    if args.kind not in KINDS:
        near = did_you_mean(args.kind, KINDS)
        hint = f"did you mean {near}?" if near else f"the kinds are {', '.join(KINDS)}"
        raise UsageError(f"apt plugin-new: there is no provider kind {args.kind!r}", hint=hint)
    check_free(names, args.kind)
    folder = Path(args.dir or names.distribution)
    written = write_plugin(names, args.kind, folder)
    starter = STARTERS[args.kind]

    from apt.cli.screen import columns, heading

    what = {
        f"src/{names.package}/{args.kind}.py": f"{starter.summary}: yours to change",
        f"src/{names.package}/plugin.py": f"registers it as {args.kind}:{names.plugin}",
        f"tests/test_{args.kind}.py": "the conformance kit, and tests of its own",
    }
    print(heading(f"{names.distribution} in {folder}"))
    print("\n".join(columns([(str(path), what.get(path.as_posix(), "")) for path in written])))
    print(f"\n{heading('Next')}")
    where = str(folder) if os.sep in str(folder) else f"./{folder}"
    print(f"  pip install -e {shlex.quote(f'{where}[test]')}")
    print(f"  pytest {shlex.quote(str(folder))}")
    print(f"  {Template(starter.use).substitute(plugin=names.plugin)}")
    return 0


def names_of(name: str) -> Names:
    """The names of a plugin that is to be called `name`; "apt-" before it may be left out.

    Raises:
        UsageError: it is no name that a distribution and a package can both have; the hint says what comes near.
    """
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-")
    if name.replace("_", "-") != words or not re.match("[a-z]", words) or len(words) > LONGEST:
        near = words.lstrip("0123456789-")[:LONGEST].rstrip("-")
        suggestion = f"did you mean {near}? " if name.isascii() and len(near) > 2 else ""
        raise UsageError(
            f"apt plugin-new: {name!r} cannot be the name of a package",
            hint=f"{suggestion}use lower-case letters, digits and single hyphens, a letter first, {LONGEST} at most",
        )
    bare = words.removeprefix("apt-").removeprefix("plugin-")
    if bare in ("apt", "plugin") or not re.match("[a-z]", bare):
        raise UsageError(f"apt plugin-new: {name!r} says nothing beside apt", hint="add a word that says what it does")
    distribution = words if words.startswith("apt-") else f"apt-{words}"
    stem = "".join(word[0].upper() + word[1:] for word in bare.split("-"))
    return Names(bare.replace("-", "_"), distribution, distribution.replace("-", "_"), stem)


def check_free(names: Names, kind: str) -> None:
    """Raise ConfigError if something that is installed, or known, has one of these names, or nearly one."""
    from apt.cli.commands import look_at_plugins
    from apt.core.config import RunConfig

    plugins = look_at_plugins()
    packages = {*PLUGINS.values(), "apt-core", *(plugin.distribution for plugin in plugins.found)}
    if names.distribution in packages or find_spec(names.package) is not None:
        raise _taken(f"{names.distribution} exists already")
    known = {
        name: f"the plugin {name}" for name in (*PLUGINS, *ENTRY_POINTS.values(), *(p.name for p in plugins.found))
    }
    known |= {claim.name: claim.slot for claim in plugins.registry.claims() if claim.kind == kind}
    known |= {name: f"{kind}:{name}" for of, name in PROVIDERS if of == kind}
    if names.plugin in known:
        raise _taken(f"{known[names.plugin]} exists already")
    if near := did_you_mean(names.plugin, known, cutoff=NEAR):
        raise _taken(f"{names.plugin} is so near {known[near]} that one would be taken for a slip of the other")
    parent = KINDS[kind]
    keys = getattr(RunConfig.model_fields[parent].annotation, "model_fields", {})
    sections = {claim.section for claim in plugins.registry.claims() if KINDS[claim.kind] == parent}
    if names.plugin in keys or names.plugin in sections:
        raise _taken(f"{parent}.{names.plugin}, its section of a profile, is taken")


def write_plugin(names: Names, kind: str, folder: Path) -> list[Path]:
    """Write the plugin into `folder`, which must not exist, and return its files, relative to it, in order.

    Raises:
        ConfigError: there is something there already.
    """
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} exists already", hint="remove it, or choose another folder with --dir")
    starter = STARTERS[kind]
    # AttentionAttention says no more than Attention.
    ends = names.stem.lower().endswith(starter.suffix.lower()) and len(names.stem) > len(starter.suffix)
    stem = names.stem[: -len(starter.suffix)] if ends else names.stem
    values = {
        "plugin": names.plugin,
        "distribution": names.distribution,
        "package": names.package,
        "provider": stem + starter.suffix,
        "kind": kind,
        "summary": starter.summary,
        "use": Template(starter.use).substitute(plugin=names.plugin),
        "register": starter.register,
        "api_version": str(API_VERSION),
        "apt_version": __version__,
        "next_major": str(int(__version__.partition(".")[0]) + 1),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved: what fails half-way leaves nothing.
    aside = Path(tempfile.mkdtemp(prefix=".apt-plugin-new-", dir=folder.parent))
    try:
        written = []
        for root in (TEMPLATES / "all", TEMPLATES / kind):
            for source in root.rglob(f"*{ENDING}"):
                path = Path(source.relative_to(root).as_posix().replace(PACKAGE, names.package).removesuffix(ENDING))
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                text = Template(source.read_text(encoding="utf-8")).substitute(values)
                (aside / path).write_text(text, encoding="utf-8")
                written.append(path)
        aside.chmod(0o777 & ~_umask())
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return sorted(written, key=lambda path: (len(path.parts), path))


def _taken(message: str) -> ConfigError:
    return ConfigError(f"apt plugin-new: {message}", hint="choose another name")


def _umask() -> int:
    """What new files may not be; there is no way to ask without setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
