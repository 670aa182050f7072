"""Generates text, one token at a time, with a cache where the model's attention has one."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apt.core.errors import ConfigError
from apt.core.runs import RunFolder
from apt.inference.loading import LoadedRun, load_run
from apt.inference.sampling import Sampling, sample


class Generator:
    """A trained model that continues prompts.

    Args:
        loaded: an opened run.
        options: the parsed command line, for plugins that have options of their own there.

    The attributes that hooks may rely on are the table in `apt.hookspecs`.
    """

    def __init__(self, loaded: LoadedRun, *, options: Namespace | None = None) -> None:
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.options = options
        self.tokens: Tensor = torch.empty(1, 0, dtype=torch.int64, device=self.device)
        self.hidden: Tensor = torch.empty(1, self.model.d_model, device=self.device)
        self.hooks = loaded.hooks

    @classmethod
    def from_run(cls, run: RunFolder, *, options: Namespace | None = None, **loading: Any) -> Generator:
        """Open a run and generate from it; `loading` as for `apt.inference.loading.load_run`."""
        return cls(load_run(run, **loading), options=options)

    def note(self, text: str) -> None:
        """Tell the user something: one line on standard error, so that standard output holds the text alone."""
        print(text, file=sys.stderr, flush=True)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the continuation of `prompt` in pieces of text as they are known.

        Args:
            prompt: what to continue; empty starts from the end-of-document token, if the tokenizer has one.
            max_new_tokens: stop after so many; the end of the document stops it before.
            temperature, top_k, top_p: see `apt.inference.sampling.Sampling`.
            seed: makes it repeatable; None takes a new one each time.

        Raises:
            ConfigError: a setting is out of range, or there is nothing to start from.
            DataError: the prompt holds characters that the tokenizer does not know.
        """
        sampling = Sampling(temperature, top_k, top_p)
        prompt = self.hooks.chain("on_generation_start", "prompt", prompt, _wrong_prompt, generator=self)
        decode = _IncrementalDecoder(self.tokenizer.decode)
        for token in self.generate_ids(self._encode(prompt), max_new_tokens, sampling, seed):
            if piece := decode.push(token):
                yield piece
        if piece := decode.flush():
            yield piece

    @torch.inference_mode()
    def generate_ids(
        self, prompt_ids: list[int], max_new_tokens: int, sampling: Sampling, seed: int | None = None
    ) -> Iterator[int]:
        """Yield new token ids after `prompt_ids`, up to the end-of-document token, which is not yielded."""
        generator = torch.Generator(self.device)
        if seed is not None and not 0 <= seed < 2**63:
            raise ConfigError(f"the seed is {seed}", hint="use 0 to 2**63 - 1")
        generator.manual_seed(seed) if seed is not None else generator.seed()
        limit = self.model.max_seq_len
        self.tokens = torch.tensor([prompt_ids], dtype=torch.int64, device=self.device)
        cache = self.model.make_cache(1, limit) if self.model.supports("cache") else None
        for _ in range(max_new_tokens):
            if cache is None or self.tokens.shape[1] > limit:
                # Beyond the longest context only the newest tokens count; their positions move, and no cache holds.
                cache = None
                output = self.model(self.tokens[:, -limit:], last_only=True)
            else:
                output = self.model(self.tokens[:, cache.length :], cache=cache, last_only=True)
            logits_BV, self.hidden = output.logits[:, -1], output.hidden[:, -1]
            # Rows of the embedding beyond the tokenizer's vocabulary mean nothing.
            logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf
            wrong = partial(_wrong_logits, like=logits_BV)
            logits_BV = self.hooks.chain("on_next_token", "logits", logits_BV, wrong, generator=self)
            self.hooks.settle()
            token = sample(logits_BV, sampling, generator)
            if token.item() == self.tokenizer.eos_id:
                return
            self.tokens = torch.cat([self.tokens, token[:, None]], dim=1)
            yield int(token)

    def _encode(self, prompt: str) -> list[int]:
        ids = list(self.tokenizer.encode(prompt))
        if not ids and self.tokenizer.eos_id is not None:
            ids = [self.tokenizer.eos_id]
        if not ids:
            raise ConfigError(
                "there is nothing to continue: this run's tokenizer has no token to start from", hint="give a --prompt"
            )
        return ids


def _wrong_prompt(result: object) -> str | None:
    return None if isinstance(result, str) else f"it must return a string or None, not {type(result).__name__}"


def _wrong_logits(result: object, like: Tensor) -> str | None:
    if not isinstance(result, Tensor) or result.shape != like.shape:
        return f"it must return logits of shape {list(like.shape)} or None"
    return "it returned logits that are NaN" if bool(result.isnan().any()) else None


class _IncrementalDecoder:
    """Text from tokens as they come.

    A tokenizer may write a token differently at the start of a text, so each is decoded behind the ones before it. A
    character whose bytes are spread over several tokens waits for the last of them.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(token)
        # An unfinished UTF-8 sequence decodes to U+FFFD. The longest has four bytes: after four tokens it is none.
        unfinished = self._decode(self._pending).endswith("\ufffd") and len(self._pending) < 4
        return "" if unfinished else self.flush()

    def flush(self) -> str:
        if not self._pending:
            return ""
        before = self._decode(self._shown) if self._shown else ""
        piece = self._decode(self._shown + self._pending)[len(before) :]
        self._shown, self._pending = self._pending, []
        return piece
