"""Generation from models with random weights: the cache, batches, and the tokens that a text is made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.core.errors import AptWarning, ConfigError
from apt.core.hooks import Hooks
from apt.core.in_use import ProvidersInUse
from apt.core.registry import registry
from apt.inference.batch import Batch, alike
from apt.inference.generator import Generator
from apt.inference.sampling import Draws, Sampling, sample
from apt.modeling.backbones.gpt import GPT
from apt.modeling.compose import ModelBuilder

LIMIT, VOCABULARY = 24, 40


class Letters:
    """A tokenizer of as many characters as the model has rows."""

    vocab_size, eos_id = VOCABULARY, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 0x400 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(0x400 + i) for i in ids)


def text_of(ids: list[int]) -> str:
    return Letters().decode(ids)


def make_model(attention: str = "mha", **model: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"d_model": 32, "num_heads": 4, "num_layers": 2, "max_seq_len": LIMIT, "attention_name": attention}
    model = ModelBuilder({"model": shape | model}).build_model(vocab_size=VOCABULARY).double().eval()
    with torch.no_grad():  # sharper, so that a wrong step shows
        for block in model.blocks:
            for weight in block.attention.parameters():
                weight.mul_(3.0 if weight.dim() > 1 else 1.0)
    return model


def make_generator(model: GPT, tokenizer: Any = None, sections: Any = None) -> Generator:
    loaded = SimpleNamespace(
        model=model, tokenizer=tokenizer or Letters(), device=torch.device("cpu"), hooks=Hooks(),
        in_use=ProvidersInUse(registry.view(), sections),
    )  # fmt: skip
    return Generator(loaded)  # type: ignore[arg-type]


MODELS: dict[str, dict[str, Any]] = {
    "tva": {"attention": "tva_default"},
    "tva, r 8": {"attention": "tva_default", "tva": {"r": 8}},
    "mha": {},
    "gqa, qk-norm": {"mha": {"num_kv_heads": 2, "qk_norm": True}},
    "tva, learned positions": {"attention": "tva_default", "positions": "learned"},
    "mha, learned positions": {"positions": "learned", "norm": "rmsnorm"},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(**MODELS[request.param])


class Plain(torch.nn.Module):
    """An attention layer that takes the first five arguments alone: no cache, no positions."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.mix = torch.nn.MultiheadAttention(d_model, 4, batch_first=True)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, key_padding_mask: Any = None
    ) -> tuple[Tensor, Any]:
        future = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
        return self.mix(query, key, value, key_padding_mask, False, future)  # type: ignore[no-any-return]


def without_a_cache() -> GPT:
    model = make_model()
    torch.manual_seed(1)
    for block in model.blocks:
        block.attention, block.takes_context = Plain(32).double(), False
    return model.eval()


def reference(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, from the definition: every one from a full pass over the newest `LIMIT`."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids[-LIMIT:]])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [3] * 30, [8, 4, 6]]


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[3]], ids=["short", "beyond the context"])
def test_with_a_cache_the_tokens_are_those_without(model: GPT, prompt: list[int]) -> None:
    ids = list(make_generator(model).generate_ids(prompt, 40, Sampling(0.0)))
    assert ids == reference(model, prompt, 40)


def test_a_batch_gives_each_row_what_it_gets_alone(model: GPT) -> None:
    generator = make_generator(model)
    texts = [text_of(prompt) for prompt in PROMPTS]
    for settings in ({"temperature": 0.0}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.3}):
        together = generator.complete(texts, max_new_tokens=30, batch_size=3, **settings)  # type: ignore[arg-type]
        for index, (text, completion) in enumerate(zip(texts, together, strict=True)):
            alone = settings | ({"seed": 3 + index} if "seed" in settings else {})
            assert completion.text == "".join(generator.stream(text, max_new_tokens=30, **alone))  # type: ignore[arg-type]
            assert completion.prompt == text and completion.ended == "length" and len(completion.tokens) == 30


def test_a_layer_without_a_cache_serves_batches_too() -> None:
    model = without_a_cache()
    assert not model.supports("cache")
    generator = make_generator(model)
    prompts = [*PROMPTS, [1, 2, 3]]
    found = generator.complete([text_of(prompt) for prompt in prompts], max_new_tokens=12, temperature=0.0)
    assert [list(completion.tokens) for completion in found] == [reference(model, prompt, 12) for prompt in prompts]
    assert alike(model, prompts, 8) == [[1], [4, 5], [0], [2], [3]]


