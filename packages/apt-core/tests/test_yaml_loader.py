"""YAML 1.2 in, YAML that 1.1 and 1.2 read alike out."""

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import ConfigError
from apt.core.yaml_dumper import dump_yaml
from apt.core.yaml_loader import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_LINE,
    MAX_NODES,
    load_value,
    load_yaml,
    resolve_scalar,
)


def load(text: str | bytes) -> dict[str, Any]:
    return load_yaml(text, "p.yaml")[0]


def refusal(text: str | bytes) -> str:
    """The one line with which a document is refused, promptly."""
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, "p.yaml")
    assert time.process_time() - started < 3
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


# Scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5), ("3.0e-5", 3e-5), ("1E5", 1e5), ("-.5", -0.5), ("+1.", 1.0), ("1e+16", 1e16), ("0.18", 0.18),
        ("3", 3), ("-3", -3), ("+3", 3), ("010", 10), ("0o17", 15), ("0x1f", 31), ("0xFF", 255),
        ("true", True), ("True", True), ("FALSE", False), ("null", None), ("~", None), ("", None), ("NULL", None),
        ("yes", "yes"), ("on", "on"), ("No", "No"), ("y", "y"), ("12:30:00", "12:30:00"), ("1_000", "1_000"),
        ("0b11", "0b11"), ("-0x1f", "-0x1f"), ("0o8", "0o8"), ("2024-01-01", "2024-01-01"), ("e5", "e5"), (".", "."),
        ("1e", "1e"), ("tRue", "tRue"), ("=", "="), ("1.2.3", "1.2.3"), ("nan", "nan"), ("inf", "inf"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    for found in (resolve_scalar(text), load(f"k: {text}\n")["k"]):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(("text", "value"), [(".inf", math.inf), ("-.INF", -math.inf), ("+.Inf", math.inf)])
def test_infinities(text: str, value: float) -> None:
    assert load(f"k: {text}")["k"] == value


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number(text: str) -> None:
    assert math.isnan(load(f"k: {text}")["k"])


@pytest.mark.parametrize("text", ["'3e-5'", '"3e-5"', "|-\n  3e-5", ">-\n  3e-5"])
def test_quoted_and_block_scalars_are_strings(text: str) -> None:
    assert load(f"k: {text}")["k"] == "3e-5"


def test_long_integers_are_refused() -> None:
    assert load("k: " + "9" * MAX_DIGITS)["k"] == int("9" * MAX_DIGITS)
    assert refusal("a: 1\nk: " + "9" * (MAX_DIGITS + 1)).startswith("p.yaml:2: an integer of 31 digits")
    assert "digits" in refusal("k: " + "9" * 5000)
    assert "digits" in refusal("k: 0x" + "f" * 5000)


@given(st.floats(allow_nan=False))
def test_every_float_that_python_writes_is_read_back(value: float) -> None:
    text = repr(value).replace("inf", ".inf")
    found = resolve_scalar(text)
    assert isinstance(found, float)
    assert (found, math.copysign(1, found)) == (value, math.copysign(1, value))


# Structure and lines


def test_lines() -> None:
    text = "# a comment\nmodel:\n  d_model: 64   # width\n\n  tva: {r: 4,\n        s: 1}\n"
    text += "plugins:\n  - moe\n  - [a,\n     b]\n"
    data, lines = load_yaml(text, "p.yaml")
    assert data == {"model": {"d_model": 64, "tva": {"r": 4, "s": 1}}, "plugins": ["moe", ["a", "b"]]}
    assert lines == {
        ("model",): 2, ("model", "d_model"): 3, ("model", "tva"): 5, ("model", "tva", "r"): 5, ("model", "tva", "s"): 6,
        ("plugins",): 7, ("plugins", 0): 8, ("plugins", 1): 9, ("plugins", 1, 0): 9, ("plugins", 1, 1): 10,
    }  # fmt: skip


def test_byte_order_mark_and_windows_line_ends() -> None:
    text = "\ufeffa: 1\r\nb:\r\n  c: x\r\n"
    assert load(text) == load(text.encode()) == {"a": 1, "b": {"c": "x"}}
    assert load_yaml(text, "p")[1]["b", "c"] == 3


def test_aliases_are_copies() -> None:
    data, lines = load_yaml("a: &x {b: [1]}\nc: *x\nd: &y text\ne: *y\n", "p.yaml")
    assert data == {"a": {"b": [1]}, "c": {"b": [1]}, "d": "text", "e": "text"}
    data["a"]["b"].append(2)
    assert data["c"] == {"b": [1]}
    assert lines["c",] == 2 and ("c", "b") not in lines


def test_a_value_need_not_be_a_mapping() -> None:
    assert load_value("[1, {a: yes}]", "p") == [1, {"a": "yes"}]
    assert load_value("", "p") is None
    with pytest.raises(ConfigError, match=r"^p:1: "):
        load_value("[1", "p")


# What is refused


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "got nothing"),
        ("# only a comment\n", 1, "got nothing"),
        ("---\n", 1, "got nothing"),
        ("- a\n", 1, "got a list"),
        ("text\n", 1, "got a single value"),
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice; line 1"),
        ("m: {a: 1,\n  'a': 2}\n", 2, "'a' is given twice"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("%YAML 1.1\n---\na: 1\n", 2, "YAML 1.2"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", 2, "tag"),
        ("a: 1\nb: !x {}\n", 2, "the tag !x"),
        ("a: !!str 3\n", 1, "tag"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "extends"),
        ("a: 1\n? [b]\n: 2\n", 2, "a list or mapping as a key"),
        ("a: 1\n3: x\n", 2, "3 as a key"),
        ("true: x\n", 1, "True as a key"),
        ("a: *x\n", 1, "no anchor"),
        ("a:\n  b: &x\n    - *x\n", 3, "inside what it stands for"),
        ("a:\n\tb: 1\n", 2, "a tab where YAML wants spaces"),
        ("a: b\n\tc: d\n", 2, "a tab"),
        ("a: 1\n  b: 2\n", 2, "indentation"),
        ("a: 1\nb c\n", 2, "could not find expected ':'"),
        ("a: 1\nb: 'x\nc: 2\n", 2, "quotation mark"),
        ("a: [1, 2\nb: 3\n", 2, "flow sequence"),
        ("a: @x\n", 1, "'@'"),
        ("a: 1\nb: x\0y\n", 2, "U+0000"),
        ("a: 1\nb: x\x07y\n", 2, "U+0007"),
        ("a: 1\nb: x\x1b[31my\n", 2, "U+001B"),
        ("a: '\ud800'\n", 1, "U+D800"),
        ('a: 1\nb: "\\0"\n', 2, "NUL"),
        ('a: "\\ud800"\n', 1, "surrogate"),
        (b"a: 1\nb: caf\xe9\n", 2, "0xe9 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), 1, "UTF-8"),
    ],
)
def test_refused_with_the_line(text: str | bytes, line: int, words: str) -> None:
    message = refusal(text)
    assert message.startswith(f"p.yaml:{line}: ")
    assert words in message


def test_odd_escapes_are_refused() -> None:
    assert refusal('a: "\\U00110000"').startswith("p.yaml")
    assert refusal("%YAML 1." + "1" * 5000 + "\n---\na: 1").startswith("p.yaml")


# Bounds


def test_size() -> None:
    text = "a: 1\n" + "#\n" * ((MAX_BYTES - 5) // 2)
    assert load(text) == {"a": 1}
    assert "KiB" in refusal(text + "#\n")
    assert "KiB" in refusal(b"\0" * (MAX_BYTES + 1))
    assert load("a: " + "x" * (MAX_LINE - 3))
    assert refusal("a: 1\nb: " + "x" * MAX_LINE).startswith("p.yaml:2: a line of")


def nested(levels: int) -> str:
    return "".join("  " * level + "a:\n" for level in range(levels - 1)) + "  " * (levels - 1) + "a: 1\n"


def test_depth() -> None:
    assert load(nested(MAX_DEPTH))
    assert refusal(nested(MAX_DEPTH + 1)).startswith(f"p.yaml:{MAX_DEPTH + 1}: nested more than")
    anchored = "x: &x " + "[" * 30 + "]" * 30 + "\n"
    assert load(anchored + "y: " + "[" * 19 + "*x" + "]" * 19)
    assert "nested" in refusal(anchored + "y: " + "[" * 20 + "*x" + "]" * 20)


def test_nodes() -> None:
    # The top mapping, its key and the list are three nodes.
    assert len(load("a:\n" + "- 1\n" * (MAX_NODES - 3))["a"]) == MAX_NODES - 3
    assert refusal("a:\n" + "- 1\n" * (MAX_NODES - 2)).startswith(f"p.yaml:{MAX_NODES - 1}: more than 10,000 values")


def test_aliases_count_in_full() -> None:
    # Ten times ten, eight levels: a hundred million values in nine lines.
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    assert refusal(bomb).startswith("p.yaml:4: more than 10,000 values")
    thousand = "a: &a [" + "x, " * 1000 + "]\n"
    assert load(thousand + "b: [" + "*a, " * 8 + "]")
    assert "10,000" in refusal(thousand + "b: [" + "*a, " * 9 + "]")


@pytest.mark.parametrize(
    "unit", ["[", "{", "- ", "? ", "[\n", "a: [", "&a ", "*a ", "!", "!!", "a:\n ", ": ", "'", '"']
)
def test_repeated_marks_are_refused_promptly(unit: str) -> None:
    refusal(unit * (MAX_LINE // len(unit)))


@pytest.mark.parametrize(
    "unit", ["x ", "x\n ", "\n", "#\n", "%FOO\n", "'' ", "\\n", "a", "é", "\u2028", ",", "[],", "{},", "a: 1\n"]
)
@pytest.mark.parametrize("start", ["", "a: ", "a: '", 'a: "', "a: |\n ", "a: [", "a: {"])
def test_long_documents_are_read_or_refused_promptly(start: str, unit: str) -> None:
    long = unit * (60_000 // len(unit))
    text = start + "\n ".join(long[n : n + 10_000] for n in range(0, len(long), 10_000))
    started = time.process_time()
    try:
        load_yaml(text, "p.yaml")
    except ConfigError as error:
        assert str(error).startswith("p.yaml")
    assert time.process_time() - started < 3


FRAGMENTS = ["a: ", "- ", "&a ", "*a", "<<: ", "!t ", "[", "]", "{", "}", "\n", "  ", "'", "1"]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.text("ab01:-?[]{},#&*!|>'\"%@`~<. \n\t\\x\0eou", max_size=40),
        st.lists(st.sampled_from(FRAGMENTS)).map("".join),
    )
)  # fmt: skip
def test_anything_is_read_or_refused(text: str | bytes) -> None:
    try:
        data, lines = load_yaml(text, "p.yaml")
    except ConfigError as error:
        assert str(error).startswith("p.yaml")
        return
    dump_yaml(data)
    for path, line in lines.items():
        value: Any = data
        for key in path:
            value = value[key]
        assert line >= 1


# Writing

words = st.sampled_from([
    "yes", "No", "on", "OFF", "y", "true", "null", "~", "", "3e-5", "1e3", "0o17", "0x1f", "017", "1_000", "12:30:00",
    "2024-01-01", ".inf", ".nan", "<<", "=", "a: b", "a #b", "- a", "a\nb", " a", "a ", "a  b", "[a]", "{a}", "*a",
    "!a", "%a", "@a", "`a", "'", '"', "\\", "a,b", "é", "\x85", "\u2028", "\ufeff", "\uffff", "\x7f", "\x1b", "😀",
    "a:", ":a", "?", "? a", "---", "...", "|", ">", "path/to/file.txt", "../x", "./x", "C:\\x", "-", "_", "/", "#a",
    "&a", "\t",
])  # fmt: skip
strings = words | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(strings, values, max_size=5))
def test_what_is_written_reads_alike_in_both_versions(data: dict[str, Any]) -> None:
    text = dump_yaml(data)
    for found in (load(text), load(text.encode()), yaml.safe_load(text)):
        assert found == data
        assert repr(found) == repr(data)  # 1, 1.0 and True are equal, their spellings are not


def test_how_it_reads() -> None:
    data = {
        "name": "tiny",
        "model": {"tva": {"tau": 0.18}, "moe": {}},
        "lr": 3e-5,
        "big": 1e16,
        "plugins": ("moe", "on"),
    }
    assert dump_yaml(data) == (
        "name: tiny\nmodel:\n  tva:\n    tau: 0.18\n  moe: {}\nlr: 3.0e-05\nbig: 1.0e+16\n"
        'plugins: [moe, "on"]\n'
    )  # fmt: skip
    assert dump_yaml({}) == "{}\n"


def test_what_is_no_number_is_written() -> None:
    text = dump_yaml({"a": math.nan, "b": math.inf, "c": -math.inf})
    for found in (load(text), yaml.safe_load(text)):
        assert math.isnan(found["a"]) and found["b"] == math.inf and found["c"] == -math.inf


@pytest.mark.parametrize("data", [{"a": object()}, {"a": {3: 1}}, {"a": [b"x"]}, {"a": [{1: 2}]}, {"a": {1, 2}}])
def test_only_plain_data_is_written(data: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        dump_yaml(data)
