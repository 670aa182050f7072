"""From tokens to text, as they come: whole characters, and nothing of what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, and so the most tokens that one can be spread over."""


class TextStream:
    """The text of a row of tokens.

    A tokenizer may write a token differently at the start of a text, so each is decoded behind the ones before it. A
    character whose bytes are spread over several tokens waits for the last of them, and what may be the beginning of a
    stop string waits until it is known whether it is one.

    Args:
        decode: the tokenizer's.
        before: the tokens that the text continues.
        stops: the text ends before the first of these that occurs.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self._decode = decode
        self._shown = list(before[-LONGEST_CHARACTER:])
        self._pending: list[int] = []
        self._stops = [stop for stop in stops if stop]
        self.text = ""
        """What is certain."""
        self._held = ""
        self.stopped = False
        """Whether a stop string has occurred."""

    def push(self, token: int) -> None:
        """Add a token."""
        self._pending.append(token)
        # An unfinished UTF-8 sequence decodes to U+FFFD.
        if len(self._pending) >= LONGEST_CHARACTER or not self._decode(self._pending).endswith("\ufffd"):
            self._settle()

    def finish(self) -> None:
        """No more tokens come: what waits is text."""
        self._settle()
        if not self.stopped:
            self.text, self._held = self.text + self._held, ""

    def fork(self) -> TextStream:
        """Another one that goes on from here."""
        other = copy(self)
        other._shown, other._pending = self._shown.copy(), self._pending.copy()
        return other

    def _settle(self) -> None:
        """Make text of the tokens that wait, and hold back from it what may become a stop string."""
        if not self._pending or self.stopped:
            return
        before = self._decode(self._shown) if self._shown else ""
        new = self._held + self._decode(self._shown + self._pending)[len(before) :]
        self._shown, self._pending = self._pending, []
        found = [place for stop in self._stops if (place := new.find(stop)) >= 0]
        if found:
            self.text, self._held, self.stopped = self.text + new[: min(found)], "", True
            return
        certain = len(new) - max((_overlap(new, stop) for stop in self._stops), default=0)
        self.text, self._held = self.text + new[:certain], new[certain:]


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
