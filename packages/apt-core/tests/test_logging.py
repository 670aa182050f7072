"""What `apt` logs, for scripts that do not configure logging themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt.core.logging import _set_up, get_logger, setup_logging


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
