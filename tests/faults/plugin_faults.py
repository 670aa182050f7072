"""A plugin that does wrong, in each of its hooks: `apt train` and `apt generate` go on without it, or end in one clear
line with what was saved, and the run comes to the end that it would have come to."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from lab import Lab, Row, end_of, in_a_child, last_good
from made_distribution import make_distribution

from apt import hookspecs
from apt.checkpoint.store import CheckpointStore
from apt.core.hooks import GENERATION, SPEC_NAMES
from apt.core.runs import RunFolder

BEGUN = 4
"""The step at which the plugin begins to do wrong."""

MODULE = "faulty_plugin"
HEAD = """
import math, os, signal, time
from apt.hookspecs import hookimpl

API_VERSION = (1, 0)
"""
STATE = """
@hookimpl
def on_checkpoint_save():
    return {"n": 1}
"""
PROVOKED = {
    "on_plugin_failed": """
@hookimpl
def on_step_start(step):
    raise LookupError("provoked")
""",
    "on_exception": """
@hookimpl
def on_step_end(step):
    if step == 8:
        signal.raise_signal(signal.SIGTERM)
""",
}
"""What has to happen so that a hook is called."""

HANG = 'open(os.environ["HANGS"], "w").close()\n    while True: time.sleep(0.01)'
HANG_IN_C = """open(os.environ["HANGS"], "w").close()
    import ctypes
    lock = ctypes.create_string_buffer(64)  # a mutex of pthreads, unlocked
    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)"""
WRONG = {
    "extra_losses": [
        "object()", "[logits.mean()]", '{"x": 1.0}', '{"x": logits}', "{1: logits.mean()}", '{"x": logits.mean() * 1j}',
    ],
    "on_checkpoint_save": ["object()", '{"x": object()}', '{"x": {1, 2}}'],
    "on_generation_start": ["object()", "3"],
    "on_next_token": ["object()", "logits[:, :-1]", "[0.0]"],
}  # fmt: skip
"""What a hook returns whose result is used; another hook's is not looked at."""
POISON = "for weight in trainer.model.parameters(): weight.data.fill_(math.nan)"
NOT_FINITE = {
    "extra_losses": ['return {"x": logits.mean() * math.nan}', 'return {"x": logits.mean() + math.inf}'],
    "on_before_optimizer_step": ["for weight in trainer.model.parameters(): weight.grad.fill_(math.nan)"],
    "on_checkpoint_load": [POISON],
    "on_checkpoint_save": ['return {"n": math.nan, "m": math.inf}'],
    "on_model_built": [POISON],
    "on_optimizer_built": [POISON],
    "on_training_start": [POISON],
    "on_epoch_start": [POISON],
    "on_step_start": [POISON],
    "on_step_end": [POISON, "loss.fill_(math.nan)"],
    "on_epoch_end": [POISON],
    "on_next_token": ["return logits * math.nan"],
}
"""What is made NaN; every hook that is given the trainer also reports NaN as a metric."""
OVERWRITTEN = {"on_model_built", "on_optimizer_built", "on_checkpoint_save"}
"""Where NaN does no harm: a resumed run loads its weights later, and a plugin's own numbers are its own."""

