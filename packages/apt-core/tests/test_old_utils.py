"""`apt_model.utils` as code of 1.x used it."""

from __future__ import annotations

import importlib
import logging
import os
import random
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apt.core.errors import AptWarning, ConfigError
from apt.core.logging import setup_logging


def old(path: str) -> Any:
    """What `from MODULE import NAME` gives; which is deprecated, as another test tells."""
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(importlib.import_module(f"apt_model.{module}"), name)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "mine")
    return caplog


MINE = logging.getLogger("mine")


# utils


def test_a_seed_makes_all_three_repeat_themselves() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), torch.rand(()).item()

    old("utils.set_seed")(3)
    first = draw()
    old("utils.set_seed")(3)
    assert draw() == first != draw()


def test_the_device_is_the_cpu_where_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    get_device = old("utils.get_device")
    assert get_device(force_cpu=True) == torch.device("cpu") and get_device() == torch.device("cuda")


def test_what_serves_as_it_is_is_the_new_thing() -> None:
    assert old("utils.logging_utils.setup_logging") is setup_logging
    assert old("utils.logging_utils.setup_colored_logging") is setup_logging
    assert old("utils.memory_cleanup") is old("utils.error_handler.memory_cleanup")


# resource_monitor


def test_a_monitor_looks_says_and_sums_up(log: pytest.LogCaptureFixture) -> None:
    monitor = old("utils.resource_monitor.create_resource_monitor")(logger=MINE, log_interval=60)
    assert monitor.running
    stats = monitor.check_resources(force_log=True)
    assert stats["memory"]["percent"] == pytest.approx(100 * stats["memory"]["used_gb"] / stats["memory"]["total_gb"])
    assert stats["cpu"] >= 0 and ("gpu" in stats) == torch.cuda.is_available()
    monitor.check_resources()
    monitor.stop()
    assert monitor.check_resources() is None and not monitor.running
    said = [record.getMessage() for record in log.records]
    assert len(said) == 2 and said[0].startswith("CPU ") and "- memory: " in said[1]
    history = monitor.get_utilization_history()
    assert len(history["cpu"]) == len(history["memory"]) == 4 and history["gpu"] == []
    assert monitor.get_peak_memory_usage() == {"cpu_memory_percent": max(history["memory"])}


def test_without_a_logger_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = old("utils.resource_monitor.ResourceMonitor")()
    assert monitor.check_resources() is None
    monitor.start()
    monitor.start()
    monitor.stop()
    monitor.stop()
    assert capsys.readouterr().out.count("Resource usage:") == 2


def test_a_gpu_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = old("utils.resource_monitor.ResourceMonitor")(logger=MINE)
    monkeypatch.setattr(monitor, "_machine", SimpleNamespace(memory=1 << 40, cores=2, gpus=(("a", 1000),)))
    monitor.start()
    monitor.peak_gpu_memory = 500
    assert monitor.check_resources()["gpu"] == [{"id": 0, "used_gb": 0, "total_gb": 1000 / 2**30, "percent": 0}]
    assert monitor.get_peak_memory_usage()["gpu0_memory_percent"] == 50
    assert set(monitor.get_utilization_history()["gpu"]) == {0}
    monitor.stop()


# error_handler


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.core.errors.time.sleep", lambda _: None)


def test_an_error_that_passes_is_worth_going_on(log: pytest.LogCaptureFixture) -> None:
    handler = old("utils.error_handler.EnhancedErrorHandler")(logger=MINE)
    assert old("utils.error_handler.ErrorHandler") is type(handler)
    for _ in range(3):
        assert handler.handle_exception(TimeoutError("slow"), "loading")
    assert not handler.handle_exception(TimeoutError("slow"), "loading"), "three times are enough"
    handler.reset_error_counts()
    assert handler.handle_exception(TimeoutError("slow"))
    assert not handler.handle_exception(ValueError("wrong"))
    assert log.records[0].getMessage() == "loading: TimeoutError: slow"


