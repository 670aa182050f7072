"""Generates text, one token of every row at a time, with a cache where the model's attention has one."""

from __future__ import annotations

import itertools
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor

from apt.core.errors import AptWarning, ConfigError, TrainingError, in_a_line
from apt.core.providers.voter import VoterProvider
from apt.core.runs import RunFolder
from apt.inference.batch import Batch, alike, make_batch
from apt.inference.loading import LoadedRun, load_run
from apt.inference.rows import Completion, Row, Vote
from apt.inference.sampling import Draws, Sampling, SamplingOptions, sample, seed_of_row
from apt.inference.target_batch import TargetBatch
from apt.inference.text import TextStream
from apt.modeling.backbones.encdec import EncoderDecoder

T = TypeVar("T")


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
        self.writes_targets = isinstance(self.model, EncoderDecoder)
        """Whether a prompt is a source, and the text its target; else the text continues the prompt."""
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
        """Yield the continuation of `prompt` in pieces of text as they are certain; an encoder-decoder's is the target
        that goes with it.

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
        if voter is not None and voter.length is not None:
            # Candidates that are kept put a text ahead of its neighbours: one at a time.
            for i, row in enumerate(rows):
                self._finish([ids[i // samples]], 1, [row], settings, voter)
        else:
            beside = samples * (1 if voter is None else voter.k)
            for group in alike(self.model, ids, max(batch_size // beside, 1)):
                theirs = [rows[i * samples + j] for i in group for j in range(samples)]
                self._finish([ids[i] for i in group], samples, theirs, settings, voter)
        return [
            Completion(prompts[i // samples], row.text.text, tuple(row.tokens), row.ended or "length", tuple(row.votes))
            for i, row in enumerate(rows)
        ]

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int | None = None
    ) -> Iterator[int]:
        """Yield new token ids after `prompt_ids`, up to the end-of-document token, which is not yielded."""
        no_text, limit = TextStream(lambda ids: ""), self._limit(max_new_tokens)
        row, done = Row(no_text, Draws(seed_of_row(seed, 0)), limit, self.tokenizer.eos_id), 0
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
        if not ids and self.tokenizer.eos_id is not None and not self.writes_targets:
            ids = [self.tokenizer.eos_id]
        if not ids:
            lacks = (
                "an encoder-decoder answers a text"
                if self.writes_targets
                else ("this run's tokenizer has no token to start from")
            )
            raise ConfigError(f"there is nothing to continue: {lacks}", hint="give a --prompt")
        return ids

    def _row(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str], seed: int) -> Row:
        text = TextStream(self.tokenizer.decode, () if self.writes_targets else ids, stop)
        return Row(text, Draws(seed), self._limit(max_new_tokens), self.tokenizer.eos_id)

    def _limit(self, max_new_tokens: int) -> int:
        """Tokens of a text, at most: a target is not longer than those that were learned."""
        return min(max_new_tokens, self.model.max_seq_len) if self.writes_targets else max_new_tokens

    def _finish(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        rows: list[Row],
        sampling: Sampling,
        voter: VoterProvider | None,
    ) -> None:
        for _ in self._generate(prompts, copies, rows, sampling, voter):
            pass

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        rows: list[Row],
        sampling: Sampling,
        voter: VoterProvider | None = None,
    ) -> Iterator[None]:
        """Take `rows` to their ends, `copies` of each prompt; yields whenever there is more of them."""
        room = max(row.limit for row in rows)
        if room < 1:
            return
        batch = make_batch(
            self.model, prompts, copies=copies, room=room, start_id=self.tokenizer.eos_id, device=self.device
        )
        while rows:
            logits_BV = self._next_logits(batch)
            wanted = [voter is not None and self._wants_vote(voter, logits_V) for logits_V in logits_BV]
            if voter is not None and any(wanted):
                rows = self._vote(voter, wanted, batch, rows, logits_BV, sampling)
            else:
                rows = self._push(batch, rows, logits_BV, sampling)
            yield

    def _next_logits(self, batch: Batch | TargetBatch) -> Tensor:
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
        self, batch: Batch | TargetBatch, rows: list[Row], logits_BV: Tensor, sampling: Sampling, *, weigh: bool = False
    ) -> list[Row]:
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

    def _vote(
        self,
        voter: VoterProvider,
        wanted: Sequence[bool],
        batch: Batch | TargetBatch,
        rows: list[Row],
        logits_BV: Tensor,
        sampling: Sampling,
    ) -> list[Row]:
        """Sample candidates behind those rows that want a vote, each of which then becomes its winner; the others go on
        beside them. Returns the rows that have not ended, which are then the rows of the batch."""
        groups = [
            [row.fork(stream) for stream in range(voter.k)] if wants else [row]
            for row, wants in zip(rows, wanted, strict=True)
        ]
        going_on = [made for group in groups for made in group]
        origins = [index for index, group in enumerate(groups) for _ in group]
        batch.select(origins)
        logits_BV = logits_BV[origins]
        for count in itertools.count(1):
            going_on = self._push(batch, going_on, logits_BV, sampling, weigh=True)
            if not going_on or count == voter.length:
                break
            logits_BV = self._next_logits(batch)
        winners = [
            self._elect(voter, row, group) if wants else row
            for row, group, wants in zip(rows, groups, wanted, strict=True)
        ]
        kept = [index for index, winner in enumerate(winners) if winner in going_on]
        if kept:
            batch.select([going_on.index(winners[index]) for index in kept])
        return [rows[index] for index in kept]

    def _elect(self, voter: VoterProvider, row: Row, candidates: list[Row]) -> Row:
        """Let `row` become the candidate that wins; returns the candidate."""
        shown = [made.beyond(row) for made in candidates]
        winner = self._trusted(voter, lambda: _checked_winner(voter.vote(shown), voter.k), 0)
        unknown: tuple[str | None, ...] = (None,) * voter.k
        answers = self._trusted(voter, lambda: tuple(map(voter.answer, shown)), unknown)
        row.votes.append(Vote(len(row.tokens), answers, winner))
        chosen = candidates[winner]
        row.tokens, row.text, row.ended = chosen.tokens, chosen.text, chosen.ended
        return chosen

    def _wants_vote(self, voter: VoterProvider, logits_V: Tensor) -> bool:
        return self._trusted(voter, lambda: bool(voter.should_vote(logits_V)), False)

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
            failure = f"{name} failed: {in_a_line(error)}"
            if self.hooks.on_plugin_error == "stop":
                hint = "mend the plugin, or set on_plugin_error: drop to go on without it"
                raise TrainingError(failure, hint=hint) from error
            self._failed_voters.add(name)
            warnings.warn(f"{failure}; generation goes on without it", AptWarning, stacklevel=2)
            return otherwise


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
