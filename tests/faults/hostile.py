"""Files that are not what they should be: profiles and texts, and what is to be said of each.

Every one is given to the command in a process of its own, which reports how long it took and how much memory.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab, end_of

Result = tuple[str, str]
"""(case, what went wrong; "" if nothing)."""

Make = Callable[[Path], str]
"""Makes a case in a folder, and returns what to name on the command line."""

OK = "name: x\ndata: {train_path: text.txt}\n"
LONG = 1 << 30
"""Bytes of what is called 1 GB."""

SECONDS, PROFILE_MB, DATA_MB = 1.0, 200, 500


def holding(content: str | bytes, name: str = "bad.yaml") -> Make:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return make


def sparse(folder: Path, name: str = "bad.yaml") -> str:
    with open(folder / name, "wb") as file:
        file.truncate(LONG)
    return name


def pipe(folder: Path, name: str = "bad.yaml") -> str:
    os.mkfifo(folder / name)
    return name


def link_to_itself(folder: Path, name: str = "bad.yaml") -> str:
    (folder / name).symlink_to(name)
    return name


def endless_chain(folder: Path) -> str:
    for number in range(30):
        (folder / f"bad{number}.yaml").write_text(f"extends: bad{number + 1}.yaml\n")
    return "bad0.yaml"


def circle(folder: Path) -> str:
    (folder / "other.yaml").write_text("extends: bad.yaml\n")
    return holding("extends: other.yaml\n")(folder)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(f"b{n}: &b{n}\n  <<: [{', '.join(['*a'] * 50)}]\n" for n in range(50))

PROFILES: dict[str, tuple[Make, str]] = {
    "aliases that multiply": (holding(ALIASES), "bad.yaml:5: more than 10,000 values"),
    "merge keys that multiply": (holding(MERGES), "bad.yaml:3: merge keys (<<) are not read"),
    "an alias of itself": (holding("a: &a [*a]\n"), "bad.yaml:1: the alias *a lies inside"),
    "lists 1,000 deep": (holding(OK + "model: " + "[" * 1000 + "]" * 1000), "bad.yaml:3: nested more than 50"),
    "mappings 1,000 deep": (holding(OK + "a:" + "\n - " * 2 + "{a: " * 1000), "nested more than 50 levels"),
    "an integer of 5,000 digits": (holding(OK + f"model: {{d_model: {'9' * 5000}}}\n"), "bad.yaml:3: an integer of"),
    "a float of 5,000 digits": (
        holding(OK + f"training: {{learning_rate: 1e{'9' * 5000}}}\n"),
        "bad.yaml:3: training.learning_rate: expected a finite number",
    ),
    "a key given twice": (holding(OK + "name: y\n"), "bad.yaml:3: the key 'name' is given twice"),
    "300 keys": (holding(OK + "model:\n" + "".join(f"  k{n}: 1\n" for n in range(300))), "bad.yaml:260: more than 256"),
    "a key that steers the terminal": (holding(OK + '"\\e[31m\\nx": 1\n'), "bad.yaml:3: '\\x1b[31m\\nx': unknown key"),
    "a key of 1,000 letters": (holding(OK + "k" * 1000 + ": 1\n"), "bad.yaml:3: 'kkkkkkkk"),
    "a tag that runs code": (holding(OK + "model: !!python/object/apply:os.system [ls]\n"), "bad.yaml:3: the tag"),
    "NUL": (holding(OK + "description: a\0b\n"), "bad.yaml:3: control character U+0000"),
    "NUL in an escape": (holding(OK + 'description: "\\0"\n'), "bad.yaml:3: an escape for NUL"),
    "half a surrogate pair": (holding(OK + 'description: "\\ud800"\n'), "bad.yaml:3: an escape for NUL or half"),
    "12:30:00": (holding(OK + "training: {max_steps: 12:30:00}\n"), "training.max_steps: expected a whole number"),
    "no": (holding(OK + "training:\n  seed: no\n"), "bad.yaml:4: training.seed: expected a whole number"),
    "a word for a number": (holding(OK + "training:\n  batch_size: many\n"), "bad.yaml:4: training.batch_size"),
    "true for a number": (holding(OK + "training:\n  batch_size: true\n"), "bad.yaml:4: training.batch_size"),
    "a list for a section": (holding(OK + "training: [1]\n"), "bad.yaml:3: training: expected a mapping, got a list"),
    "NaN": (holding(OK + "training:\n  learning_rate: .nan\n"), "bad.yaml:4: training.learning_rate: expected"),
    "infinity": (holding(OK + "training:\n  weight_decay: .inf\n"), "bad.yaml:4: training.weight_decay: expected"),
    "NaN for a provider": (holding(OK + "model:\n  tva: {tau: .nan}\n"), "bad.yaml:4: model.tva.tau: expected a fin"),
    "infinity in a list for a provider": (
        holding(OK + "training:\n  mine: {weights: [1.0, -.inf]}\n"),
        "bad.yaml:4: training.mine.weights[1]: expected a finite",
    ),
    "a word for a provider's number": (
        holding(OK + "model:\n  tva:\n    tau: abc\n"), "bad.yaml:5: model.tva.tau: expected a number greater than 0",
    ),
    "a misspelt key of a provider": (
        holding(OK + "model: {mha: {num_kv_heds: 2}}\n"), "bad.yaml:3: model.mha.num_kv_heds: unknown key",
    ),
    "a number for a dataset's word": (
        holding(OK[:-2] + ", pairs: {source_field: 3}}\n"), "bad.yaml:2: data.pairs.source_field: expected a string",
    ),
    "a pattern that is none": (
        holding(OK + "model: {voting: {pattern: '('}}\n"), "bad.yaml:3: model.voting.pattern: no regular expression",
    ),
    "a model of 10^9 layers": (holding(OK + "model: {num_layers: 1000000000}\n"), "bad.yaml:3: model.num_layers"),
    "a model 10^29 wide": (
        holding(OK + f"model: {{d_model: {10**29 - 1}, num_heads: 3}}\n"), "bad.yaml:3: model.d_model: expected",
    ),
    "a vocabulary of 10^11": (
        holding("name: x\ndata: {train_path: text.txt, tokenizer: bpe, vocab_size: 100000000000}\n"),
        "bad.yaml:2: data.vocab_size",
    ),
    "a name that leads out": (holding("name: ../../x\n"), "bad.yaml:1: name: a name has letters"),
    "a byte order mark, and a slip": (holding(codecs.BOM_UTF8 + b"nmae: x\n"), "bad.yaml:1: nmae: unknown key"),
    "tabs": (holding("name: x\ndata:\n\ttrain_path: text.txt\n"), "bad.yaml:3: a tab where YAML wants spaces"),
    "UTF-16": (holding(OK.encode("utf-16")), "bad.yaml:1: byte 0xff is not UTF-8"),
    "Latin-1": (holding(OK.encode() + b"description: caf\xe9\n"), "bad.yaml:3: byte 0xe9 is not UTF-8"),
    "a program": (holding(b"\x7fELF" + bytes(range(256))), "bad.yaml:2: byte 0x80"),
    "nothing": (holding(""), "bad.yaml:1: expected keys and values, got nothing"),
    "a list": (holding("- 1\n"), "bad.yaml:1: expected keys and values, got a list"),
    "two documents": (holding(OK + "---\n" + OK), "bad.yaml:3: a second document"),
    "an open quotation mark": (holding("name: 'x\n"), "bad.yaml:1: while scanning a quoted scalar"),
    "a line of 20,000 letters": (holding(OK + f"description: {'x' * 20_000}\n"), "bad.yaml:3: a line of"),
    "1 GB": (sparse, "bad.yaml: larger than 256 KiB"),
    "a folder": (lambda folder: str((folder / "bad").mkdir() or "bad"), "profile 'bad' is a folder"),
    "a pipe": (pipe, "profile 'bad.yaml' is a device or a pipe"),
    "a device": (lambda folder: "/dev/zero", "profile '/dev/zero' is a device or a pipe"),
    "a link to itself": (link_to_itself, "there is no profile 'bad.yaml'"),
    "a profile that extends itself": (holding("extends: bad.yaml\n"), "bad.yaml:1: extends: runs in a circle"),
    "two that extend each other": (circle, "other.yaml:1: extends: runs in a circle"),
    "an endless chain": (endless_chain, "bad10.yaml:1: extends: more than 10"),
    "one that extends a device": (holding("extends: /dev/zero\n"), "bad.yaml:1: extends: profile '/dev/zero' is a dev"),
}  # fmt: skip
"""Case -> how it is made, and what is said of it."""

SMALL = """\
name: small
plugins: []
model: {d_model: 8, num_heads: 1, num_layers: 1, max_seq_len: 128}
training: {max_epochs: 1, max_steps: 2, batch_size: 4, eval_batches: 2}
hardware: {device: cpu}
"""

TRAINS = "Training is complete"

VERSES = "".join(f"{number} green bottles hanging on the wall\n" for number in range(40))


def records(*lines: str | bytes) -> Make:
    """A .jsonl file whose first line is as it should be."""
    encoded = [line if isinstance(line, bytes) else line.encode() for line in (json.dumps({"text": VERSES}), *lines)]
    return holding(b"\n".join(encoded), "bad.jsonl")


def text(content: str | bytes) -> Make:
    return holding(content, "bad.txt")


def folder_of(make: Callable[[Path, str], str]) -> Make:
    """A folder with a good text and a bad one."""

    def made(folder: Path) -> str:
        (folder / "bad").mkdir()
        (folder / "bad/good.txt").write_text(VERSES)
        make(folder / "bad", "bad.txt")
        return "bad"

    return made


def one_line(name: str, before: bytes, after: bytes) -> Make:
    def make(folder: Path) -> str:
        with open(folder / name, "wb") as file:
            file.write(before)
            for _ in range(LONG >> 20):
                file.write(b"bottles!" * (1 << 17))
            file.write(after)
        return name

    return make


DATA: dict[str, tuple[Make, str]] = {
    "an empty file": (text(b""), "bad.txt is empty"),
    "a program": (text(b"\x7fELF\0\1\2" * 100), "bad.txt is not text: it is a program"),
    "NUL in a text": (text(VERSES + "a\0b"), "bad.txt is not text: it has a NUL byte at offset 1471"),
    "UTF-16": (text(VERSES.encode("utf-16")), "bad.txt: it is UTF-16 text, not UTF-8"),
    "invalid UTF-8 at the end": (text(VERSES.encode() + b"\xc3"), "bad.txt: not UTF-8 (byte 1470)"),
    "a cut archive": (text(gzip.compress(VERSES.encode())[:90]), "bad.txt is not text: it is a gzip archive"),
    "byte order mark and Windows' line ends": (
        text(codecs.BOM_UTF8 + VERSES.replace("\n", "\r\n").encode()), TRAINS,
    ),
    "a missing field": (records('{"txt": "a"}'), "bad.jsonl:2: no field 'text'"),
    "a field given twice": (records('{"text": "a", "text": "b"}'), "bad.jsonl:2: the field 'text' is given twice"),
    "a number for text": (records('{"text": 5}'), "bad.jsonl:2: the field 'text' holds a number"),
    "a cut line": (records('{"text": "abc'), "bad.jsonl:2: not JSON"),
    "half a surrogate pair": (records('{"text": "a\\ud800b"}'), "bad.jsonl:2: the text has an unpaired surrogate"),
    "NUL in JSON": (records('{"text": "a\\u0000b"}'), "bad.jsonl:2: the text has a NUL character"),
    "invalid UTF-8 in JSON": (records(b'{"text": "\xff"}'), "bad.jsonl:2: not UTF-8 (byte"),
    "JSON 100,000 deep": (records('{"text": ' + "[" * 100_000), "bad.jsonl:2: not JSON"),
    "an integer of 5,000 digits": (records(f'{{"text": "a", "n": {"9" * 5000}}}'), "bad.jsonl:2: not JSON"),
    "one array for all": (holding('[{"text": "a"}]', "bad.jsonl"), "bad.jsonl:1: a list, not an object"),
    "Parquet that is none": (holding(b"PAR1" + bytes(99) + b"PAR1", "bad.parquet"), "bad.parquet"),
    "a kind that is not known": (holding("a,b", "bad.csv"), "bad.csv: a file of an unknown kind"),
    "an empty folder": (lambda folder: str((folder / "bad").mkdir() or "bad"), "bad: no file of a known kind"),
    "a pipe": (lambda folder: pipe(folder, "bad.txt"), "bad.txt is neither a file nor a folder"),
    "a pipe in a folder": (folder_of(pipe), "bad/bad.txt cannot be read: it is a pipe or a device"),
    "a link to itself": (lambda folder: link_to_itself(folder, "bad.txt"), "bad.txt is a link that leads nowhere"),
    "a link to itself in a folder": (folder_of(link_to_itself), "bad/bad.txt cannot be read: Too many levels"),
    "a file that is not there": (lambda folder: "bad.txt", "bad.txt does not exist"),
    "1 GB of zeros": (lambda folder: sparse(folder, "bad.txt"), "bad.txt is not text: it has a NUL byte at offset 0"),
    "a line of 1 GB in .jsonl": (
        one_line("bad.jsonl", b'{"text": "', b'"}\n'), "bad.jsonl:1: a line of more than 32 MiB",
    ),
    "a line of 1 GB in .txt": (one_line("bad.txt", b"", b""), TRAINS),
}  # fmt: skip
"""Likewise for what `data.train_path` names."""

LARGE = [case for case in DATA if "1 GB" in case]

CHILD = """
import json, os, resource, sys, threading, time

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
peak = 0

