"""Generates text, one token of every row at a time, with a cache where the model's attention has one."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, Unpack

import torch
from torch import Tensor

from apt.core.errors import AptWarning, ConfigError, TrainingError
from apt.core.providers.voter import Candidate, VoterProvider
from apt.core.runs import RunFolder
from apt.inference.batch import Batch, alike
from apt.inference.loading import LoadedRun, load_run
from apt.inference.sampling import Draws, Sampling, SamplingOptions, sample, seed_of_row
from apt.inference.text import TextStream

T = TypeVar("T")

Ended = Literal["end", "stop", "length"]
"""Why a text ends: the end of the document, a stop string, or because it is as long as it may be."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One vote."""

    place: int
    """Before which new token of its text it was held, from 0."""
    answers: tuple[str | None, ...]
    """What each candidate answers; None where it has no answer."""
    winner: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    """Without the token that ended the document; with those of a stop string."""
    ended: Ended
    votes: tuple[Vote, ...] = ()


class _Row:
    """One text in the making."""

    def __init__(self, text: TextStream, draws: Draws, limit: int, eos_id: int | None) -> None:
        self.text, self.draws, self.stream, self.limit, self.eos_id = text, draws, 0, limit, eos_id
        self.tokens: list[int] = []
        self.logprob = 0.0
        self.votes: list[Vote] = []
        self.ended: Ended | None = None

    def push(self, token: int, logprob: float = 0.0) -> None:
        self.logprob += logprob
        if token == self.eos_id:
            self.end("end")
            return
        self.tokens.append(token)
        self.text.push(token)
        if self.text.stopped:
            self.end("stop")
        elif len(self.tokens) >= self.limit:
            self.end("length")

    def end(self, why: Ended) -> None:
        self.ended = why
        self.text.finish()

    def fork(self, stream: int) -> _Row:
        """A candidate that goes on from here, by chances of its own."""
        other = _Row(self.text.fork(), self.draws, self.limit, self.eos_id)
        other.tokens, other.stream, other.votes = self.tokens.copy(), stream, self.votes
        return other


