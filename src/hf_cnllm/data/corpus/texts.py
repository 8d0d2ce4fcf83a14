"""Words and sentences of Chinese and English text as datatrove takes them, without models or downloads."""

from collections.abc import Iterator

import regex
from datatrove.utils.word_tokenizers import WordTokenizer

from ..languages import WORD

SENTENCE = regex.compile(
    r"(?:(?![。！？!?…]|\.(?!\S)|\n).)*+(?:[。！？!?…]+|\.+(?!\S)|\n+|$)[”’」』\"')）]*\s*", regex.S
)


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