def test_own_handlers_know_errors_by_a_text() -> None:
    handler, seen = old("utils.error_handler.ErrorHandler")(), []
    handler.register_handler("disk is", lambda name, message: bool(seen.append((name, message))))
    handler.register_handler("KeyError", lambda name, message: True)
    assert not handler.handle_exception(OSError("the disk is full"))
    assert seen == [("OSError", "the disk is full")]
    assert handler.handle_exception(KeyError("a"))


def test_what_there_is_is_saved_when_memory_ran_out() -> None:
    saved: list[int] = []
    make = old("utils.error_handler.ErrorHandler")
    manager = SimpleNamespace(save_emergency_checkpoint=lambda: saved.append(1))
    assert make(None, manager).handle_exception(MemoryError())
    assert make(None, manager).handle_exception(TimeoutError()) and saved == [1]
    with pytest.warns(AptWarning, match="SimpleNamespace has no save_emergency_checkpoint"):
        assert make(None, SimpleNamespace()).handle_exception(MemoryError())


def test_a_block_is_left_after_what_was_recovered_from(log: pytest.LogCaptureFixture) -> None:
    context, handler = old("utils.error_handler.ErrorContext"), old("utils.error_handler.ErrorHandler")()
    with context(handler, "loading", default_return=[]) as block:
        raise TimeoutError
    assert block.result == []
    with pytest.raises(ValueError), context(handler, "loading"):
        raise ValueError
    with pytest.raises(TimeoutError), context(None, "loading", logger=MINE):
        raise TimeoutError("slow")
    assert log.records[-1].getMessage() == "loading: TimeoutError: slow"
    with pytest.raises(KeyboardInterrupt), context(handler, "loading"):
        raise KeyboardInterrupt
    with context(handler, "loading") as block:
        block.result = 3
    assert block.result == 3 and not handler.counts