class Generator:
    """A trained model that continues prompts.

    Args:
        loaded: an opened run.
        options: the parsed command line, for plugins that have options of their own there.

    The attributes that hooks may rely on are the table in `apt.hookspecs`.
    """

    def __init__(self, loaded: LoadedRun, *, options: Namespace | None = None) -> None:
        self.loaded = loaded
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.options = options
        self.hooks = loaded.hooks
        self.tokens: Tensor = torch.empty(1, 0, dtype=torch.int64, device=self.device)
        self.padding: Tensor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.hidden: Tensor = torch.empty(1, self.model.d_model, device=self.device)
        self.votes: tuple[Vote, ...] = ()
        """Those of the text that `stream` gave last."""
        self._failed_voters: set[str] = set()

    @classmethod
    def from_run(cls, run: RunFolder, *, options: Namespace | None = None, **loading: Any) -> Generator:
        """Open a run and generate from it; `loading` as for `apt.inference.loading.load_run`."""
        return cls(load_run(run, **loading), options=options)

    def note(self, text: str) -> None:
        """Tell the user something: one line on standard error, so that standard output holds the text alone."""
        print(text, file=sys.stderr, flush=True)

    def voter(self, name: str) -> VoterProvider:
        """The voter of that name, with its section of the run's profile.

        Raises:
            ProviderError: there is none, or it cannot be built.
            ConfigError: its section does not fit.
        """
        in_use, before = self.loaded.in_use, dict(self.loaded.in_use.providers)
        voter: VoterProvider | None = in_use.use("voter", name, lambda provider: provider)
        assert voter is not None
        self.hooks.add_providers({key: made for key, made in in_use.providers.items() if key not in before})
        return voter

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        seed: int | None = None,
        voter: VoterProvider | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the continuation of `prompt` in pieces of text as they are certain.

        Args:
            prompt: what to continue; empty starts from the end-of-document token, if the tokenizer has one.
            max_new_tokens: stop after so many; the end of the document stops it before.
            stop: strings that end the text before they occur.
            seed: makes it repeatable; None takes a new one each time.
            voter: chooses among several continuations; needs a temperature above 0.
            **sampling: see `apt.inference.sampling.Sampling`.

        Raises:
            ConfigError: a setting is out of range, or there is nothing to start from.
            DataError: the prompt holds characters that the tokenizer does not know.
        """
        return self.stream_ids(
            self.encode(self.heard(prompt)),
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            voter=voter,
            **sampling,
        )

    def stream_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        seed: int | None = None,
        voter: VoterProvider | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the text that follows the tokens `ids`, as `stream` does; plugins do not hear of a prompt."""
        settings = _checked(Sampling(**sampling), voter)
        row = self._row(ids, max_new_tokens, stop, seed_of_row(seed, 0))
        shown = 0
        for _ in self._generate([ids], 1, [row], settings, voter):
            if len(row.text.text) > shown:
                yield row.text.text[shown:]
                shown = len(row.text.text)
        self.votes = tuple(row.votes)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        seed: int | None = None,
        voter: VoterProvider | None = None,
        batch_size: int = 16,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Continue several prompts at once.

        Each text is the one that `stream` would give alone: the text number i of all (that of prompt i // samples) with
        `seed + i` for its seed. What differs is rounding, where rows of other lengths are beside it.

        Args:
            prompts: what to continue, as for `stream`.
            samples: continuations of each.
            batch_size: texts that are generated side by side; more are taken in turns.
            max_new_tokens, stop, seed, voter, **sampling: as for `stream`, which says what is raised.

        Returns:
            The completions: all of the first prompt, then all of the second, ...
        """
        settings = _checked(Sampling(**sampling), voter)
        seed_of_row(seed, 0)
        ids = [self.encode(self.heard(prompt)) for prompt in prompts]
        rows = [
            self._row(ids[i // samples], max_new_tokens, stop, seed_of_row(seed, i))
            for i in range(len(prompts) * samples)
        ]
        # A vote makes rows of its own, and ends at another length than its neighbour would: one text at a time.
        size = 1 if voter is not None else max(batch_size // samples, 1)
        for group in alike(self.model, ids, size):
            theirs = [rows[i * samples + j] for i in group for j in range(samples)]
            if voter is None:
                for _ in self._generate([ids[i] for i in group], samples, theirs, settings):
                    pass
            else:
                for row in theirs:
                    for _ in self._generate([ids[group[0]]], 1, [row], settings, voter):
                        pass
        return [
            Completion(prompts[i // samples], row.text.text, tuple(row.tokens), row.ended or "length", tuple(row.votes))
            for i, row in enumerate(rows)
        ]

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int | None = None
    ) -> Iterator[int]:
        """Yield new token ids after `prompt_ids`, up to the end-of-document token, which is not yielded."""
        no_text = TextStream(lambda ids: "")
        row, done = _Row(no_text, Draws(seed_of_row(seed, 0)), max_new_tokens, self.tokenizer.eos_id), 0
        for _ in self._generate([prompt_ids], 1, [row], sampling):
            yield from row.tokens[done:]
            done = len(row.tokens)

    def heard(self, prompt: str) -> str:
        """The prompt as plugins want it to be."""
        return self.hooks.chain("on_generation_start", "prompt", prompt, _wrong_prompt, generator=self)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt; those to start from, where it is empty.

        Raises:
            ConfigError: it is empty, and there is nothing to start from.
            DataError: it holds characters that the tokenizer does not know.
        """
        ids = list(self.tokenizer.encode(prompt))
        if not ids and self.tokenizer.eos_id is not None:
            ids = [self.tokenizer.eos_id]
        if not ids:
            raise ConfigError(
                "there is nothing to continue: this run's tokenizer has no token to start from", hint="give a --prompt"
            )
        return ids

    def _row(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str], seed: int) -> _Row:
        return _Row(TextStream(self.tokenizer.decode, ids, stop), Draws(seed), max_new_tokens, self.tokenizer.eos_id)

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        rows: list[_Row],
        sampling: Sampling,
        voter: VoterProvider | None = None,
    ) -> Iterator[None]:
        """Take `rows` to their ends, `copies` of each prompt; yields whenever there is more of them."""
        room = max(row.limit for row in rows)
        if room < 1:
            return
        batch = Batch(self.model, prompts, copies=copies, room=room, device=self.device)
        while rows:
            logits_BV = self._next_logits(batch)
            if voter is not None and self._wants_vote(voter, logits_BV):
                rows = self._vote(voter, batch, rows[0], logits_BV, sampling)
            else:
                rows = self._push(batch, rows, logits_BV, sampling)
            yield

    def _next_logits(self, batch: Batch) -> Tensor:
        """The logits [B, V] of the next tokens, as plugins want them to be."""
        logits_BV, self.hidden = batch.forward()
        self.tokens, self.padding = batch.tokens_BT, batch.padding_B
        # Rows of the embedding beyond the tokenizer's vocabulary mean nothing.
        logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf
        wrong = partial(_wrong_logits, like=logits_BV)
        logits_BV = self.hooks.chain("on_next_token", "logits", logits_BV, wrong, generator=self)
        self.hooks.settle()
        return logits_BV

    def _push(
        self, batch: Batch, rows: list[_Row], logits_BV: Tensor, sampling: Sampling, *, weigh: bool = False
    ) -> list[_Row]:
        """Add a token to each row; returns those that go on, which are then the rows of the batch.

        Args:
            weigh: whether to add up the log-probabilities.
        """
        draws = [row.draws.at(len(row.tokens), row.stream) for row in rows] if sampling.temperature else []
        tokens_B = sample(logits_BV, sampling, draws, batch.tokens_BT)
        logprobs = [0.0] * len(rows)
        if weigh:
            logprobs = logits_BV.float().log_softmax(dim=-1).gather(1, tokens_B[:, None]).squeeze(1).tolist()
        batch.append(tokens_B)
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs, strict=True):
            row.push(token, logprob)
        going_on = [index for index, row in enumerate(rows) if row.ended is None]
        if going_on and len(going_on) < len(rows):
            batch.select(going_on)
        return [rows[index] for index in going_on]

    def _vote(self, voter: VoterProvider, batch: Batch, row: _Row, logits_1V: Tensor, sampling: Sampling) -> list[_Row]:
        """Sample candidates behind `row`, the batch's only one, and go on with the winner, which becomes `row`."""
        start = len(row.tokens)
        candidates = [row.fork(stream) for stream in range(voter.k)]
        going_on, logits_BV = candidates, logits_1V.expand(voter.k, -1)
        batch.select([0] * voter.k)
        while going_on:
            going_on = self._push(batch, going_on, logits_BV, sampling, weigh=True)
            if not going_on or (voter.length is not None and len(going_on[0].tokens) - start >= voter.length):
                break
            logits_BV = self._next_logits(batch)
        shown = [_candidate(made, row) for made in candidates]
        winner = self._trusted(voter, lambda: _checked_winner(voter.vote(shown), voter.k), 0)
        unknown: tuple[str | None, ...] = (None,) * voter.k
        answers = self._trusted(voter, lambda: tuple(map(voter.answer, shown)), unknown)
        chosen = candidates[winner]
        row.tokens, row.text, row.ended = chosen.tokens, chosen.text, chosen.ended
        row.votes.append(Vote(start, answers, winner))
        if row.ended is not None:
            return []
        batch.select([going_on.index(chosen)])
        return [row]

    def _wants_vote(self, voter: VoterProvider, logits_BV: Tensor) -> bool:
        return self._trusted(voter, lambda: bool(voter.should_vote(logits_BV[0])), False)

    def _trusted(self, voter: VoterProvider, ask: Callable[[], T], otherwise: T) -> T:
        """What the voter says; `otherwise` from when it has failed: a vote that cannot be held ends no text.

        Raises:
            TrainingError: it failed under `on_plugin_error: stop`.
        """
        name = f"voter.{voter.get_name()}"
        if name in self._failed_voters:
            return otherwise
        try:
            return ask()
        except Exception as error:
            failure = f"{name} failed: {type(error).__name__}: {error}"
            if self.hooks.on_plugin_error == "stop":
                hint = "mend the plugin, or set on_plugin_error: drop to go on without it"
                raise TrainingError(failure, hint=hint) from error
            self._failed_voters.add(name)
            warnings.warn(f"{failure}; generation goes on without it", AptWarning, stacklevel=2)
            return otherwise


def _candidate(made: _Row, row: _Row) -> Candidate:
    """What `made`, a fork of `row`, has beyond it."""
    text = made.text.fork()
    text.finish()
    return Candidate(tuple(made.tokens[len(row.tokens) :]), text.text[len(row.text.text) :], made.logprob)


def _checked(sampling: Sampling, voter: VoterProvider | None) -> Sampling:
    if voter is not None and sampling.temperature == 0:
        raise ConfigError(
            f"the voter {voter.get_name()} has nothing to choose from: at temperature 0 all candidates are the same",
            hint="use a temperature above 0, such as 0.7",
        )
    return sampling


def _checked_winner(winner: object, count: int) -> int:
    if not isinstance(winner, int) or not 0 <= winner < count:
        raise TypeError(f"vote must return the index of one of {count} candidates, not {winner!r}")
    return winner


def _wrong_prompt(result: object) -> str | None:
    return None if isinstance(result, str) else f"it must return a string or None, not {type(result).__name__}"


def _wrong_logits(result: object, like: Tensor) -> str | None:
    if not isinstance(result, Tensor) or result.shape != like.shape:
        return f"it must return logits of shape {list(like.shape)} or None"
    return "it returned logits that are NaN" if bool(result.isnan().any()) else None
