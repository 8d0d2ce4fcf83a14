"""Texts cut at the added tokens in them, as the backend cuts them."""

import re
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer

from .regex import any_of

# Rust's white space, which lacks some of Python's.
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


class AddedToken(NamedTuple):
    content: str
    id: int
    lstrip: bool
    rstrip: bool


def added_tokens_in_raw_text(backend: Tokenizer) -> tuple[AddedToken, ...] | None:
    """The added tokens that the backend looks for now, or None if there is more to it than to find them in the text as it is."""
    tokens = backend.get_added_tokens_decoder().items()
    if any(
        token.normalized or token.single_word or token.content != token.content.strip(_SPACE) for _, token in tokens
    ):
        return None
    if backend.encode_special_tokens:
        return None if any(not token.special for _, token in tokens) else ()
    return tuple(AddedToken(token.content, index, token.lstrip, token.rstrip) for index, token in tokens)


def sections(text: str, tokens: tuple[AddedToken, ...]) -> list[str | int]:
    """The text's sections and between them the ids of the tokens, which may take the white space around them along."""
    find, by_name = _finder(tokens)
    parts = find.split(text)
    if len(parts) == 1:
        return [text]
    found: list[str | int] = []
    for at, part in enumerate(parts):
        if at % 2:
            found.append(by_name[part].id)
            continue
        part = part.lstrip(_SPACE) if at and by_name[parts[at - 1]].rstrip else part
        part = part.rstrip(_SPACE) if at + 1 < len(parts) and by_name[parts[at + 1]].lstrip else part
        if part:
            found.append(part)
    return found


@lru_cache(maxsize=16)
def _finder(tokens: tuple[AddedToken, ...]) -> tuple[re.Pattern[str], dict[str, AddedToken]]:
    by_name = {token.content: token for token in tokens}
    return re.compile(f"({any_of(by_name)})"), by_name
