"""Plugins' attentions and schemes of fewer bits in runs of several processes: they do there what they do in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
from distributed_workers import TOLERANCE, alone, plain_config, records, store
from small_run import register_for_one_test

from apt.checkpoint.lock import read_lock
from apt.core.runs import RunFolder

flash = pytest.importorskip("apt_plugin_flash.plugin", reason="apt-plugin-flash is not here")
quant = pytest.importorskip("apt_plugin_quant.plugin", reason="apt-plugin-quant is not here")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins' providers, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch, flash, quant)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "key", [("attention_name", "flash_sdpa"), ("qat_name", "int8"), ("qat_name", "int8_dynamic"), ("qat_name", "int4")]
)
def test_they_come_to_what_they_come_to_in_one_process(tmp_path: Path, parallel: str, key: tuple[str, str]) -> None:
    config: dict[str, Any] = plain_config(tmp_path)
    config["model"] |= dict([key])
    config["training"] |= {"batch_size": 4, "gradient_accumulation": 2, "max_epochs": 2, "log_every": 1}
    config["hardware"]["parallel"] = parallel
    one = alone(config, ("Recorder", None))
    modules = ("apt_plugin_flash.plugin", "apt_plugin_quant.plugin")
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None), register=modules)
    assert [process["error"] for process in several] == [None, None], several
    ours, theirs = several[1]["losses"], one["losses"]
    first, alone_first = records(several[0]["run"])[0], records(one["run"])[0]
    for name in ("loss", "grad_norm"):
        assert first[name] == pytest.approx(alone_first[name], rel=TOLERANCE), name
    # A weight between two levels is rounded to one of them, and the last bit of a sum decides to which.
    assert ours == pytest.approx(theirs, rel=TOLERANCE if key[0] == "attention_name" else 5e-3)
    used = {slot["name"] for slot in read_lock(RunFolder(Path(several[0]["run"])).lock)["slots"]}
    assert key[1] in used, "nothing stands in for it"
    assert store(several[0]["run"]).load().step == len(theirs)
