"""docs/reference.md says what the docstrings say, and all that the contract holds is in it."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
from checkout import ROOT

from apt.core.catalogue import KINDS
from apt.core.hooks import SPEC_NAMES

TEXT = (ROOT / "docs/reference.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/reference.py"))


def test_the_reference_is_as_the_docstrings_are(script: dict[str, Any]) -> None:
    assert script["render"]() == TEXT, (
        "docs/reference.md is not as the docstrings are; write it anew: python docs/reference.py"
    )


def test_it_knows_every_hook_and_every_kind(script: dict[str, Any]) -> None:
    assert script["KINDS"] == tuple(KINDS)
    for heading in [*(f"### `{hook}`" for hook in SPEC_NAMES), *(f"## Kind `{kind}`" for kind in KINDS)]:
        assert TEXT.count(f"\n{heading}\n") == 1, heading


def test_its_links_lead_somewhere() -> None:
    for page in ("plugins.md", "reference.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / page).read_text(encoding="utf-8")):
            assert (ROOT / "docs" / target).exists(), f"{page} links to {target}"
