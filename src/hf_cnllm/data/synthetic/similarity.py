"""ROUGE-L against a pool of texts, for Chinese and English.

ROUGE-L's F is 2·LCS / (m + n), for the longest common subsequence of the words of two texts (Lin, 2004), which is rapidfuzz's
normalized Indel similarity of their words; tests compare it with `rouge-score`.
"""

import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex
from rapidfuzz import process
from rapidfuzz.distance import Indel

# As `rouge-score` has English; what lies between in other scripts is left to jieba.
RUN = regex.compile(r"[a-z0-9]+|[[\p{L}\p{M}\p{N}]--[a-z0-9]]+", regex.V1)
ROUNDING = 1e-9  # two different scores are further apart
CUTOFF_ROUNDING = 1e-5  # rapidfuzz was seen to drop a score that is the cutoff, or above it by less than 1e-7


@lru_cache(maxsize=1)
def _jieba():
    import jieba

    jieba.setLogLevel("CRITICAL")  # without its cache it is slower, no more
    with tempfile.TemporaryDirectory() as folder:
        # It reads a cache that anybody may have put into the system's folder for temporary files.
        cutter = jieba.Tokenizer()
        cutter.tmp_dir = folder
        cutter.initialize()
    return cutter


def words(text: str) -> list[str]:
    """The words that ROUGE compares: lower-case runs of ASCII letters and digits, and jieba's of other letters."""
    return [word for run in RUN.findall(text.lower()) for word in ([run] if run.isascii() else _jieba().lcut(run))]


class Pool:
    """Texts that a new one must not resemble."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._letters: dict[str, int] = {}
        self._texts: list[str | list[int]] = []
        for text in texts:
            self.add(text)

    def _spelled(self, text: str) -> str | list[int]:
        # A word is one character, so that rapidfuzz compares strings, while there are characters: they are their numbers to it.
        letters = [self._letters.setdefault(word, len(self._letters) + 1) for word in words(text)]
        return "".join(map(chr, letters)) if max(letters, default=0) <= sys.maxunicode else letters

    def add(self, text: str) -> None:
        self._texts.append(self._spelled(text))

    def has_similar(self, text: str, threshold: float = 0.7) -> bool:
        """Whether ROUGE-L's F with one of the texts is `threshold` or more."""
        spelled = self._spelled(text)
        found: Any = spelled and process.extractOne(
            spelled, self._texts, scorer=Indel.normalized_similarity, score_cutoff=threshold - CUTOFF_ROUNDING
        )
        return bool(found) and found[1] >= threshold - ROUNDING
