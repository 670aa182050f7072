"""The lock file: what a run was built with, and whether it may go on with something else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from apt.checkpoint.lock import check_lock, read_lock, write_lock
from apt.core.errors import AptWarning, CheckpointError
from apt.core.in_use import Slot
from apt.core.registry import Provider, Registration


class Plain(Provider):
    version: ClassVar[str] = "1.0"

    def get_name(self) -> str:
        return "plain"

    def get_version(self) -> str:
        return self.version


class Mha(Plain):
    weights_layout = "mha"


class Newer(Plain):
    version = "1.1"


def slot(
    kind: str, name: str | None, cls: type[Provider] = Plain, requested: str | None = None, dist: str = "apt-plugin-x"
) -> Slot:
    if name is None:
        return Slot(kind, requested or "absent", None, None, None, reason=f"{kind}:{requested} is not installed")
    claim = Registration(kind, name, cls, plugin="x", distribution=dist, distribution_version="2.3")
    reason = None if requested in (None, name) else f"{kind}:{requested} is not installed"
    provider = cls({"r": 4})
    return Slot(kind, requested or name, name, provider, claim, {"r": 4}, reason, provider.get_version())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 3)
        self.attention_norm = nn.LayerNorm(2)
        self.ffn = nn.Linear(2, 2, bias=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "plugins.lock.json"


def lock(path: Path, *slots: Slot) -> dict[str, Any]:
    write_lock(path, slots, nn.Module())
    return read_lock(path)


@pytest.fixture(autouse=True)
def loud() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AptWarning)
        yield


def test_each_slot_is_recorded(path: Path) -> None:
    model = nn.ModuleList([Block(), Block()])
    slots = [
        slot("attention", "tva_default", requested="flash_v2", dist="apt-core"),
        slot("router", None, requested="topk_moe"),
        slot("tokenizer", "byte", Mha),
    ]
    write_lock(path, slots, model, {("attention", "tva_default"): ["0.attention", "1.attention"]})
    attention, router, tokenizer = read_lock(path)["slots"]
    digest = attention.pop("weights_sha256")
    assert attention == {
        "kind": "attention",
        "requested": "flash_v2",
        "name": "tva_default",
        "version": "1.0",
        "distribution": "apt-core",
        "distribution_version": "2.3",
        "config": {"r": 4},
        "weights_layout": None,
        "weights": {
            "0.attention.weight": [3, 2], "0.attention.bias": [3],
            "1.attention.weight": [3, 2], "1.attention.bias": [3],
        },
        "fallback": True,
        "reason": "attention:flash_v2 is not installed",
    }  # fmt: skip
    assert (router["name"], router["version"], router["fallback"]) == (None, None, True)
    assert tokenizer["weights"] == {} and not tokenizer["fallback"] and tokenizer["reason"] is None
    assert tokenizer["weights_layout"] == "mha"
    assert len(digest) == 64 and digest != tokenizer["weights_sha256"] == router["weights_sha256"]


def test_the_hash_follows_keys_and_shapes(path: Path) -> None:
    def digest(*models: nn.Module) -> list[str]:
        hashes = []
        for model in models:
            write_lock(path, [slot("ffn", "default")], nn.ModuleDict({"ffn": model}), {("ffn", "default"): ["ffn"]})
            hashes.append(read_lock(path)["slots"][0]["weights_sha256"])
        return hashes

    one, same, wider, other = digest(nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(2, 3, bias=False))
    assert one == same and len({one, wider, other}) == 3


def test_the_same_providers_may_go_on(path: Path) -> None:
    slots = [slot("attention", "a"), slot("router", None, requested="topk_moe"), slot("ffn", "f", Mha)]
    assert check_lock(lock(path, *slots), slots) == []


def test_another_provider_is_refused_and_both_are_named(path: Path) -> None:
    old = lock(path, slot("attention", "flash_v2", Mha, dist="apt-plugin-flash"))
    with pytest.raises(CheckpointError) as caught:
        check_lock(old, [slot("attention", "tva_default", requested="flash_v2", dist="apt-core")])
    assert str(caught.value) == (
        "this run was built with attention:flash_v2 1.0 (apt-plugin-flash 2.3), and now "
        "attention:tva_default 1.0 (apt-core 2.3) is in effect; use attention:flash_v2 again: "
        "pip install \"apt-plugin-flash==2.3\", or one with weights_layout 'mha', leave out what names another one, "
        "or start a new run"
    )


def test_the_same_layout_may_take_its_place_loudly(path: Path) -> None:
    old = lock(path, slot("attention", "flash_v2", Mha))
    with pytest.warns(AptWarning, match=r"flash_v2 .* goes on with attention:mha .* same layout") as told:
        notes = check_lock(old, [slot("attention", "mha", Mha)])
    assert notes == [str(told[0].message)]


def test_two_without_a_layout_do_not_share_one(path: Path) -> None:
    with pytest.raises(CheckpointError):
        check_lock(lock(path, slot("attention", "a")), [slot("attention", "b")])


def test_a_provider_that_is_gone(path: Path) -> None:
    old = lock(path, slot("router", "topk_moe", dist="apt-plugin-moe"))
    with pytest.raises(CheckpointError, match=r"topk_moe.* and now no router is in effect; .*apt-plugin-moe==2\.3"):
        check_lock(old, [slot("router", None, requested="topk_moe")])


def test_a_provider_that_was_not_there(path: Path) -> None:
    old = lock(path, slot("router", None, requested="topk_moe"))
    with pytest.raises(
        CheckpointError, match=r"without a provider of kind router, and now router:topk_moe .* is in effect"
    ):
        check_lock(old, [slot("router", "topk_moe")])


def test_a_model_that_was_made_elsewhere_gets_its_first_text(path: Path) -> None:
    write_lock(path, [slot("ffn", "swiglu")], Block())
    assert check_lock(read_lock(path), [slot("ffn", "swiglu"), slot("dataset", "files")]) == []
    write_lock(path, [slot("dataset", "stdlib")], Block())
    with pytest.raises(CheckpointError, match="dataset:stdlib"):
        check_lock(read_lock(path), [slot("dataset", "files")])


def test_a_script_provider_has_nothing_to_install(path: Path) -> None:
    own = slot("ffn", "own")
    assert own.registration is not None
    own.registration = Registration("ffn", "own", Plain)
    with pytest.raises(CheckpointError) as caught:
        check_lock(lock(path, own), [slot("ffn", "default")])
    assert caught.value.hint == "use ffn:own again, leave out what names another one, or start a new run"


def test_another_version_is_named(path: Path) -> None:
    old = lock(path, slot("ffn", "f"))
    with pytest.warns(AptWarning, match=r"used ffn:f 1\.0 .* goes on with version 1\.1"):
        assert len(check_lock(old, [slot("ffn", "f", Newer)])) == 1


def test_trackers_may_come_and_go(path: Path) -> None:
    old = lock(path, slot("tracker", "tensorboard"))
    assert check_lock(old, [slot("tracker", "wandb")]) == []


def test_a_refusal_is_not_preceded_by_warnings(path: Path) -> None:
    old = lock(path, slot("ffn", "f"), slot("attention", "a"))
    with pytest.raises(CheckpointError):
        check_lock(old, [slot("ffn", "f", Newer), slot("attention", "b")])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "\x00"])
def test_a_damaged_lock_is_named(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"plugins\.lock\.json is damaged"):
        read_lock(path)


def test_a_missing_lock_and_another_format(path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_lock(path)
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 2, "slots": []}))
    with pytest.raises(CheckpointError, match="is of format 2"):
        read_lock(path)