def test_a_call_gives_its_default_where_it_fails(log: pytest.LogCaptureFixture) -> None:
    run, handler = old("utils.error_handler.safe_execute"), old("utils.error_handler.ErrorHandler")()
    left = [TimeoutError, TimeoutError]

    def flaky() -> int:
        if left:
            raise left.pop()
        return 5

    assert run(flaky, handler) == 5
    assert run(lambda: 1 // 0, handler, default_return=-1) == -1
    assert run(lambda: 1 // 0, logger=MINE, context="dividing") is None
    assert log.records[-1].getMessage().startswith("dividing: ZeroDivisionError")
    assert run(lambda: 1 // 0) is None and run(lambda: 2) == 2


# hardware_check


def test_the_machine_is_described() -> None:
    profile = old("utils.hardware_check.get_hardware_profile")()
    assert set(profile) == {"cpu", "memory", "gpu", "disk", "system"}
    assert 0 < profile["memory"]["available_gb"] < profile["memory"]["total_gb"]
    assert profile["gpu"]["available"] == torch.cuda.is_available() == (profile["gpu"]["count"] > 0)
    assert profile["system"]["torch_version"] == torch.__version__


@pytest.fixture
def config() -> Any:
    """A small model of 1.x."""
    return old("config.apt_config.APTConfig")(50, 32, 64, 2, 1, 1, max_seq_len=16, sr_ratio=4)


def test_the_memory_is_that_of_the_model(config: Any) -> None:
    model = old("modeling.apt_model.APTModel")(config).backbone
    estimate = old("utils.hardware_check.estimate_model_memory_requirements")(config, batch_size=4)
    assert estimate["total_params"] == model.num_params()
    assert estimate["model_size_gb"] * 2**30 >= 4 * model.num_params()
    assert estimate["total_memory_gb_fp32"] * 2**30 >= 16 * model.num_params()


def test_a_model_fits_or_does_not(config: Any, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    check = old("utils.hardware_check.check_hardware_compatibility")
    assert check(config, MINE)
    hardware = importlib.import_module("apt_model.utils._hardware")
    monkeypatch.setattr(hardware, "memory_of", lambda _: 1000)
    assert not check(config, MINE)
    assert [record.levelno for record in log.records] == [logging.INFO, logging.WARNING]
    monkeypatch.setattr(hardware, "memory_of", lambda _: None)
    assert check(config)


def test_what_is_no_config_of_1x_is_refused() -> None:
    with pytest.raises(ConfigError, match="a dict is no APTConfig"):
        old("utils.hardware_check.check_hardware_compatibility")({"d_model": 32})


# cache_manager


def test_files_are_kept_by_type_and_name(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    manager = old("utils.cache_manager.CacheManager")(str(tmp_path / "cache"), logger=MINE)
    path = manager.save_to_cache("text", "models", "a.txt")
    assert path == manager.get_cache_path("models", "a.txt") == str(tmp_path / "cache" / "models" / "a.txt")
    assert manager.save_to_cache("other", "models", "a.txt") == path
    assert manager.load_from_cache("models", "a.txt") == "text", "what is there stays"
    manager.save_to_cache(b"\x00\x01", "models", "a.txt", overwrite=True)
    assert manager.load_binary_from_cache("models", "a.txt") == b"\x00\x01"
    assert manager.save_to_cache(path, "temp", "copy")
    assert manager.load_binary_from_cache("temp", "copy") == b"\x00\x01", "of the file that it names"
    assert manager.load_from_cache("models", "none", default="-") == "-"
    assert manager.file_exists_in_cache("temp", "copy") and not manager.file_exists_in_cache("models", "copy")
    assert manager.delete_from_cache("temp", "copy") and not manager.delete_from_cache("temp", "copy")
    assert manager.save_to_cache("text", "models", "no/such/folder") is None
    assert manager.load_binary_from_cache("models", "", default=0) == 0, "a folder"
    assert [record.getMessage().endswith("directory") for record in log.records] == [True, True]


def test_it_is_sized_and_cleaned(tmp_path: Path) -> None:
    manager = old("utils.cache_manager.CacheManager")(tmp_path)
    aged = Path(manager.save_to_cache(bytes(2000), "datasets", "old.bin"))
    os.utime(aged, (time.time() - 40 * 86400,) * 2)
    manager.save_to_cache(bytes(500), "datasets", "new.bin")
    manager.save_to_cache(bytes(7), "models", "new.json")
    size = manager.get_cache_size()
    assert (size["total_size_bytes"], size["total_size_human"]) == (2507, "2.5 kB")
    assert size["by_type"]["datasets"] == {"size_bytes": 2500, "size_human": "2.5 kB", "files": 2}
    assert manager.get_cache_size("models")["total_size_bytes"] == 7
    assert manager.clean_cache("models")["cleaned_files"] == 0 and aged.exists()
    assert manager.clean_cache() == {"cleaned_files": 1, "cleaned_dirs": 0, "errors": [], "skipped": 2}
    assert not aged.exists()
    assert manager.clean_cache(days=0, exclude=["*.json"])["cleaned_files"] == 1
    assert manager.clean_cache(days=0)["cleaned_files"] == 1 and manager.get_cache_size()["total_size_bytes"] == 0


def test_what_apt_did_not_make_is_left_alone_aloud(tmp_path: Path) -> None:
    thesis = tmp_path / "models" / "thesis"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    manager = old("utils.cache_manager.CacheManager")(tmp_path)
    manager.save_to_cache("text", "temp", "a")
    with pytest.warns(AptWarning, match="models left alone"):
        assert manager.clean_cache(days=0)["cleaned_files"] == 1
    assert thesis.exists() and manager.load_from_cache("models", "thesis") == "years of work"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.clean_cache("temp", days=0)


def test_left_out_it_is_the_cache_of_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path))
    assert old("utils.cache_manager.CacheManager")().cache_dir == str(tmp_path)
