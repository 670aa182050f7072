"""A conversation with a model that continues text: what was said is written out, and the model writes the next line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from apt.core.config import ChatConfig
from apt.core.errors import DataError
from apt.core.providers.voter import VoterProvider
from apt.inference.generator import Generator
from apt.inference.sampling import SamplingOptions


class Chat:
    """Turns of a message and a reply.

    The oldest turns are left out where the model's context has no room for them, half of it at most being kept for the
    reply; of a message that is too long by itself its end is used. An encoder-decoder answers each message by itself,
    as it has learned from pairs, without a template.

    Args:
        generator: of the run.
        template: how turns are written; the run's own, `config.chat`, if left out.
        max_new_tokens, stop, seed, voter, **sampling: of each reply, as for `Generator.stream`; the seed is that of the
            first reply, and each next one has one more.

    Raises:
        DataError: the template holds characters that the tokenizer does not know.
    """

    def __init__(
        self,
        generator: Generator,
        template: ChatConfig | None = None,
        *,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        seed: int | None = None,
        voter: VoterProvider | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> None:
        self.generator = generator
        self.template = template or generator.loaded.config.chat
        self.turns: list[tuple[str, str]] = []
        """(message, reply) of what has been said."""
        self._count = 0
        self._told = False
        self._max_new_tokens, self._seed, self._voter, self._sampling = max_new_tokens, seed, voter, sampling
        self._stop = list(stop)
        if generator.writes_targets:
            return
        # A model may leave out the end of its line and go on with the other's.
        self._stop += [self.template.end, self.template.user.strip() or self.template.end]
        try:
            generator.tokenizer.encode(self.template.system + self._turn("", ""))
        except DataError as error:
            raise DataError(
                f"the run's way to write a chat does not fit its tokenizer: {error.message}",
                hint="give others: --chat.user, --chat.assistant and --chat.end, or the section chat of its profile",
            ) from error

    def reply(self, message: str) -> Iterator[str]:
        """Yield the reply in pieces of text as they are certain; what was asked for of it was said.

        Raises:
            DataError: the message holds characters that the tokenizer does not know; it then was not said.
        """
        ids = self._prompt(self.generator.heard(message))
        seed = None if self._seed is None else self._seed + self._count
        pieces = self.generator.stream_ids(
            ids, max_new_tokens=self._max_new_tokens, stop=self._stop, seed=seed, voter=self._voter, **self._sampling
        )
        self._count += 1
        return self._spoken(message, pieces)

    def reset(self) -> None:
        """Forget what was said."""
        self.turns.clear()

    def _spoken(self, message: str, pieces: Iterator[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:  # also where the reply is cut short
            self.turns.append((message, said))

    def _prompt(self, message: str) -> list[int]:
        """The tokens to continue, as many turns of them as there is room for."""
        limit = self.generator.model.max_seq_len
        if self.generator.writes_targets:
            return self.generator.encode(message)
        room = limit - min(self._max_new_tokens, limit // 2)
        opening = self._turn(message, None)
        for first in range(len(self.turns) + 1):
            said = "".join(self._turn(*turn) for turn in self.turns[first:])
            ids = self.generator.encode(self.template.system + said + opening)
            if len(ids) <= room:
                break
        if first and not self._told:
            self._told = True
            self.generator.note(f"(what was said first is left out now: the context has room for {limit} tokens)")
        if len(ids) > room:
            self.generator.note(f"(the message is longer than the context allows: its last {room} tokens are used)")
        return ids[-room:]

    def _turn(self, message: str, reply: str | None) -> str:
        """One turn in writing; open for the reply where that is None."""
        template = self.template
        text = f"{template.user}{message}{template.end}{template.assistant}"
        return text if reply is None else f"{text}{reply}{template.end}"