def watch():
    global peak
    while True:
        with open("/proc/self/status") as file:
            now = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        peak = max(peak, now)
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
from apt.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, time.process_time(), max(peak >> 10, 0), "torch" in sys.modules]))
"""


def run_apt(folder: Path, *arguments: str) -> tuple[list[str], list[str], tuple[int, float, int, bool]]:
    """The command in a process of its own: the lines of its standard output and of its standard error, and its exit
    code, the seconds of a core that it took from its start, the most memory of its own in MB, and whether it has
    imported torch."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env["APT_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    *out, last = done.stdout.splitlines() or [""]
    facts = json.loads(last) if last.startswith("[") else [done.returncode, 0.0, 0, False]
    return out, done.stderr.splitlines(), tuple(facts)


def refused(error: list[str], says: str) -> str:
    """What is wrong with how something is refused; "" if nothing is."""
    one_line = len(error) == 1 or (len(error) == 2 and error[1].startswith("  fix: "))
    if not one_line or not error[0].startswith("error: ") or max(map(len, error)) > 400:
        return f"not one line: {error[:5]}"
    return "" if says in error[0] else f"it says {error[0]!r}"


def profiles(folder: Path, smoke: bool) -> tuple[str, list[Result]]:
    """Each profile is refused in one line with its place, promptly, and before torch is imported."""
    results: list[Result] = []
    slowest, largest = 0.0, 0
    for case in list(PROFILES)[:: 11 if smoke else 1]:
        make, says = PROFILES[case]
        place = empty(folder)
        try:
            _, error, (code, seconds, megabytes, torch) = run_apt(place, "train", "-p", make(place))
        except subprocess.TimeoutExpired:
            results.append((case, "it does not end"))
            continue
        slowest, largest = max(slowest, seconds), max(largest, megabytes)
        problem = f"exit {code}" if code != 2 else refused(error, says)
        if seconds > SECONDS or megabytes > PROFILE_MB or torch:
            problem = problem or f"{seconds:.1f} s, {megabytes} MB, torch {'' if torch else 'not '}imported"
        results.append((case, problem))
    return f"hostile profiles: each refused, in at most {slowest:.2f} s and {largest} MB", results


