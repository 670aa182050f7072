"""The conformance kit under test: it catches every provider that is subtly wrong, and no correct one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kit_mutants_attention
import kit_mutants_cache  # noqa: F401  its mutants join those of attention
import kit_mutants_data
import kit_mutants_kinds
import kit_mutants_layers
import kit_references
import kit_references_data
import pytest

from apt.core.catalogue import KINDS
from apt.testing import Case, cases, checks_of

REFERENCES: dict[str, type[Any]] = {
    "attention": kit_references.PlainAttention,
    "ffn": kit_references.PlainFFN,
    "router": kit_references.PlainRouter,
    "align": kit_references.PlainAlign,
    "dataset": kit_references_data.PlainDataset,
    "tokenizer": kit_references_data.PlainTokenizerProvider,
    "tracker": kit_references_data.PlainTracker,
    "retrieval": kit_references_data.PlainRetrieval,
    "voter": kit_references_data.PlainVoter,
    "quant": kit_references.PlainQuant,
}

MUTANTS: dict[str, tuple[str, type[Any], str]] = {
    **kit_mutants_attention.MUTANTS,
    **kit_mutants_layers.MUTANTS,
    **kit_mutants_kinds.MUTANTS,
    **kit_mutants_data.MUTANTS,
}
"""{name: (kind, provider, the check aimed at it)}."""


def case_of(kind: str, provider: type[Any], check: str) -> Case:
    return next(case for case in cases(kind, provider, name="plain") if case.check.name == check)


def marked(names: dict[str, tuple[str, Any, str]]) -> Iterator[Any]:
    for name, (kind, _, aim) in names.items():
        yield pytest.param(name, marks=[pytest.mark.slow_check] if checks_of(kind)[aim].slow else [])


@pytest.mark.parametrize("name", list(marked(MUTANTS)))
def test_each_mutant_is_caught_by_the_check_aimed_at_it(name: str) -> None:
    kind, provider, aim = MUTANTS[name]
    result = case_of(kind, provider, aim).run()
    assert result.outcome == "FAILED", f"{name} gets through: {result.message}"
    assert len(result.message) > 20


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_plain_reference_passes_every_check(kind: str) -> None:
    results = [case.run() for case in cases(kind, REFERENCES[kind], name="plain") if not case.check.slow]
    assert [(r.check.name, r.outcome, r.message) for r in results if r.outcome != "ok"] == []


@pytest.mark.slow_check
@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_the_plain_reference_compiles(kind: str) -> None:
    assert case_of(kind, REFERENCES[kind], "compiles_as_one_graph").run().outcome == "ok"


def test_every_check_has_a_mutant_that_it_catches() -> None:
    aimed = {checks_of(kind)[aim].function for kind, _, aim in MUTANTS.values()}
    idle = {f"{kind}: {name}" for kind in KINDS for name, check in checks_of(kind).items()
            if check.function not in aimed}  # fmt: skip
    assert idle == set()


def test_there_are_enough_of_them() -> None:
    kinds = [kind for kind, _, _ in MUTANTS.values()]
    assert kinds.count("attention") >= 40
    assert len(kinds) >= 120
    assert set(kinds) == set(KINDS)
