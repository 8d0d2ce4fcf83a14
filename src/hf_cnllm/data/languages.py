"""Words and languages of Chinese and English text by its script, without models or downloads; other languages by fastText."""

from collections.abc import Iterable
from typing import Any

import regex

# Scripts without spaces: every character is a word, as in character n-grams.
_SINGLE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
WORD = regex.compile(rf"[{_SINGLE}]|[[\p{{L}}\p{{M}}\p{{N}}_]--[{_SINGLE}]]+|[^\s\p{{L}}\p{{M}}\p{{N}}_]+", regex.V1)
LETTER = regex.compile(r"\p{L}")
SCRIPTS = {
    "zh": regex.compile(r"\p{Han}"),
    "ja": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "ko": regex.compile(r"\p{Hangul}"),
    "en": regex.compile(r"[A-Za-z]"),
}


def language_by_script(text: str) -> tuple[str, float]:
    """The language that the letters' scripts suggest, and their share of all letters: `zh` (Han, no kana), `ja`, `ko`, `en`
    (ASCII letters), else `und`. It cannot tell languages of one script apart: French is `en` here."""
    letters = len(LETTER.findall(text))
    if not letters:
        return "und", 0.0
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    if counts["ja"] > 0.05 * letters:
        return "ja", (counts["ja"] + counts["zh"]) / letters
    name = max(counts, key=counts.__getitem__)
    return (name, counts[name] / letters) if counts[name] else ("und", 0.0)


def language_of(text: str) -> str:
    """`zh` for a text with a Chinese character, else `en`: where there is nothing else that it could be."""
    return "zh" if regex.search(r"[\u4e00-\u9fff]", text) else "en"


class LanguageRule:
    """Which texts are in one of some languages.

    Args:
        languages: their codes, as the model names them (`zh`, `en`).
        model: a file of fastText's (lid.176.bin, GlotLID); without one the scripts decide (`language_by_script`), which tells
            `zh`, `en`, `ja` and `ko` apart and nothing else.
        threshold: least probability, or share of the letters.

    Raises:
        ValueError: scripts do not tell one of the languages.
    """

    def __init__(self, languages: Iterable[str], model: str | None = None, threshold: float = 0.5) -> None:
        self.languages, self.model, self.threshold = set(languages), model, threshold
        self._loaded: Any = None
        if model is None and (unknown := sorted(self.languages - SCRIPTS.keys())):
            raise ValueError(f"--languages {' '.join(unknown)}: scripts tell zh, en, ja, ko; name a --language-model")

    def reason_against(self, text: str) -> str | None:
        """None for a text in one of the languages; for others their language, or `uncertain`."""
        language, score = language_by_script(text) if self.model is None else self._predict(text)
        if language not in self.languages:
            return language
        return None if score >= self.threshold else "uncertain"

    def _predict(self, text: str) -> tuple[str, float]:
        if self._loaded is None:
            self._loaded = load_fasttext(self.model)
        labels, scores = self._loaded.predict(text.replace("\n", " "))
        return labels[0].removeprefix("__label__"), float(scores[0])


def load_fasttext(path: str) -> Any:
    """Raises:
    ImportError: fastText is not installed.
    ValueError: the file is none of its models.
    """
    try:
        import fasttext
    except ImportError as error:
        raise ImportError(
            "--language-model needs fastText: pip install fasttext-numpy2-wheel, or leave it out to go by scripts"
        ) from error
    return fasttext.FastText._FastText(path)