def data(folder: Path) -> tuple[str, list[Result]]:
    """Each text trains, or is refused in one line with its place; and the memory stays bounded."""
    results: list[Result] = []
    largest = 0
    for case, (make, says) in DATA.items():
        place = empty(folder)
        (place / "small.yaml").write_text(SMALL)
        try:
            name = make(place)
            out, error, (code, _, megabytes, _) = run_apt(place, "train", "-p", "small.yaml", "--data.train_path", name)
        except subprocess.TimeoutExpired:
            results.append((case, "it does not end"))
            continue
        largest = max(largest, megabytes)
        if says == TRAINS:
            problem = "" if code == 0 and any(TRAINS in line for line in out) else f"exit {code}: {error[-3:]}"
        else:
            problem = f"exit {code}" if code != 2 else refused(error, says)
        if megabytes > DATA_MB:
            problem = problem or f"{megabytes} MB"
        results.append((case, problem))
    empty(folder)
    return f"hostile texts: trained on rightly or refused, in at most {largest} MB", results


@dataclass
class Meanwhile:
    """Does something once a run has read its text, before the batches of each epoch."""

    do: Callable[[], object]

    def on_epoch_start(self) -> None:
        self.do()


class OwnText(Lab):
    """A lab whose text is made once, and not made again."""

    @property
    def text(self) -> Path:
        return self.folder / "own.txt"

    def config(self) -> dict[str, Any]:
        config = super().config()
        config["data"]["train_path"] = str(self.text)
        return config


