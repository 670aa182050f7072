"""Text to terms: what a lexical index counts."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator

from apt.api import ConfigError, ProviderError

WORD = re.compile(r"\w+")
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
"""Japanese and Chinese, which put no spaces between words: two characters at a time stand for them."""


class Analyzer:
    """Lower-case words, reduced to their stems (Porter 2001, "Snowball").

    Args:
        language: whose stems and function words; "none" for words as they are.

    Raises:
        ConfigError: there are no stems for that language.
    """

    def __init__(self, language: str = "english") -> None:
        self._stem, self._function_words = _language(language)

    def counts(self, text: str) -> Counter[str]:
        """How often each term occurs. Function words count too: a text may be sought by nothing else."""
        return Counter(self._stem(list(_words(text))))

    def query(self, text: str) -> list[str]:
        """The terms to look for, without function words where there are others; a repeated one weighs more."""
        words = list(_words(text))
        return self._stem([word for word in words if word not in self._function_words] or words)


def _words(text: str) -> Iterator[str]:
    for word in WORD.findall(text.lower()):
        if not UNSPACED.search(word):
            yield word
            continue
        for run in UNSPACED.findall(word):
            yield from (run[i : i + 2] for i in range(max(1, len(run) - 1)))
        yield from (part for part in UNSPACED.split(word) if part)


@functools.cache
def _language(name: str) -> tuple[functools.partial[list[str]], frozenset[str]]:
    """What stems a list of words of a language, and its function words."""
    if name == "none":
        return functools.partial(list), frozenset()
    try:
        import Stemmer
    except ImportError as error:
        raise ProviderError("stemming needs PyStemmer, which is not installed", hint="pip install PyStemmer") from error
    from bm25s import stopwords

    known = Stemmer.algorithms()
    if name not in known:
        raise ConfigError(
            f"there are no stems for the language {name!r}", hint=f"use none, or one of {', '.join(known)}"
        )
    listed = stopwords.STOPWORDS_EN_PLUS if name == "english" else getattr(stopwords, f"STOPWORDS_{name.upper()}", ())
    return functools.partial(Stemmer.Stemmer(name).stemWords), frozenset(listed)
