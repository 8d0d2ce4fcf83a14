"""Words, sentences and scripts of Chinese and English text, without models or downloads."""

from collections.abc import Iterator

import regex
from datatrove.utils.word_tokenizers import WordTokenizer

# Scripts without spaces: every character is a word, as in character n-grams.
_SINGLE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
WORD = regex.compile(rf"[{_SINGLE}]|[[\p{{L}}\p{{M}}\p{{N}}_]--[{_SINGLE}]]+|[^\s\p{{L}}\p{{M}}\p{{N}}_]+", regex.V1)
SENTENCE = regex.compile(
    r"(?:(?![。！？!?…]|\.(?!\S)|\n).)*+(?:[。！？!?…]+|\.+(?!\S)|\n+|$)[”’」』\"')）]*\s*", regex.S
)
LETTER = regex.compile(r"\p{L}")
SCRIPTS = {
    "zh": regex.compile(r"\p{Han}"),
    "ja": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "ko": regex.compile(r"\p{Hangul}"),
    "en": regex.compile(r"[A-Za-z]"),
}


class ScriptTokenizer(WordTokenizer):
    """datatrove's interface for words and sentences of text that mixes scripts: a Chinese character, a run of letters and
    digits, or a run of marks is a word; sentences end at 。！？!?… , at a period before white space, and at line ends.

    Stands wherever datatrove takes a `language`. Its own tokenizers for Chinese and English need spaCy and jieba."""

    def __init__(self) -> None:
        super().__init__("zh-en")

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(_sentences(text))

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in _sentences(text)]


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where sentences begin and end; together they are the whole text. One of white space alone belongs to its neighbor."""
    start = end = 0
    for found in SENTENCE.finditer(text):
        end = found.end()
        if text[start:end].strip():
            yield start, end
            start = end
    # What is left is white space: `span_tokenize` users take what lies between the ends of two spans.


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
