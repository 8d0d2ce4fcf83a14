"""One chat that a template has rendered: a text that knows its control tokens, and the tokens that it is encoded to."""

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, compress, dropwhile, islice
from operator import itemgetter, not_
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer


class ChatBackends(NamedTuple):
    """What encodes the sections of a rendered chat, for one set of control tokens."""

    control: str  # pattern of the control tokens that a template may write
    control_ids: Tokenizer  # a whole control token -> its id
    plain: Tokenizer  # any other text


# Characters that mean nothing to anybody: private-use ones and noncharacters.
MEANINGLESS = (range(0xF0000, 0x110000), range(0xE000, 0xF900), range(0xFDD0, 0xFDF0))


class NoCharacterLeft(ValueError):
    """A text holds all characters that could mark something in it."""


def unused_characters(*texts: str, count: int = 1) -> list[str]:
    """Meaningless characters that occur in none of the texts. Raises `NoCharacterLeft` if these have nearly all."""
    used = set().union(*texts)
    found = list(islice((char for char in map(chr, chain(*MEANINGLESS)) if char not in used), count))
    if len(found) < count:
        raise NoCharacterLeft(
            f"the text holds all {sum(map(len, MEANINGLESS)):,} private-use characters, of which reading chats needs "
            f"{count}: leave one out."
        )
    return found


class Marks(NamedTuple):
    """Two characters that occur nowhere in the chat: `border` splits text, `glue` breaks up a control token."""

    border: str
    glue: str

    @classmethod
    def unused_in(cls, *texts: str) -> "Marks":
        return cls(*unused_characters(*texts, count=2))

    def remove(self, text: str) -> str:
        return text.replace(self.border, "").replace(self.glue, "")

    def leave_out(self, spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
        """Spans of characters of `text`, counted in the text without the marks."""
        shown = list(accumulate((char not in self for char in text), initial=0))
        return [(shown[start], shown[end]) for start, end in spans]


class RenderedChat(str):
    """A chat as the text that its template makes of it, which also knows which parts of it are control tokens.

    The tokenizer that rendered it encodes it as that chat. What is made of it (a slice, a sum, an f-string, `str(chat)`, a
    column of a data set) is ordinary text: whether a control token in it was a user's words, nobody can tell any more.
    """

    sections: tuple[tuple[str, bool], ...] = ()  # what is encoded by itself, and whether it is one control token
    template: str | None = None  # that wrote it; None is the tokenizer's own

    @classmethod
    def of(cls, marked: str, marks: Marks, control: str, template: str) -> "RenderedChat":
        """The chat that a template has rendered with `marks` in it, whose control tokens match the pattern `control`."""
        # Every other part is what the parentheses match: a control token, or None at a border.
        parts = re.split(f"{marks.border}|({control})", marked)
        return cls.join([(marks.remove(part), index % 2 == 1) for index, part in enumerate(parts) if part], template)

    @classmethod
    def join(cls, sections: Iterable[tuple[str, bool]], template: str | None = None) -> "RenderedChat":
        sections = tuple(section for section in sections if section[0])
        chat = cls("".join(text for text, _ in sections))
        chat.sections, chat.template = sections, template
        return chat

    def without_prefix(self) -> "RenderedChat":
        """The chat without the control tokens that it begins with."""
        return self.join(dropwhile(itemgetter(1), self.sections), self.template)


class EncodedChat(NamedTuple):
    """A rendered chat's tokens, as a whole and by section: one control token, or what is encoded as one plain text."""

    encoding: Encoding
    sections: list[tuple[str, Encoding]]

    @classmethod
    def of(cls, chat: RenderedChat, backends: ChatBackends, normal_form: Callable[[str], str]) -> "EncodedChat":
        # What is no control token of these backends is text: another tokenizer may have rendered the chat.
        is_control = [known and backends.control_ids.token_to_id(text) is not None for text, known in chat.sections]
        texts = [normal_form(text) for text, _ in chat.sections]
        plain_texts = list(compress(texts, map(not_, is_control)))
        plain = iter(backends.plain.encode_batch(plain_texts, add_special_tokens=False))
        encodings = [
            backends.control_ids.encode(text) if one else next(plain)
            for text, one in zip(texts, is_control, strict=True)
        ]
        return cls(Encoding.merge(encodings, growing_offsets=True), list(zip(texts, encodings, strict=True)))

    @property
    def has_exact_offsets(self) -> bool:
        """Whether the offsets in `encoding` are those in the chat.

        Merging counts on from the end of each section's last token, which may stand before the end of the section.
        """
        ends = [encoding.offsets[-1][1] if len(encoding) else 0 for _, encoding in self.sections]
        return ends == [len(text) for text, _ in self.sections]

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of the chat that each token stands for, as (start, end)."""
        offsets, begin = [], 0
        for text, encoding in self.sections:
            for start, end in encoding.offsets:
                first = begin + min(start, len(text) - 1)
                offsets.append((first, begin + end if start < end else first))
            begin += len(text)
        return offsets

    def generated(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """1 for tokens that lie in one of the `spans` of characters, which the assistant generates; else 0.

        Args:
            spans: in order, none of which reaches into the next.
        """
        lows, highs = [low for low, _ in spans] + [sys.maxsize], [high for _, high in spans]
        # Of the spans that end behind the token's beginning, the first is the one that begins first.
        return [int(lows[bisect_right(highs, start)] < max(end, start + 1)) for start, end in self.offsets()]
