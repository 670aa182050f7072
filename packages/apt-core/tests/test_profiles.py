"""Profiles: finding, extending, overriding, checking, and what is said of a slip."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.catalogue import WORDS_OF_OTHERS
from apt.core.config import RunConfig
from apt.core.errors import ConfigError
from apt.core.profiles import (
    MAX_EXTENDS,
    SHIPPED,
    dump_yaml,
    find_profile,
    list_profiles,
    load_profile_data,
    parse_override,
    resolve,
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a profile into the working folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "tiny.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def refusal(source: Any, overrides: dict[str, Any] | None = None) -> list[str]:
    """The lines with which a profile is refused."""
    with pytest.raises(ConfigError) as caught:
        resolve(source, overrides)
    return str(caught.value).splitlines()


# What ships


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_plain_yaml_1_1(path: Path) -> None:
    profile, said = resolve(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    if "extends" in said:
        base = resolve(said.pop("extends"))
        assert flat(profile.data) == flat(base.data) | flat(said)
    else:
        assert said == profile.data
    assert profile.config.name == path.stem
    assert profile.config.description
    if profile.config.smaller_profile is not None:
        assert resolve(profile.config.smaller_profile).config.smaller_profile != path.stem


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_list_profiles() -> None:
    assert dict(list_profiles()).keys() >= {"tiny_debug", "shakespeare_char"}
    assert all(description for _, description in list_profiles())


def test_tiny_debug() -> None:
    config = resolve("tiny_debug").config
    assert (config.training.max_epochs, config.data.dataset, config.model.vocab_size) == (3, "stdlib", 256)
    assert config.model.sections["tva"] == {"r": 4, "s": 1, "tau": 0.18}


def test_shakespeare_char_is_the_published_setting() -> None:
    config = resolve("shakespeare_char").config
    model, training = config.model, config.training
    assert (model.max_seq_len, model.num_layers, model.num_heads, model.d_model, model.dropout) == (64, 4, 4, 128, 0)
    assert (training.batch_size, training.max_steps, training.warmup_steps, training.eval_every) == (12, 2000, 100, 250)
    assert (training.learning_rate, training.min_learning_rate, training.beta2) == (1e-3, 1e-4, 0.99)
    assert (config.data.tokenizer, config.data.val_fraction) == ("char", 0.1)


def test_gpt5_moe_reasoning_is_the_full_size() -> None:
    config = resolve("gpt5_moe_reasoning").config
    model, training = config.model, config.training
    assert (model.d_model, model.num_heads, model.num_layers, model.d_ff) == (768, 12, 24, 3072)
    assert (model.vocab_size, model.max_seq_len, model.attention_name) == (50257, 2048, "tva_default")
    assert (model.router_name, model.align_name) == ("topk_moe", "bistate_default")
    assert model.sections == {
        "tva": {"r": 4, "s": 1, "tau": 0.18},
        "moe": {"enabled": True, "experts": 64, "top_k": 2, "capacity": 1.25, "balance_loss": 0.01},
        "bistate": {"alpha": 0.35, "beta": 0.20, "tau_align": 0.15},
    }
    assert (training.batch_size, training.max_epochs, training.learning_rate) == (32, 50, 3e-5)
    assert (training.warmup_steps, training.weight_decay, training.gradient_clip) == (1500, 0.015, 1.0)
    assert training.mixed_precision is True
    assert config.plugins == ("moe", "align", "routing", "voter")
    assert config.schedules == {
        "enable_moe_at_epoch": 2,
        "enable_align_at_epoch": 3,
        "route_temp": {"start": 1.5, "end": 0.8, "by": "epoch"},
        "moe_capacity": {"start": 1.5, "end": 1.1, "by": "epoch", "from_epoch": 2},
    }
    assert (config.data.dataset, config.data.tokenizer, config.data.vocab_size) == ("stdlib", "bpe", 50257)
    assert config.smaller_profile == "moe_reasoning_small"


def test_moe_reasoning_small_is_the_same_curriculum() -> None:
    full, small = resolve("gpt5_moe_reasoning").config, resolve("moe_reasoning_small").config
    assert (small.schedules, small.plugins, small.smaller_profile) == (full.schedules, full.plugins, None)
    assert small.model.sections == full.model.sections | {"moe": {**full.model.sections["moe"], "experts": 8}}
    assert (small.training.max_epochs, small.data.tokenizer, small.model.vocab_size) == (5, "byte", 256)
    assert (small.training.weight_decay, small.training.gradient_clip) == (0.015, 1.0)
    assert small.training.mixed_precision == "auto"


# Finding


def test_by_path_else_by_name(write: Write) -> None:
    shipped = SHIPPED / "tiny_debug.yaml"
    assert find_profile("tiny_debug") == find_profile("tiny_debug.yaml") == shipped
    assert find_profile(shipped) == shipped
    write("name: mine\n", "tiny_debug.yaml")
    assert resolve("tiny_debug.yaml").config.name == "mine"
    assert resolve("tiny_debug").config.name == "tiny_debug"
    Path("shakespeare_char").mkdir()
    assert find_profile("shakespeare_char").parent == SHIPPED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_debgu", "there is no profile 'tiny_debgu'; did you mean 'tiny_debug'? give a path, or one of "),
        ("elsewhere/tiny_debug.yaml", "did you mean 'tiny_debug'?"),
        ("nothing_like_it", "shakespeare_char, tiny_debug"),
        ("x" * 5000, "there is no profile"),
        ("a\0b", "there is no profile"),
        (os.curdir, "profile '.' is a folder"),
        ("", "the name of the profile is empty; give a path, or one of "),
    ],
)
def test_not_found(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_profile(name)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unreadable(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("name: x\n")

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refusal("tiny.yaml") == ["tiny.yaml: cannot be read: Permission denied"]


def test_outside_the_working_folder_the_whole_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("nmae: x\n")
    monkeypatch.chdir("/")
    (line,) = refusal(path)
    assert line.startswith(str(path).removeprefix("/"))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert refusal("../p.yaml") == ["../p.yaml:1: nmae: unknown key; did you mean 'name'?"]


# extends


def test_extends_merges_mappings_and_replaces_the_rest(write: Write) -> None:
    write("name: base\nplugins: [a, b]\nmodel:\n  d_model: 64\n  tva: {r: 4, s: 1}\n", "base/base.yaml")
    write("extends: base.yaml\nplugins: [c]\nmodel:\n  tva:\n    r: 2\n", "base/middle.yaml")
    name = write("extends: base/middle.yaml\nmodel:\n  num_heads: 8\n")
    profile = resolve(name)
    assert profile.data == {
        "name": "base", "plugins": ["c"], "model": {"d_model": 64, "num_heads": 8, "tva": {"r": 2, "s": 1}},
    }  # fmt: skip
    assert profile.origins["model", "d_model"] == "base/base.yaml:4"
    assert profile.origins["model", "tva", "r"] == "base/middle.yaml:5"
    assert profile.origins["model", "tva", "s"] == "base/base.yaml:5"
    assert profile.origins["plugins", 0] == "base/middle.yaml:2"
    assert profile.origins["model", "num_heads"] == "tiny.yaml:3"
    assert profile.source == "tiny.yaml"


def test_extends_a_name_and_from_a_dict(write: Write) -> None:
    assert resolve({"extends": "tiny_debug", "name": "x"}).config.model.d_model == 64
    name = write("extends: tiny_debug\ntraining: {max_epochs: 0}\n")
    assert refusal(name) == ["tiny.yaml:2: training.max_epochs: expected a whole number greater than 0, got 0"]
    assert resolve({"extends": name}, {"training.max_epochs": 1}).config.training.batch_size == 16


def test_errors_of_the_extended_profile_name_its_line(write: Write) -> None:
    write("name: x\nmodel:\n  d_modle: 3\n", "base.yaml")
    assert refusal(write("extends: base.yaml\n")) == [
        "base.yaml:3: model.d_modle: unknown key; did you mean 'd_model'?"
    ]
    write("a: [\n", "base.yaml")
    assert refusal("tiny.yaml")[0].startswith("base.yaml:")


def test_extends_refused(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("name: b\nextends: a.yaml\n", "b.yaml")
    assert refusal("a.yaml") == [
        "b.yaml:2: extends: runs in a circle: a.yaml -> b.yaml -> a.yaml; take one 'extends' out"
    ]
    assert "circle" in refusal(write("extends: tiny.yaml\n"))[0]
    assert "circle" in refusal({"extends": "a.yaml"})[0]
    assert refusal(write("extends: tiny_debgu\n"))[0].startswith(
        "tiny.yaml:1: extends: there is no profile 'tiny_debgu'; did"
    )
    assert refusal(write("extends: [a, b]\n")) == [
        "tiny.yaml:1: extends: expected the path or name of one profile, got a list"
    ]
    write("name: end\n", "0.yaml")
    for n in range(1, MAX_EXTENDS + 2):
        write(f"extends: {n - 1}.yaml\n", f"{n}.yaml")
    assert resolve(f"{MAX_EXTENDS}.yaml").config.name == "end"
    assert "more than 10" in refusal(f"{MAX_EXTENDS + 1}.yaml")[0]


plain = st.recursive(
    st.integers(-9, 9) | st.text("ab", max_size=2) | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abc"), plain, max_size=3)


def merged(base: Any, top: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: merged(base[key], value) if key in base else value for key, value in top.items()}


@settings(max_examples=60, deadline=None)
@given(base=mappings, top=mappings)
def test_every_value_knows_the_file_it_is_from(tmp_path_factory: pytest.TempPathFactory, base: Any, top: Any) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    (folder / "base.yaml").write_text(dump_yaml(base))
    (folder / "top.yaml").write_text(dump_yaml({"extends": "base.yaml"} | top))
    data, origins = load_profile_data(folder / "top.yaml")
    assert data == merged(base, top)

    def check(value: Any, path: tuple[str | int, ...], above: Any) -> None:
        """`above` is what the extending file has at `path`, if it has anything there."""
        if path:
            assert Path(origins[path].rpartition(":")[0]).name == ("base.yaml" if above is missing else "top.yaml")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            both = isinstance(above, dict | list) and type(above) is type(value)
            found = above[key] if both and (isinstance(above, list) or key in above) else missing
            check(inner, (*path, key), found)

    missing = object()
    check(data, (), top)


# Overrides


def test_overrides(write: Write) -> None:
    name = write("model:\n  d_model: 64\n  tva: {r: 4}\n")
    overrides = {"model.attention_name": "mha", "training.learning_rate": 3e-5, "model.tva.s": 0, "plugins": ("a",)}
    profile = resolve(name, overrides)
    assert profile.config.model.attention_name == "mha"
    assert profile.config.training.learning_rate == 3e-5
    assert profile.config.plugins == ("a",)
    assert profile.data == {
        "model": {"d_model": 64, "tva": {"r": 4, "s": 0}, "attention_name": "mha"},
        "training": {"learning_rate": 3e-5}, "plugins": ["a"],
    }  # fmt: skip
    for path in [("model", "tva", "s"), ("training",), ("training", "learning_rate"), ("plugins",), ("plugins", 0)]:
        assert profile.origins[path] == "command line"
    assert profile.origins["model", "tva"] == "tiny.yaml:3"
    assert resolve(name, {"model.tva": {}}).data["model"]["tva"] == {}


def test_bad_overrides_are_named_as_options(write: Write) -> None:
    name = write("name: x\ntraining:\n  batch_size: 2\n")
    assert refusal(name, {"model.atention_name": "x"}) == [
        "command line: --model.atention_name: unknown key; did you mean 'attention_name'?"
    ]
    assert refusal(name, {"modle.d_model": 3}) == ["command line: --modle: unknown key; did you mean 'model'?"]
    assert refusal(name, {"training.batch_size": "many"}) == [
        "command line: --training.batch_size: expected a whole number greater than 0, got 'many'"
    ]
    assert refusal(name, {"training.batch_size.x": 1, "model..d_model": 2}) == [
        "command line: --training.batch_size.x: training.batch_size is 2, not a section; "
        "override training.batch_size itself",
        "command line: --model..d_model: not a dotted key; write it as in --training.batch_size",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5), ("16", 16), ("true", True), ("~", None), ("", None), ("yes", "yes"), ("12:30:00", "12:30:00"),
        ("[a, 1]", ["a", 1]), ("{r: 2}", {"r": 2}), ('"3"', "3"), (" '' ", ""), ("a: b", "a: b"), ("*.txt", "*.txt"),
        ("# x", "# x"), ("!x", "!x"), ("&x", "&x"), ("C:\\new folder\\a.txt", "C:\\new folder\\a.txt"), ("- a", "- a"),
        ("@x", "@x"), ("two\nlines", "two\nlines"), ("naïve.txt", "naïve.txt"), (" padded ", " padded "),
    ],
)  # fmt: skip
def test_parse_override(text: str, value: Any) -> None:
    found = parse_override("a.b", text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["[a", "{a: 1", "'x", '"x', "[a] b", "9" * 40, "\udc80", "{a: 1, a: 2}", "[!!str x]"])
def test_parse_override_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^command line: --a\.b: ") as caught:
        parse_override("a.b", text)
    assert "\n" not in str(caught.value)


# Sources


def test_a_dict_is_left_alone_and_paths_become_text(tmp_path: Path) -> None:
    source = {"data": {"train_path": tmp_path}, "plugins": ["a"], "model": {"tva": {"r": 2}}}
    profile = resolve(source, {"model.tva.r": 4})
    assert profile.config.data.train_path == str(tmp_path)
    assert source == {"data": {"train_path": tmp_path}, "plugins": ["a"], "model": {"tva": {"r": 2}}}
    assert refusal({"modle": {}}) == ["config: modle: unknown key; did you mean 'model'?"]
    assert refusal({"model": {3: {}}}) == ["config: the key 3 is no string; put it in quotes"]


def test_a_config_resolves_to_itself() -> None:
    config = RunConfig.model_validate({"model": {"d_model": 64, "tva": {"r": 2}}, "plugins": ["a"]})
    assert resolve(config).config == config
    changed = resolve(config, {"model.tva.r": 4}).config
    assert (changed.model.sections, changed.model.d_model) == ({"tva": {"r": 4}}, 64)
    assert config.model.sections == {"tva": {"r": 2}}


def test_what_is_kept_of_a_run_resolves_to_the_same(tmp_path: Path) -> None:
    for name, _ in list_profiles():
        odd = {"training.learning_rate": 3e-17, "training.min_learning_rate": 0.0, "name": "1e3"}
        config = resolve(name, odd).config
        text = dump_yaml(config.model_dump(mode="json"))
        (tmp_path / "profile.yaml").write_text(text)
        assert resolve(tmp_path / "profile.yaml").config == config
        assert RunConfig.model_validate(yaml.safe_load(text)) == config


# What is wrong


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("model:\n  d_modle: 3\n", ["2: model.d_modle: unknown key; did you mean 'd_model'?"]),
        ("batch_size: 3\n", ["1: batch_size: unknown key; did you mean 'training.batch_size'?"]),
        ("vocab_size: 3\n", ["1: vocab_size: unknown key; did you mean 'model.vocab_size' or 'data.vocab_size'?"]),
        ("moe: {enabled: true}\n", ["1: moe: unknown key; did you mean 'model.moe'?"]),
        ("training:\n  d_model: 3\n", ["2: training.d_model: unknown key; did you mean 'model.d_model'?"]),
        ("model:\n  plugins: []\n", ["2: model.plugins: unknown key; did you mean 'plugins' at the top level?"]),
        ("model:\n  zzz: 3\n", ["2: model.zzz: unknown key; 'apt profile schema' lists the keys"]),
        ("training:\n  lr: 3\n", ["2: training.lr: unknown key; did you mean 'training.learning_rate'?"]),
        ("training:\n  block_size: 3\n", ["2: training.block_size: unknown key; did you mean 'model.max_seq_len'?"]),
        ("hardware:\n  zzz: 3\n", ["2: hardware.zzz: unknown key; 'apt profile schema' lists the keys"]),
        ("model:\n  moe: true\n", ["2: model.moe: expected a mapping, got true"]),
        ("checkpoint:\n  evry: 3\n", ["2: checkpoint.evry: unknown key; did you mean 'every'?"]),
        (
            "training:\n  batch_size: many\n",
            ["2: training.batch_size: expected a whole number greater than 0, got 'many'"],
        ),
        ("training:\n  batch_size: 1.5\n", ["2: training.batch_size: expected a whole number greater than 0, got 1.5"]),
        (
            "training:\n  batch_size: true\n",
            ["2: training.batch_size: expected a whole number greater than 0, got true"],
        ),
        ("model:\n  dropout: 1\n", ["2: model.dropout: expected a number at least 0 and less than 1, got 1"]),
        ("training:\n  learning_rate: .nan\n", ["2: training.learning_rate: expected a finite number, got .nan"]),
        ("model:\n  tva: {tau: .nan}\n", ["2: model.tva.tau: expected a finite number, got .nan"]),
        ("data:\n  own: {a: [1, {b: .inf}]}\n", ["2: data.own.a[1].b: expected a finite number, got .inf"]),
        ("training:\n  learning_rate: -.inf\n", ["2: training.learning_rate: expected a finite number, got -.inf"]),
        (
            "training:\n  lr_schedule: cosin\n",
            [
                "2: training.lr_schedule: expected one of 'cosine', 'linear', 'constant', got 'cosin'; "
                "did you mean 'cosine'?"
            ],
        ),
        (
            "training:\n  mixed_precision: bf61\n",
            [
                "2: training.mixed_precision: expected one of 'auto', 'bf16', 'off', or true or false, got 'bf61'; "
                "did you mean 'bf16'?"
            ],
        ),
        ("name: 2024\n", ["1: name: expected a string, got 2024; put it in quotes"]),
        ("plugins: [a,\n  3]\n", ["2: plugins[1]: expected a string, got 3; put it in quotes"]),
        ("plugins: moe\n", ["1: plugins: expected a list, or nothing, got 'moe'"]),
        ("model:\nname: x\n", ["1: model: expected a mapping, got nothing"]),
        (
            "model:\n  d_model: 10\n  num_heads: 4\n",
            ["1: model: d_model 10 is not divisible by num_heads 4; heads that fit: 1, 2, 5"],
        ),
        (
            "schedules:\n  enabel_moe_at_epoch: 3\n",
            ["2: schedules.enabel_moe_at_epoch: unknown key; did you mean 'enable_moe_at_epoch'?"],
        ),
        (
            "schedules:\n  t: {start: 1,\n   curv: 2}\n",
            [
                "2: schedules.t: 'end' is missing; write {start: ..., end: ...}",
                "3: schedules.t.curv: unknown key; did you mean 'curve'?",
            ],
        ),
        ("schedules: 3\n", ["1: schedules: expected a mapping, got 3"]),
        (
            "training:\n  seed: " + "y" * 500 + "\n",
            ["2: training.seed: expected a whole number at least 0 and at most 4294967295, got '" + "y" * 56 + "..."],
        ),
    ],
)
def test_problems_name_line_key_and_fix(write: Write, text: str, lines: list[str]) -> None:
    assert refusal(write(text)) == [f"tiny.yaml:{line}" for line in lines]


def test_the_words_of_other_trainers_lead_to_keys_that_there_are() -> None:
    for word, name in WORDS_OF_OTHERS.items():
        section, key = name.split(".")
        fields = RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert key in fields, f"{word} leads to {name}, which is no key"
        assert word not in fields, f"{word} is a key itself"


def test_all_problems_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = (
        "training:\n  batch_size: x\n  d_model: 3\nmodel:\n  zzz: 1\n  d_modle: 3\nscheduels: {}\nschedules: {a: b}\n"
    )
    assert [line.split(": ")[1] for line in refusal(write(text))] == [
        "training.batch_size", "training.d_model", "model.zzz", "model.d_modle", "scheduels", "schedules.a",
    ]  # fmt: skip
    lines = refusal(write("".join(f"k{n}: 1\n" for n in range(14))))
    assert (len(lines), lines[9], lines[10]) == (
        11,
        "tiny.yaml:10: k9: unknown key; 'apt profile schema' lists the keys",
        "and 4 more",
    )


def test_a_single_problem_has_its_hint_apart(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(write("model: {d_modle: 3}\n"))
    assert caught.value.message == "tiny.yaml:1: model.d_modle: unknown key"
    assert caught.value.hint == "did you mean 'd_model'?"