def test_samples_of_one_prompt_differ_and_each_is_its_own_run() -> None:
    generator = make_generator(make_model())
    prompts = [text_of(prompt) for prompt in PROMPTS[:2]]
    found = generator.complete(prompts, samples=3, max_new_tokens=20, seed=11)
    assert [completion.prompt for completion in found] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert [c.text for c in found] == [
        "".join(generator.stream(prompts[i // 3], max_new_tokens=20, seed=11 + i)) for i in range(6)
    ]
    assert len({completion.text for completion in found}) == 6


def test_rows_that_end_stop_costing_and_leave_the_others_as_they_were() -> None:
    model = make_model("tva_default", max_seq_len=64)
    computed: list[int] = []
    model.register_forward_pre_hook(lambda module, args: computed.append(args[0].numel()))
    texts = [text_of(prompt) for prompt in PROMPTS]
    generator = make_generator(model)
    plain = [text_of(list(c.tokens)) for c in generator.complete(texts, max_new_tokens=25, temperature=0)]
    stops = [text[n : n + 2] for text, n in zip(plain, (3, 9, 20, 14, 6), strict=True)]
    computed.clear()
    found = generator.complete(texts, max_new_tokens=25, temperature=0, stop=stops)
    assert sum(completion.ended == "stop" for completion in found) >= 4
    for text, completion in zip(plain, found, strict=True):
        assert text.startswith(text_of(list(completion.tokens)))
        assert completion.text == text[: min((text.find(stop) for stop in stops if stop in text), default=25)]
    assert sum(computed) == 5 * 30 + sum(len(completion.tokens) - 1 for completion in found)


def test_a_prompt_is_computed_once_for_all_its_samples_and_then_one_token_of_each() -> None:
    model = make_model()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    make_generator(model).complete([text_of(PROMPTS[2])], samples=4, max_new_tokens=5, seed=0)
    assert seen == [(1, 11), *[(4, 1)] * 4]


def test_room_that_padding_took_is_given_back() -> None:
    model = make_model()
    batch = Batch(model, [[1] * 20, [2, 3]], copies=1, room=40, device=torch.device("cpu"))
    with torch.no_grad():
        batch.forward()
        batch.select([1])
        row = [2, 3]
        for step in range(30):
            row.append(step)
            batch.append(torch.tensor([step]))
            logits, hidden = batch.forward()
            expected = model(torch.tensor([row[-LIMIT:]]))
            torch.testing.assert_close(logits, expected.logits[:, -1], atol=1e-10, rtol=0)
            torch.testing.assert_close(hidden, expected.hidden[:, -1], atol=1e-10, rtol=0)
    assert batch.tokens_BT.shape[1] == 32


def test_the_tokens_of_a_batch_are_those_that_hooks_see() -> None:
    generator = make_generator(make_model())
    seen: list[tuple[list[list[int]], list[int]]] = []

    class Looks:
        def on_next_token(self, logits: Tensor, generator: Generator) -> None:
            assert logits.shape[0] == generator.hidden.shape[0] == generator.tokens.shape[0]
            seen.append((generator.tokens.tolist(), generator.padding.tolist()))

    generator.hooks.add(Looks())
    generator.complete([text_of([5, 6, 7]), text_of([8])], max_new_tokens=1)
    assert seen == [([[8, 8, 8], [5, 6, 7]], [2, 0])]


def test_the_end_of_the_document_and_no_room_at_all() -> None:
    tokenizer = Letters()
    tokenizer.eos_id = 7  # type: ignore[assignment]
    generator = make_generator(make_model(), tokenizer)
    found = generator.complete(["", text_of([1])], samples=4, max_new_tokens=400, temperature=30.0, seed=0)
    assert {completion.ended for completion in found} == {"end"}
    assert not any(7 in completion.tokens for completion in found)
    assert generator.complete([text_of([1])], max_new_tokens=0)[0].text == ""
    assert list(generator.stream(text_of([1]), max_new_tokens=0)) == []


# Voting


class Fixed:
    """A voter that votes where it is told to, and remembers what it was shown."""

    def __init__(self, at: set[int], k: int, length: int | None, wins: Any) -> None:
        self.at, self.k, self.length, self.wins = at, k, length, wins
        self.asked = 0
        self.shown: list[Any] = []

    def get_name(self) -> str:
        return "fixed"

    def should_vote(self, logits: Tensor) -> bool:
        assert logits.shape == (VOCABULARY,)
        self.asked += 1
        return self.asked - 1 in self.at

    def answer(self, candidate: Any) -> str:
        return str(candidate.text)

    def vote(self, candidates: Any) -> Any:
        self.shown.append(candidates)
        return self.wins(candidates)


@pytest.mark.parametrize("length", [1, 5, None])
def test_a_vote_keeps_the_winner_and_goes_on_behind_it(model: GPT, length: int | None) -> None:
    generator = make_generator(model)
    voter: Any = Fixed({2}, 4, length, lambda candidates: 2)
    prompt = text_of(PROMPTS[0])
    plain = "".join(generator.stream(prompt, max_new_tokens=30, seed=5))
    text = "".join(generator.stream(prompt, max_new_tokens=30, seed=5, voter=voter))
    assert len(text) == 30 and text[:2] == plain[:2]
    (candidates,) = voter.shown
    rolled = length or 28
    assert [len(candidate.tokens) for candidate in candidates] == [rolled] * 4
    assert text[2 : 2 + rolled] == candidates[2].text
    assert candidates[0].text == plain[2 : 2 + rolled], "the first candidate is what there would be without a vote"
    assert len({candidate.text for candidate in candidates}) > 1
    (vote,) = generator.votes
    assert (vote.place, vote.winner) == (2, 2)
    assert vote.answers == tuple(candidate.text for candidate in candidates)
    # What follows is decided by the model at the winner's end, not by another candidate's past.
    ids = PROMPTS[0] + Letters().encode(text)
    for place in range(2 + rolled, 30):
        logits = model(torch.tensor([ids[: 5 + place][-LIMIT:]])).logits[0, -1]
        assert int(sample(logits[None], Sampling(), [Draws(5).at(place)])) == ids[5 + place]


def test_texts_that_vote_on_whole_answers_do_so_side_by_side() -> None:
    generator = make_generator(make_model("tva_default"))
    prompts = [text_of(prompt) for prompt in PROMPTS]
    voter: Any = generator.voter("self_consistency")
    together = generator.complete(prompts, samples=2, max_new_tokens=12, seed=9, voter=voter, temperature=2.0)
    for index, completion in enumerate(together):
        alone = generator.stream(prompts[index // 2], max_new_tokens=12, seed=9 + index, voter=voter, temperature=2.0)
        assert "".join(alone) == completion.text
        assert generator.votes == completion.votes and len(completion.votes) == 1
    some: Any = Fixed({0, 2, 4}, 3, None, lambda candidates: 1)
    mixed = generator.complete(prompts, max_new_tokens=12, seed=9, voter=some, batch_size=99)
    assert sorted(len(completion.votes) for completion in mixed) == [0, 0, 1, 1, 1]
    plain = generator.complete(prompts, max_new_tokens=12, seed=9)
    for completion, other in zip(mixed, plain, strict=True):
        assert (completion.text == other.text) == (completion.votes == ())


def test_the_likelihood_of_a_candidate_is_the_models() -> None:
    model = make_model()
    voter: Any = Fixed({0}, 3, 6, lambda candidates: 0)
    generator = make_generator(model)
    generator.complete([text_of(PROMPTS[0])], max_new_tokens=6, temperature=0.5, seed=1, voter=voter)
    for candidate in voter.shown[0]:
        ids = torch.tensor([PROMPTS[0] + list(candidate.tokens)])
        logprobs = model(ids).logits[0, 4:-1].detach().log_softmax(-1)
        assert candidate.logprob == pytest.approx(float(logprobs.gather(1, ids[0, 5:, None]).sum()), abs=1e-5)


def test_a_voter_that_fails_is_left_out_and_said_so() -> None:
    generator = make_generator(make_model())
    prompt = text_of([1])
    plain = "".join(generator.stream(prompt, max_new_tokens=9, seed=0))

    def fails(candidates: Any) -> int:
        raise ValueError("no idea")

    for wins, message in ((fails, "ValueError: no idea"), (lambda c: 9, "must return the index of one of 3")):
        generator = make_generator(make_model())
        voter: Any = Fixed({0, 4}, 3, 2, wins)
        with pytest.warns(AptWarning, match=f"voter.fixed failed.*{message}.*goes on without it") as caught:
            assert "".join(generator.stream(prompt, max_new_tokens=9, seed=0, voter=voter)) == plain
        assert len(caught) == 1
    strict = make_generator(make_model())
    strict.hooks.on_plugin_error = "stop"
    with pytest.raises(Exception, match=r"voter\.fixed failed: ValueError: no idea"):
        "".join(strict.stream(prompt, seed=0, voter=Fixed({0}, 3, 2, fails)))  # type: ignore[arg-type]


def test_voting_needs_candidates_that_differ() -> None:
    generator = make_generator(make_model())
    with pytest.raises(ConfigError, match="at temperature 0 all candidates are the same"):
        generator.complete(["x"], temperature=0, voter=generator.voter("entropy"))


def test_voters_come_from_the_registry_with_their_section() -> None:
    generator = make_generator(make_model(), sections={"model": {"voting": {"threshold": 0.5, "k": 5, "rollout": 2}}})
    voter = generator.voter("entropy")
    assert (voter.get_name(), voter.threshold, voter.k, voter.length) == ("entropy", 0.5, 5, 2)
    assert generator.voter("entropy") is voter
    assert generator.voter("self_consistency").length is None
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        generator.voter("entrpy")
