"""A conversation: how it is written, what of it fits, and what ends a reply."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apt.core.config import ChatConfig
from apt.core.errors import DataError
from apt.core.hooks import Hooks
from apt.data.tokenizers import ByteTokenizer, CharTokenizer
from apt.inference.chat import Chat
from apt.inference.generator import Generator
from apt.modeling.compose import ModelBuilder


class Says:
    """A hook that makes the model say a given text, byte by byte, and notes what it was asked to continue."""

    def __init__(self, text: str) -> None:
        self.text, self.asked, self.place = text, "", 0

    def on_next_token(self, logits: Tensor, generator: Generator) -> Tensor:
        if self.place == 0:
            self.asked = generator.tokenizer.decode(generator.tokens[0].tolist())
        byte = self.text.encode()[self.place]
        self.place += 1
        return F.one_hot(torch.tensor([byte]), logits.shape[-1]).float().log()


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    shape = {"d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 120}
    model = ModelBuilder({"model": shape}).build_model(vocab_size=256).eval()
    loaded = SimpleNamespace(
        model=model, tokenizer=ByteTokenizer(), device=torch.device("cpu"), hooks=Hooks(), in_use=None,
        config=SimpleNamespace(chat=ChatConfig()),
    )  # fmt: skip
    return Generator(loaded, options=Namespace())  # type: ignore[arg-type]


def said(generator: Generator, text: str) -> Says:
    """Have the model say `text` next."""
    says = Says(text)
    generator.hooks = Hooks()
    generator.hooks.add(says)
    return says


def test_turns_are_written_as_the_template_says(generator: Generator) -> None:
    template = ChatConfig(system="Rules.\n", user="Q: ", assistant="A: ", end="\n\n")
    chat = Chat(generator, template, max_new_tokens=50)
    says = said(generator, "Hello\nyou.\n\nQ: x")
    assert "".join(chat.reply("Hi")) == "Hello\nyou."
    assert says.asked == "Rules.\nQ: Hi\n\nA: "
    assert chat.turns == [("Hi", "Hello\nyou.")]
    says = said(generator, "Fine.\n\n")
    assert "".join(chat.reply("And?")) == "Fine."
    assert says.asked == "Rules.\nQ: Hi\n\nA: Hello\nyou.\n\nQ: And?\n\nA: "
    chat.reset()
    says = said(generator, "Who?\n\n")
    assert "".join(chat.reply("Me")) == "Who?"
    assert says.asked == "Rules.\nQ: Me\n\nA: "


def test_a_reply_ends_where_the_other_one_would_speak(generator: Generator) -> None:
    chat = Chat(generator, ChatConfig(end="#"), stop=["END"])
    for spoken, reply in (("yes User: no", "yes "), ("a#b", "a"), ("bc END of", "bc ")):
        said(generator, spoken)
        assert "".join(chat.reply("x")) == reply


def test_the_oldest_turns_give_way_and_it_is_said_once(
    generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(generator, max_new_tokens=20)  # 100 tokens are for what was said, a turn takes about 30
    for number in range(8):
        says = said(generator, f"reply{number}\n")
        list(chat.reply(f"message{number}"))
        assert len(says.asked) <= 100
        assert says.asked.endswith(f"User: message{number}\nAssistant: ")
        first = max(number - 2, 0)
        assert says.asked.startswith(f"User: message{first}\n")
    assert capsys.readouterr().err.count("what was said first is left out now") == 1
    says = said(generator, "ok\n")
    list(chat.reply("z" * 300))
    assert len(says.asked) == 100 and says.asked.endswith("zzz\nAssistant: ")
    assert "longer than the context allows: its last 100 tokens are used" in capsys.readouterr().err
    assert generator.options == Namespace()


def test_a_reply_that_is_cut_short_was_said_as_far_as_it_went(generator: Generator) -> None:
    chat = Chat(generator)
    said(generator, "abcdefgh\n")
    pieces = chat.reply("x")
    assert next(pieces) + next(pieces) == "ab"
    pieces.close()  # type: ignore[attr-defined]
    assert chat.turns == [("x", "ab")]
    says = said(generator, "next\n")
    assert "".join(chat.reply("y")) == "next"
    assert "Assistant: ab\nUser: y" in says.asked


def test_plugins_hear_the_message_alone_and_what_they_add_is_not_remembered(generator: Generator) -> None:
    chat = Chat(generator)

    class Finds:
        def on_generation_start(self, prompt: str) -> str:
            heard.append(prompt)
            return f"[found] {prompt}"

    heard: list[str] = []
    for message in ("one", "two"):
        says = said(generator, "ok\n")
        generator.hooks.add(Finds())
        list(chat.reply(message))
    assert heard == ["one", "two"]
    assert says.asked == "User: one\nAssistant: ok\nUser: [found] two\nAssistant: "


def test_a_seed_repeats_the_conversation_and_its_replies_differ(generator: Generator) -> None:
    def talk(seed: int) -> list[Any]:
        chat = Chat(generator, ChatConfig(end="\x01"), seed=seed, max_new_tokens=12)
        return ["".join(chat.reply("x")) for _ in range(2)]

    assert talk(3) == talk(3) != talk(4)
    assert len(set(talk(3))) == 2


def test_what_a_tokenizer_does_not_know(generator: Generator) -> None:
    generator.tokenizer = CharTokenizer("User: abc\n")
    with pytest.raises(DataError, match=r"the run's way to write a chat does not fit its tokenizer.*'A'") as caught:
        Chat(generator)
    assert caught.value.hint is not None and "--chat.assistant" in caught.value.hint
    chat = Chat(generator, ChatConfig(assistant=": "))
    with pytest.raises(DataError, match="'x'"):
        chat.reply("x")
    assert chat.turns == []