def text_that_changes(folder: Path) -> tuple[str, list[Result]]:
    """A run works on tokens of its own: what becomes of the text matters when it is resumed. One that is gone is named
    and refused, one that is another is told, and with the old one again the end is the one it would have been."""
    lab = OwnText(empty(folder))
    text, verses = lab.text, VERSES
    text.write_text(verses)
    assert lab.train(lab.folder / "whole")[0] == 0

    def ends(what: str, do: Callable[[], object]) -> Iterator[Result]:
        run = lab.folder / what
        code, said = lab.train(run, lab.steps // 2, None, Meanwhile(do))
        yield f"{what} in mid-run", "" if code == 143 else f"exit {code}: {said}"
        code, said = lab.train(run)
        if what == "deleted":
            yield f"{what}, resumed", "" if code == 2 and str(text) in said and "\n" not in said else f"{code}: {said}"
            text.write_text(verses)
            code, said = lab.train(run)
        else:
            yield f"{what}, resumed", "" if code == 0 else f"exit {code}: {said}"
            text.write_text(verses)
            return
        same = code == 0 and end_of(run) == end_of(lab.folder / "whole")
        yield f"{what}, put back, resumed", "" if same else f"exit {code}, or the end is another: {said}"

    results = [
        *ends("deleted", lambda: text.unlink(missing_ok=True)),
        *ends("changed", lambda: text.write_text(verses[::-1])),
    ]
    return "a text deleted or changed in mid-run, and at its resume", results


def empty(folder: Path) -> Path:
    """`folder`, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
