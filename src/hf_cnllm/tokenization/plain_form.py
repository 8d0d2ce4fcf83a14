"""What a SentencePiece normalizer makes of ordinary text, in Python's own string methods.

The normalizer of the backend takes five to thirteen passes over a text and over the places that its characters come from. Who
asks for ids alone needs no places, and most texts have nothing that the rules compose.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from .sentencepiece import SPACE, SentencePieceModel

# Characters that are no part of a cluster of several and that no rule and no normal form composes with their neighbors: no
# marks, jamo, joiners, variation selectors, halfwidth sound marks; nothing that a later version of Unicode may change.
ORDINARY = (
    r"\t\n\r -~\xa0-\xac\xae-\u02af\u0386-\u03ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u2030-\u205e\u2070-\u209c\u20a0-\u20bf"
    r"\u2100-\u23ff\u2460-\u27bf\u3000-\u3029\u3030-\u303f\u3041-\u3096\u309b-\u30ff\u3105-\u312f\u3200-\u33ff\u3400-\u4db5"
    r"\u4e00-\u9fef\uac00-\ud7a3\uff01-\uff9d\uffe0-\uffe6\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f900-\U0001f9ff"
)
_ORDINARY, _ASCII = re.compile(f"[{ORDINARY}]"), range(0x20, 0x7F)


class PlainForm(NamedTuple):
    """`form(text)` is what the model's normalizer makes of the text, or None if that takes the normalizer itself."""

    unusual: re.Pattern[str] | None  # characters for the normalizer; None: there are none
    table: dict[int, str]  # the rules for single characters
    space: re.Pattern[str] | None  # white space that has names
    names: Mapping[str, str]
    squeezes: bool
    has_prefix: bool

    @classmethod
    def of(
        cls, model: SentencePieceModel, space: re.Pattern[str] | None = None, names: Mapping[str, str] | None = None
    ) -> "PlainForm":
        """What `space` matches stands for its name in the normal form, whatever the rules say of it."""
        rules = dict(model.charsmap.characters) if model.charsmap else {}
        for symbol in model.symbols:  # they are exempt
            rules.pop(symbol, None)
        # Names are ASCII, and what a rule makes of a character must not begin with what composes with the one before.
        own = {char: to for char, to in rules.items() if _ORDINARY.fullmatch(char)}
        strange = {char for char, to in own.items() if ord(char) in _ASCII or (to and not _ORDINARY.match(to))}
        unusual = f"[^{ORDINARY}]" + (f"|[{''.join(map(re.escape, sorted(strange)))}]" if strange else "")
        return cls(
            unusual=re.compile(unusual) if model.charsmap else None,
            table={ord(char): to for char, to in own.items()},
            space=space,
            names=names or {},
            squeezes=model.remove_extra_whitespaces,
            has_prefix=model.add_dummy_prefix,
        )

    def __call__(self, text: str) -> str | None:
        if self.unusual and self.unusual.search(text):
            return None
        is_empty = not text
        if self.space:
            text = self.space.sub(lambda found: self.names[found[0]], text)
        if self.table:
            text = text.translate(self.table)
        if self.squeezes:
            text = re.sub(" {2,}", " ", text) if "  " in text else text
            text = text.lstrip(" ").rstrip(f" {SPACE}")
            is_empty = not text
        prefix = SPACE if self.has_prefix and not is_empty else ""
        return prefix + text.replace(" ", SPACE)
