"""Text from tokens as they come: whole characters, and stop strings that are never shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from apt.data.tokenizers import ByteTokenizer
from apt.inference.text import TextStream

BYTES = ByteTokenizer()


class Pieces:
    """A tokenizer whose tokens are the given strings."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def shown(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    """What is certain after each token, as a row that ends at a stop string."""
    texts = []
    for token in tokens:
        stream.push(token)
        texts.append(stream.text)
        if stream.stopped:
            break
    stream.finish()
    return [*texts, stream.text]


def test_whole_characters_and_nothing_lost() -> None:
    text = "naïve Ω 😀 end"
    texts = shown(TextStream(BYTES.decode), BYTES.encode(text))
    assert texts[-1] == text
    assert not any("\ufffd" in piece for piece in texts)
    broken = shown(TextStream(BYTES.decode), [0xF0, 0x9F, 65, 66, 67, 0xF0])
    assert "ABC" in broken[-2] and broken[-1].endswith("\ufffd")


@given(st.text(max_size=30), st.text(max_size=8))
def test_any_text_behind_any_other(text: str, before: str) -> None:
    encodable = text.encode("utf-8", "ignore").decode(), before.encode("utf-8", "ignore").decode()
    texts = shown(TextStream(BYTES.decode, BYTES.encode(encodable[1])), BYTES.encode(encodable[0]))
    assert texts[-1] == encodable[0]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=12), st.lists(st.text("ab\n", max_size=4), max_size=3)
)
def test_the_text_ends_before_the_first_stop_string_wherever_tokens_break_it(
    pieces: list[str], stops: list[str]
) -> None:
    stream = TextStream(Pieces(pieces).decode, stops=stops)
    texts = shown(stream, range(len(pieces)))
    whole = "".join(pieces)
    # Tokens come one by one: the text stops at the first token that completes a stop string.
    expected = whole
    for end in range(1, len(pieces) + 1):
        so_far = "".join(pieces[:end])
        found = [place for stop in stops if stop and (place := so_far.find(stop)) >= 0]
        if found:
            expected = so_far[: min(found)]
            break
    assert texts[-1] == expected
    assert stream.stopped == (expected != whole or any(stop and stop in whole for stop in stops))
    assert all(expected.startswith(text) for text in texts), "nothing is shown that is taken back"


def test_what_may_become_a_stop_string_waits_no_longer_than_it_may() -> None:
    texts = shown(TextStream(Pieces(list("a\nUs\nUser:b")).decode, stops=["\nUser:"]), range(11))
    assert texts == ["a", "a", "a", "a", "a\nUs", "a\nUs", "a\nUs", "a\nUs", "a\nUs", "a\nUs", "a\nUs"]


def test_a_token_that_is_written_otherwise_at_the_start_is_decoded_behind_the_prompt() -> None:
    def decode(ids: Sequence[int]) -> str:  # as a tokenizer that drops the blank before the first word
        return " ".join("abc"[i] for i in ids)

    assert shown(TextStream(decode, [0]), [1, 2])[-1] == " b c"
    assert shown(TextStream(decode), [1, 2])[-1] == "b c"


def test_a_fork_leaves_the_other_as_it_is() -> None:
    stream = TextStream(BYTES.decode, stops=["xy"])
    for token in b"a\xc3":
        stream.push(token)
    fork = stream.fork()
    for token in b"\xa9x":
        fork.push(token)
    fork.finish()
    stream.push(0xA8)
    stream.finish()
    assert (stream.text, fork.text) == ("aè", "aéx")