FAULTS = {
    "raise": "a hook raises",
    "exit": "a hook calls sys.exit",
    "hang": "a hook hangs",
    "wrong type": "a hook returns what it must not",
    "config": "a hook changes the profile",
    "NaN": "a hook makes something NaN",
    "import": "its module cannot be imported",
    "API": "its module is for another API",
    "slip": "a slip in a hook's name",
    "argument": "a hook asks for an argument that there is not",
    "duplicate": "two distributions bring it",
}
SMOKE_HOOKS = {"on_step_end", "extra_losses"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One plugin that does wrong."""

    hook: str
    fault: str
    body: str = "pass"
    """Of the hook."""
    code: int = 0
    """What the command is to end with."""
    said: str = ""
    """A regular expression for what it is to say."""

    @property
    def source(self) -> str:
        arguments = list(inspect.signature(getattr(hookspecs, self.hook)).parameters)
        name = self.hook[:-1] if self.fault == "slip" else self.hook
        given = ", ".join([*arguments, "no_such_thing"] if self.fault == "argument" else arguments)
        head = HEAD.replace("(1, 0)", "(99, 0)") if self.fault == "API" else HEAD
        if self.fault == "import":
            head += 'raise ImportError("on purpose")\n'
        also = PROVOKED.get(self.hook, "") + ("" if self.hook == "on_checkpoint_save" else STATE)
        return f"{head}{also}\n@hookimpl\ndef {name}({given}):\n    {self.body}\n"


def cells(fault: str) -> Iterator[Cell]:
    """What is tried of one fault."""
    for hook in sorted(SPEC_NAMES):
        given = inspect.signature(getattr(hookspecs, hook)).parameters
        registers = hook.startswith("apt_register_")
        ends = 143 if hook == "on_exception" else 0
        if fault in ("raise", "exit"):
            body, text = ("raise ValueError('on purpose')", "ValueError: on purpose")
            if fault == "exit":
                body, text = ("raise SystemExit(3)", "SystemExit: 3")
            yield Cell(hook, fault, body, ends, text if registers else rf"faulty\.{hook} failed: {text}")
        elif fault == "hang":
            named = not registers and hook not in GENERATION
            said = rf"faulty\.{hook} has been at work for" if named else ""
            if hook == "apt_register_providers":
                yield Cell(hook, fault, HANG, 0, r"faulty.* is not used: .*3 s")
            else:
                yield Cell(hook, fault, HANG, -signal.SIGTERM if named else 130, said)
            if hook in SMOKE_HOOKS:
                yield Cell(hook, fault, HANG_IN_C, 143, said)
        elif fault == "wrong type":
            for result in WRONG.get(hook, ["object()"]):
                said = rf"faulty\.{hook} failed: " if hook in WRONG else ""
                yield Cell(hook, fault, f"return {result}", ends, said)
        elif fault == "config":
            owner = {"config": "config", "trainer": "trainer.config", "generator": "generator.loaded.config"}
            for argument in given.keys() & owner:
                body = f"{owner[argument]}.schedules['x'] = 1.0"
                yield Cell(hook, fault, body, ends, rf"faulty\.{hook} failed: TypeError: a profile cannot be changed")
        elif fault == "NaN":
            for body in NOT_FINITE.get(hook, ()):
                said = r"not finite at step \d+"
                if hook == "extra_losses":
                    said += ": the loss, by 'x' of faulty; the checkpoint of step 4 is kept"
                if hook == "on_next_token":
                    yield Cell(hook, fault, body, 0, r"faulty\.on_next_token failed: .*NaN")
                elif hook in OVERWRITTEN:
                    yield Cell(hook, fault, body)
                else:
                    yield Cell(hook, fault, body, 2, said)
            if "trainer" in given and not registers:
                yield Cell(hook, fault, "trainer.extra_metrics['x'] = math.nan", ends)
        else:
            said = {
                "import": r"plugin 'faulty' \(apt-faulty\) is not used: .*on purpose",
                "API": r"plugin 'faulty' \(apt-faulty\) is not used: .*API_VERSION = \(99, 0\)",
                "slip": rf"faulty\.{hook[:-1]} is no hook and will not be called; did you mean {hook}\?",
                "argument": r"plugin 'faulty' \(apt-faulty\) is not used: .*no_such_thing",
                "duplicate": r"apt-faulty and apt-faulty-too both bring a plugin called 'faulty'",
            }[fault]
            # A plugin that is not used at all ends no run.
            alive = fault == "slip" and hook == "on_exception"
            yield Cell(hook, fault, "pass", 143 if alive else 0, said)


def healthy(lab: Lab) -> Bench:
    """Runs with a plugin that does no wrong."""
    return Bench(lab, {MODULE: HEAD + STATE})


def plugin_row(bench: Bench, fault: str, smoke: bool) -> Row:
    """One fault in every hook."""
    row = Row(f"plugin: {FAULTS[fault]}")
    todo = list(cells(fault))
    if smoke:
        first = {cell.hook: cell for cell in reversed(todo) if cell.hook in SMOKE_HOOKS}
        todo = list(first.values()) if todo[0].body != "pass" else [first["on_step_end"]]
    for cell in todo:
        row.add(f"{cell.hook}: {cell.body}", *bench.try_out(cell))
    return row


# Missing and older ones

OWN = """
@hookimpl
def apt_register_providers(registry):
    registry.register("{kind}", "own", "own_part:Own", version="1.0")
"""
PARTS = {
    "ffn": """
from apt.modeling.layers.ffn import DefaultFFN

class Own(DefaultFFN):
    def get_name(self): return "own"
    def get_version(self): return "1.0"
""",
    "align": """
from apt.core.providers.align import AlignProvider

class Own(AlignProvider):
    def get_name(self): return "own"
    def get_version(self): return "1.0"
    def compute_align_loss(self, logits, targets, model_state): return logits.float().logsumexp(-1).mean() * 1e-3
""",
}


def ages(lab: Lab, what: str) -> Row:
    """A plugin that a run was made with, 3.1 at that time, is older at the resume, missing, or newer."""
    row = Row(f"plugin at resume: {what} missing, older, newer")
    provides = what in PARTS
    modules = {MODULE: HEAD + OWN.format(kind=what), "own_part": PARTS[what]} if provides else {MODULE: HEAD + STATE}
    bench = Bench(lab, modules, *((f"--model.{what}_name", "own") if provides else ()), version="3.1")
    refused = "this run was made with apt-faulty 3.1, and {} is here, which is older"
    restore = 'pip install "apt-faulty==3.1"'
    for version, code, said, *options in (
        ("3.0.9", 2, refused.format("3.0.9")),
        ("3.1rc2", 2, refused.format("3.1rc2")),
        (None, 2 if provides else 0, restore),  # the state of one that listens is carried
        (None, 2, restore, "--strict"),
        ("3.1", 0, ""),
        ("3.10", 0, ""),
    ):
        run = lab.copy(bench.base, "victim")
        before = tensors_of(run)
        bench.install(modules if version else {}, version=version or "")
        got, text = bench.apt(*bench.going_on(run), *options)
        problem = "" if got == code and said in text else f"exit {got}, and said is: {text}"
        if code and (tensors_of(run) != before or not CheckpointStore(RunFolder(run).checkpoints).load_weights()[1]):
            problem = problem or "the weights alone cannot be loaded"
        # A model that is only used needs neither what listens nor an alignment.
        used, text = bench.apt("generate", str(run), "--max-tokens", "2")
        if used != (2 if what == "ffn" and version is None else 0):
            problem = problem or f"generate ends with {used}: {text}"
        if code:
            bench.install(modules, version="3.1")
            bench.apt(*bench.going_on(run))
        case = " ".join((version or "missing", *options))
        row.add(case, problem or ("" if end_of(run) == bench.end else "the end is another one"))
    return row


def tensors_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


class Bench:
    """Runs with a plugin `faulty`, which is well until a run has made some steps.

    Args:
        modules: what it is made of then.
        overrides: further arguments of `apt train` for a new run.
        version: of its distribution.
    """

    def __init__(self, lab: Lab, modules: Mapping[str, str], *overrides: str, version: str = "1.0") -> None:
        self.lab, self.modules = lab, modules
        self.site, self.hangs, self.shown = lab.folder / "site", lab.folder / "hangs", lab.folder / "shown.txt"
        self.base, self.whole = lab.folder / "base", lab.folder / "whole"
        self.profile = lab.folder / "small.yaml"
        config = lab.config() | {"plugins": ["faulty"]}
        config["training"]["lr_schedule"] = "constant"  # the length of the run is given in parts
        self.profile.write_text(yaml.safe_dump(config))
        self.install(modules, version=version)
        for run, steps in ((self.base, BEGUN), (self.whole, lab.steps)):
            arguments = ("-p", str(self.profile), "--run-dir", str(run), "--training.max_steps", str(steps))
            code, said = self.apt("train", *arguments, *overrides, "--quiet")
            assert code == 0, said
        self.end = end_of(self.whole)
        code, self.text = self.apt(*self.generating())
        assert code == 0, self.text

    def install(self, modules: Mapping[str, str], *, version: str = "1.0", twice: bool = False) -> None:
        """Have this plugin and no other; none at all without modules."""
        shutil.rmtree(self.site, ignore_errors=True)
        self.site.mkdir()
        names = ("apt-faulty", "apt-faulty-too") if twice else ("apt-faulty",) if modules else ()
        for name in names:
            make_distribution(self.site, name, version, plugins={"faulty": MODULE}, modules=modules)

    def going_on(self, run: Path) -> tuple[str, ...]:
        return ("train", "--resume", str(run), "--training.max_steps", str(self.lab.steps), "--quiet")

    def generating(self) -> tuple[str, ...]:
        return ("generate", str(self.whole), "--prompt", "12 green", "--max-tokens", "8", "--seed", "0")

    def apt(self, *arguments: str, hang: str = "") -> tuple[int, str]:
        """One call of the command line in a child; its exit code, and what it printed.

        Args:
            hang: the hook that will hang; signals then end the process.
        """
        self.hangs.unlink(missing_ok=True)

        def work() -> int:
            from apt.cli.main import main
            from apt.core import hooks

            sys.path.insert(0, str(self.site))
            patience = "3" if hang == "apt_register_providers" else "120"
            os.environ |= {
                "APT_CACHE_DIR": str(self.lab.folder / "found"), "APT_IMPORT_SECONDS": patience,
                "HANGS": str(self.hangs),
            }  # fmt: skip
            if hang and hang != "apt_register_providers":
                hooks.SLOW_SECONDS = 0.2
                threading.Thread(target=self.interrupt, args=(hang,), daemon=True).start()
            return main(arguments)

        code, failed = in_a_child(work, self.lab.folder / "said.txt", self.shown)
        return code, self.shown.read_text() + failed

    def interrupt(self, hook: str) -> None:
        """Wait for a hook to hang, and to be named if that is to be; then do as a user would."""
        while not self.hangs.exists():
            time.sleep(0.02)
        if hook in GENERATION or hook.startswith("apt_register_"):
            os.kill(os.getpid(), signal.SIGINT)
            return
        while f"{hook} has been at work" not in self.shown.read_text():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.75)

    def try_out(self, cell: Cell) -> tuple[str, int]:
        """What is wrong with how a run takes it, "" if nothing is; and the steps that are lost."""
        self.install({MODULE: cell.source}, twice=cell.fault == "duplicate")
        run = self.lab.copy(self.base, "victim")
        going_on = arguments = self.going_on(run)
        if cell.hook in GENERATION:
            arguments = self.generating()
        elif cell.hook == "apt_register_commands":
            arguments = ("--help",)
        code, said = self.apt(*arguments, hang=cell.hook if cell.fault == "hang" else "")
        problem = "" if code == cell.code else f"exit {code} and not {cell.code}: {said}"
        if cell.said and not re.search(cell.said, said):
            problem = problem or f"it does not say {cell.said}: {said}"
        if "Traceback" in said:
            problem = problem or f"a traceback: {said}"
        if arguments != going_on:
            if code == 0 and arguments[0] == "generate" and self.text not in said:
                problem = problem or f"the text is another one: {said}"
            return problem, 0
        good = last_good(run)
        lost = max(BEGUN - (good or 0), 0)
        if code:
            self.install(self.modules)
            code, said = self.apt(*going_on)
            problem = problem or ("" if code == 0 else f"the resumed run ends with {code}: {said}")
        if not problem and end_of(run) != self.end:
            problem = "the end is another one"
        return problem, lost
