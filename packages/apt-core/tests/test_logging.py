"""What `apt` logs, for scripts that do not configure logging themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt.core.logging import _set_up, get_logger, log_to_file, setup_logging


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    logger = get_logger()
    level, handlers = logger.level, list(logger.handlers)
    yield
    for handler in _set_up:
        handler.close()
    _set_up.clear()
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_it_goes_to_standard_error_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "logs" / "apt.log"
    assert setup_logging(path) is get_logger()
    get_logger("training").info("begun")
    get_logger().debug("not this")
    text = path.read_text()
    assert text.endswith(" INFO begun\n") and "not this" not in text
    assert capsys.readouterr().err == text


def test_a_second_call_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "one.log")
    setup_logging(str(tmp_path / "two.log"), "WARNING")
    get_logger().info("quiet")
    get_logger().warning("loud")
    assert (tmp_path / "one.log").read_text() == ""
    assert (tmp_path / "two.log").read_text() == capsys.readouterr().err != ""


def test_a_call_that_fails_leaves_what_was_set_up(tmp_path: Path) -> None:
    setup_logging(tmp_path / "one.log")
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging(level="LOUD")
    with pytest.raises(OSError):
        setup_logging(tmp_path)
    get_logger().info("still here")
    assert "still here" in (tmp_path / "one.log").read_text()


def test_others_are_left_alone(tmp_path: Path) -> None:
    own = logging.NullHandler()
    get_logger().addHandler(own)
    setup_logging()
    setup_logging()
    assert own in get_logger().handlers and len(_set_up) == 1


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
def test_a_run_whose_disk_is_full_goes_on_without_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger, path = logging.Logger("a_run"), tmp_path / "run.log"
    with log_to_file(logger, path):
        logger.info("begun")
        (handler,) = logger.handlers
        assert isinstance(handler, logging.FileHandler)
        before = handler.setStream(FULL.open("w"))
        logger.info("no room")
        logger.error("none for this either")
        assert before is not None
        before.close()
    assert capfd.readouterr() == ("", "")
    assert path.read_text().endswith(" INFO begun\n") and logger.handlers == []


def test_a_mistake_in_what_is_logged_is_still_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("a_run")
    with log_to_file(logger, tmp_path / "run.log"):
        logger.info("%d steps", "three")
    assert "TypeError" in capfd.readouterr().err


def test_a_log_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    logger, path = logging.Logger("a_run"), tmp_path / "run.log"
    os.mkfifo(path)
    with pytest.raises(OSError), log_to_file(logger, path):
        pytest.fail("nobody reads it")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="it is a pipe or a device"), log_to_file(logger, path):
            pytest.fail("somebody reads it")
    finally:
        os.close(reader)
    assert logger.handlers == []
