"""The tokenizers of core: what goes in comes out, what is saved loads, and what does not fit is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import AptWarning, ConfigError, DataError
from apt.core.providers.dataset import Piece
from apt.core.providers.tokenizer import Tokenizer
from apt.data.tokenizers import (
    BPE_EOS,
    BPETokenizerProvider,
    ByteTokenizer,
    ByteTokenizerProvider,
    CharTokenizer,
    CharTokenizerProvider,
    FileTokenizerProvider,
    HFTokenizer,
    _without_long_words,
    load_tokenizer,
)

UNICODE = st.text(st.characters(codec="utf-8"))
PROSE = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs.\n" * 20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))


def of(*texts: str) -> Callable[[], list[Piece]]:
    return lambda: [Piece(text) for text in texts]


def bpe(vocab_size: int = 300, *texts: str) -> Tokenizer:
    return BPETokenizerProvider({"vocab_size": vocab_size}).build(of(*(texts or (PROSE,))))


@pytest.fixture(scope="module")
def small_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return bpe()


# Round trips


@settings(deadline=None)
@given(text=UNICODE)
def test_bytes_are_those_of_utf8(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text


@settings(deadline=None)
@given(text=UNICODE)
def test_characters_are_numbered_by_code_point(text: str) -> None:
    tokenizer = CharTokenizerProvider().build(of(text))
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == len(set(text)) and tokenizer.decode(ids) == text
    order = sorted(set(text))
    assert [order[i] for i in ids] == list(text)


@settings(deadline=None)
@given(text=UNICODE.filter(lambda text: BPE_EOS not in text))
def test_bpe_knows_every_text(small_bpe: Tokenizer, text: str) -> None:
    ids = small_bpe.encode(text)
    assert small_bpe.decode(ids) == text
    assert all(0 <= i < small_bpe.vocab_size for i in ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(-5, 600)))
def test_whatever_a_model_says_can_be_shown(ids: Sequence[int]) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer("abc\0")):
        text = tokenizer.decode(ids)
        assert ("\ufffd" in text) >= any(not 0 <= i < tokenizer.vocab_size for i in ids)
        text.encode()


def test_every_kind_survives_its_file(tmp_path: Path, small_bpe: Tokenizer) -> None:
    text = "the lazy dog"
    kinds: list[Tokenizer] = [ByteTokenizer(), CharTokenizer(text + "\0\u2028\U0001f600"), small_bpe]
    for n, tokenizer in enumerate(kinds):
        path = tmp_path / f"{n}.json"
        tokenizer.save(path)
        for loaded in (load_tokenizer(path), FileTokenizerProvider({"path": str(path)}).build(of())):
            assert type(loaded) is type(tokenizer)
            assert loaded.encode(text) == tokenizer.encode(text)
            assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
            assert loaded.decode([0, 1]) == tokenizer.decode([0, 1])
        again = tmp_path / "again.json"
        loaded.save(again)
        assert again.read_bytes() == path.read_bytes()
    for provider in (ByteTokenizerProvider(), CharTokenizerProvider(), BPETokenizerProvider()):
        assert provider.load(tmp_path / "1.json").decode([0]) == "\0"


# What ends a document


def test_characters_have_an_end_of_document_only_if_there_are_several() -> None:
    build = CharTokenizerProvider().build
    assert build(of("abc")).eos_id is None
    assert build(lambda: [Piece("ab"), Piece("c", continues=True)]).eos_id is None
    tokenizer = build(of("abc", "de"))
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.decode([0])) == (0, 6, "\0")


def test_byte_and_bpe_always_have_one(small_bpe: Tokenizer) -> None:
    assert (ByteTokenizer().eos_id, ByteTokenizer().vocab_size) == (0, 256)
    assert small_bpe.eos_id is not None and small_bpe.decode([small_bpe.eos_id]) == BPE_EOS


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "[EOS]"])
def test_a_given_tokenizer_says_what_ends_a_document_under_one_of_many_names(tmp_path: Path, name: str) -> None:
    foreign = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "a": 1, name: 7}, unk_token="[UNK]"))
    foreign.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    foreign.enable_truncation(2)
    foreign.enable_padding(length=9)
    foreign.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.eos_id == 7
    assert tokenizer.vocab_size == 8, "ids may have gaps"
    assert tokenizer.encode("a b a a") == [1, 0, 1, 1], "neither truncated nor padded"


def test_a_given_tokenizer_may_have_none(tmp_path: Path) -> None:
    hf.Tokenizer(hf.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").eos_id is None


# Training


def test_bpe_learns_the_pairs_that_are_there(tmp_path: Path) -> None:
    tokenizer = bpe(262, "aaaa bbbb " * 50)
    assert len(tokenizer.encode(" aaaa")) < 5
    tokenizer.save(tmp_path / "t.json")
    genuine = hf.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert genuine.encode("aaaa bbbb").ids == tokenizer.encode("aaaa bbbb")


def test_bpe_training_is_the_same_each_time_and_does_not_depend_on_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str, *pieces: Piece) -> bytes:
        monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / name))
        BPETokenizerProvider({"vocab_size": 280}).build(lambda: pieces).save(tmp_path / f"{name}.json")
        return (tmp_path / f"{name}.json").read_bytes()

    one = trained("one", Piece(PROSE))
    assert trained("two", Piece(PROSE)) == one
    lines = [Piece(line, continues=i > 0) for i, line in enumerate(PROSE.splitlines(keepends=True))]
    assert trained("three", *lines) == one


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\t", max_size=60), st.integers(1, 9))
def test_long_words_are_cut_and_nothing_else(text: str, longest: int) -> None:
    parts = list(_without_long_words(text, longest))
    assert "".join(parts) == text
    borders = [len("".join(parts[:n])) for n in range(1, len(parts))]
    # Each border has letters on both sides, or spaces on both.
    assert all(text[at - 1].isspace() == text[at : at + 1].isspace() for at in borders if at < len(text))
    words = [word for part in parts for word in re.findall(r"\S+|\s+", part)]
    assert not words or max(map(len, words)) <= longest


def test_a_text_without_spaces_takes_no_longer_than_another() -> None:
    text = "abcdefgh" * 20_000
    started = time.process_time()
    tokenizer = bpe(300, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - started < 5, "it took minutes"


def test_bpe_is_trained_once_per_text_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings: list[int] = []
    train = BPETokenizerProvider._train

    def counted(self: BPETokenizerProvider, pieces: list[Piece]) -> hf.Tokenizer:
        trainings.append(1)
        return train(self, pieces)

    monkeypatch.setattr(BPETokenizerProvider, "_train", counted)
    first = bpe(280, PROSE)
    assert bpe(280, PROSE).encode(PROSE) == first.encode(PROSE) and len(trainings) == 1
    bpe(281, PROSE)
    bpe(280, PROSE + "The")
    bpe(280, PROSE, "The")
    assert len(trainings) == 4, "what differs in size, text or documents is another one"

    for cached in (tmp_path / "cache" / "tokenizers").glob("*.json"):
        cached.write_text(cached.read_text()[:100])
    assert bpe(280, PROSE).encode(PROSE) == first.encode(PROSE) and len(trainings) == 5, "damaged: trained again"


def test_a_bpe_smaller_than_asked_is_said_aloud_each_time() -> None:
    for _ in range(2):
        with pytest.warns(AptWarning, match="bpe learnt 2.. tokens instead of 4096"):
            bpe(4096, "aaaa bbbb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bpe(258, PROSE)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.vocab_size 256 is too small for bpe: it needs 257"):
        bpe(256)


def test_an_error_in_the_data_comes_through_training() -> None:
    def pieces() -> list[Piece]:
        raise DataError("a.txt is gone")

    with pytest.raises(DataError, match="gone"):
        BPETokenizerProvider().build(pieces)


# What is refused


def test_a_character_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match=r"'\u00fc' \(U\+00FC, character 2 of the text\) is not among the 3") as caught:
        CharTokenizer("abc").encode("ab\u00fc")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("\x80", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no JSON object"),
        ("{}", "Model missing"),
        ('{"apt_tokenizer": "word"}', "'word'"),
        ('{"apt_tokenizer": "char"}', "'characters' is missing"),
        ('{"apt_tokenizer": "char", "characters": ["a"]}', "'characters' is missing"),
        ('{"apt_tokenizer": "char", "characters": ""}', "'characters' is missing"),
    ],
)
def test_a_file_that_holds_no_tokenizer_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="holds no tokenizer") as caught:
        load_tokenizer(path)
    assert said in caught.value.message and str(path) in caught.value.message and caught.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.json cannot be read: No such file"):
        FileTokenizerProvider({"path": str(tmp_path / "t.json")}).build(of())


# The providers


def test_names_and_versions_are_those_they_are_registered_under() -> None:
    providers = [ByteTokenizerProvider(), CharTokenizerProvider(), BPETokenizerProvider()]
    assert [provider.get_name() for provider in providers] == ["byte", "char", "bpe"]
    assert FileTokenizerProvider({"path": "x"}).get_name() == "file"
    assert {provider.get_version() for provider in providers} == {"1.0.0"}
    assert isinstance(ByteTokenizerProvider().build(of()), ByteTokenizer)
    with pytest.raises(ValueError, match="vocab"):
        ByteTokenizerProvider({"vocab_size": 3})


def test_the_library_is_imported_only_where_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"apt_tokenizer": "char", "characters": "abc"}))
    code = (
        "import sys; from pathlib import Path; from apt.data.tokenizers import load_tokenizer; "
        f"load_tokenizer(Path({str(tmp_path / 't.json')!r})); assert not {{'tokenizers', 'torch'}} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )


def test_hf_tokenizers_read_special_tokens_that_a_text_spells_out(small_bpe: Tokenizer) -> None:
    assert isinstance(small_bpe, HFTokenizer)
    assert small_bpe.encode(f"a{BPE_EOS}")[-1] == small_bpe.eos_id


def test_hf_tokenizers_that_lack_a_word_say_so() -> None:
    tokenizer = HFTokenizer(hf.Tokenizer(hf.models.WordLevel({"a": 0})))
    with pytest.raises(DataError, match=r"cannot encode the text: .*UNK"):
        tokenizer.encode("b")
