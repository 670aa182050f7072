"""How the conformance kit runs: what passes, fails, is skipped or expected, and that nothing goes unnoticed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from kit_references import PlainAttention, PlainAttentionLayer, PlainFFN, PlainFFNLayer
from torch import Tensor, nn

from apt.core.catalogue import KINDS
from apt.core.errors import ConfigError, DeviceError, ProviderError
from apt.testing import Case, CheckFailure, cases, checks_of, record
from apt.testing.run import TAKE_OUT, isolated, require_count

UNCONDITIONAL = {
    "attention": 38,
    "ffn": 29,
    "router": 30,
    "align": 14,
    "retrieval": 11,
    "voter": 10,
    "quant": 12,
    "dataset": 9,
    "tokenizer": 12,
    "tracker": 10,
}
"""How many checks every provider of a kind has to run: one that is taken out has to be taken out here too."""


class NoDropoutLayer(PlainFFNLayer):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x))


class NoDropout(PlainFFN):
    Layer = NoDropoutLayer


class FullPassesAlone(PlainAttentionLayer):
    capabilities = frozenset({"weights"})


class Modest(PlainAttention):
    weights_layout = None  # type: ignore[assignment]
    Layer = FullPassesAlone


def case_of(kind: str, provider: Any, check: str, **options: Any) -> Case:
    return next(case for case in cases(kind, provider, **options) if case.check.name == check)


def outcome(kind: str, provider: Any, check: str, **options: Any) -> tuple[str, str]:
    result = case_of(kind, provider, check, **options).run()
    return result.outcome, result.message


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_checks_does_not_shrink(kind: str) -> None:
    assert sum(check.is_unconditional for check in checks_of(kind).values()) == UNCONDITIONAL[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_says_what_it_proves_and_why(kind: str) -> None:
    for check in checks_of(kind).values():
        assert len(check.summary) > 60, check.name
        assert any(sign in check.summary for sign in (": ", "; ", ". ")), check.name


def test_a_correct_provider_passes_and_a_wrong_one_is_told_why() -> None:
    assert outcome("ffn", PlainFFN, "dropout_acts") == ("ok", "")
    failed = outcome("ffn", NoDropout, "dropout_acts")
    assert failed == ("FAILED", "dropout=0.5 drops nothing in training: hand it to the layer")


def test_an_expected_failure_has_to_fail() -> None:
    expected = {"dropout_acts": "it has nothing to drop"}
    assert outcome("ffn", NoDropout, "dropout_acts", expected_failures=expected) == (
        "expected",
        expected["dropout_acts"],
    )
    kind, message = outcome("ffn", PlainFFN, "dropout_acts", expected_failures=expected)
    assert kind == "FAILED"
    assert message.endswith(f"passes; {TAKE_OUT}")


def test_an_expected_failure_that_is_skipped_is_stale() -> None:
    kind, message = outcome("attention", Modest, "cache_one_by_one", expected_failures={"cache_one_by_one": "slow"})
    assert kind == "FAILED"
    assert "is skipped" in message


def test_a_class_may_carry_its_expected_failures() -> None:
    class Known(NoDropout):
        expected_failures = {"dropout_acts": "it has nothing to drop"}  # noqa: RUF012

    assert outcome("ffn", Known, "dropout_acts")[0] == "expected"


def test_an_expected_failure_of_no_check_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no check 'dropout_act'.*did you mean 'dropout_acts'"):
        cases("ffn", PlainFFN, {"dropout_act": "a slip"})
    with pytest.raises(ConfigError, match=r"no provider kind 'fnn'.*did you mean 'ffn'"):
        cases("fnn", PlainFFN)
    with pytest.raises(DeviceError):
        cases("ffn", PlainFFN, device="abacus")


def test_what_a_provider_cannot_do_is_skipped_with_its_reason() -> None:
    found = outcome("attention", Modest, "cache_one_by_one")
    assert found == ("skipped", "it does not claim 'cache' in its capabilities")
    assert outcome("attention", Modest, "equals_plain_softmax")[0] == "skipped"
    assert outcome("attention", Modest, "causality") == ("ok", "")


def test_what_may_be_refused_is_skipped_and_what_may_not_fails() -> None:
    class CausalAlone(PlainAttention):
        def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
            if not options.get("causal", True):
                raise ProviderError("causal attention alone")
            return super().create_layer(d_model, num_heads, **options)

    refused = outcome("attention", CausalAlone, "without_causality_the_future_is_seen")
    assert refused == ("skipped", "it refuses: causal attention alone")

    class Refuses(PlainFFN):
        def create_layer(self, *args: Any, **options: Any) -> nn.Module:
            raise ProviderError("not here")

    kind, message = outcome("ffn", Refuses, "output_shape")
    assert kind == "FAILED"
    assert "not here" in message
    assert "may refuse" in message


def test_a_flag_that_create_layer_does_not_take_is_a_refusal() -> None:
    class Narrow(PlainAttention):
        def create_layer(self, d_model: int, num_heads: int) -> nn.Module:  # type: ignore[override]
            return super().create_layer(d_model, num_heads)

    refused = outcome("attention", Narrow, "without_causality_the_future_is_seen")
    assert refused == ("skipped", "it refuses: create_layer takes no causal")
    assert outcome("attention", Narrow, "dropout_acts")[0] == "FAILED"


def test_sizes_that_do_not_fit_are_passed_over() -> None:
    class Wide(PlainAttention):
        def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
            if d_model // num_heads < 16:
                raise ConfigError("heads of 16 or more")
            return super().create_layer(d_model, num_heads, **options)

    case = case_of("attention", Wide, "cache_one_by_one")
    assert case.subject.size == (64, 4)
    assert case.run().outcome == "ok"

    class Never(PlainAttention):
        def create_layer(self, *args: Any, **options: Any) -> nn.Module:
            raise ConfigError("no size at all")

    assert "no size at all" in outcome("attention", Never, "causality")[1]


def test_an_error_in_the_provider_says_where_it_was_raised() -> None:
    class Layer(PlainFFNLayer):
        def forward(self, x: Tensor) -> Any:
            raise ZeroDivisionError("in the layer")

    class Broken(PlainFFN):
        pass

    Broken.Layer = Layer
    kind, message = outcome("ffn", Broken, "output_shape")
    assert kind == "FAILED"
    assert "ZeroDivisionError: in the layer" in message
    assert f"{Path(__file__).name}:" in message


def test_a_provider_that_ends_the_process_fails_its_check_alone() -> None:
    class Leaves(PlainFFN):
        def create_layer(self, *args: Any, **options: Any) -> nn.Module:
            raise SystemExit(3)

    assert "SystemExit: 3" in outcome("ffn", Leaves, "output_shape")[1]


def test_no_module_is_said_as_such() -> None:
    class Number(PlainFFN):
        def create_layer(self, *args: Any, **options: Any) -> Any:
            return 3

    assert "returns int 3" in outcome("ffn", Number, "output_shape")[1]


def test_the_count_holds_a_provider_to_what_it_has_run() -> None:
    every = cases("attention", PlainAttention)
    quick = sum(not case.check.slow for case in every)
    require_count(every, quick)
    require_count(every, None)
    with pytest.raises(CheckFailure, match=r"at least \d+ have to be .*cache_one_by_one: it does not claim 'cache'"):
        require_count(cases("attention", Modest), quick)


def test_inside_a_test_a_result_becomes_one_of_pytest() -> None:
    assert case_of("ffn", PlainFFN, "dropout_acts")().outcome == "ok"
    with pytest.raises(CheckFailure, match=r"ffn check dropout_acts: dropout=0\.5 drops nothing"):
        case_of("ffn", NoDropout, "dropout_acts")()
    with pytest.raises(pytest.skip.Exception, match="does not claim 'cache'"):
        case_of("attention", Modest, "cache_one_by_one")()
    with pytest.raises(pytest.xfail.Exception, match="nothing to drop"):
        case_of("ffn", NoDropout, "dropout_acts", expected_failures={"dropout_acts": "nothing to drop"})()


def test_a_run_leaves_the_world_as_it_was() -> None:
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    states = (torch.get_rng_state(), random.getstate(), numpy.random.rand(0))
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), isolated():
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(threads + 1)
        torch.manual_seed(1)
        random.random()
        raise KeyError
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_what_is_compiled_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> tuple[str, str]:
        return outcome("attention", PlainAttention, "compiles_as_one_graph")

    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: module)
    assert check() == ("ok", "")
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: lambda x: module(x) * 1.01)
    assert "the compiled layer's output, beside that of the layer: off by" in check()[1]

    def refuse(module: nn.Module, fullgraph: bool) -> nn.Module:
        raise RuntimeError("graph break\n  from user code")

    monkeypatch.setattr(torch, "compile", refuse)
    assert "fails: RuntimeError: graph break from user code; look for .item()" in check()[1]


# The record


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_record_is_kept_and_read_again(cache: Path) -> None:
    assert record.read("ffn", "a/b") is None
    kept = record.write(record.Record("ffn", "a/b", "apt-toy", "1.0", 20, 1, 2, "power=3"))
    assert record.read("ffn", "a/b") == kept
    assert kept.summary("1.0") == f"20 of 21 checks passed, 2 skipped, with power=3, on {kept.date}, version 1.0"
    assert kept.summary("1.1").endswith("version 1.0; this is 1.1: apt plugin-check ffn:a/b")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"kind": "ffn"}', b"\xff\xfe", b'{"kind": 1, "extra": 2}'])
def test_a_damaged_record_is_none(cache: Path, content: bytes) -> None:
    record.write(record.Record("ffn", "x", None, "1.0", 1, 0, 0))
    (path,) = (cache / record.FOLDER).glob("*.json")
    path.write_bytes(content)
    assert record.read("ffn", "x") is None
