"""Small things about `tokenizers`: backends, their parts and added tokens."""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors


def like(backend: Tokenizer, added: Iterable[AddedToken]) -> Tokenizer:
    """Another backend that finds the same tokens in a text but for these added ones, and puts nothing around it."""
    other = Tokenizer(backend.model)
    other.normalizer, other.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    other.add_tokens(list(added))
    return other


@lru_cache(maxsize=16)
def read_state(state: bytes) -> dict[str, Any]:
    """What a part of a backend says of itself; not to be changed."""
    return json.loads(state)


def surround_texts(backend: Tokenizer, single: Sequence[str], pair: Sequence[str]) -> None:
    """Makes `backend` put special tokens around texts: `["[CLS]", "$A", "[SEP]"]`, and around pairs `$A` and `$B`."""
    names = sorted({name for name in (*single, *pair) if not name.startswith("$")})
    backend.post_processor = processors.TemplateProcessing(
        single=list(single), pair=list(pair), special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )


def with_changes(token: str | AddedToken, **changes: Any) -> AddedToken:
    token = AddedToken(token) if isinstance(token, str) else token
    return AddedToken(**token.__getstate__() | changes)


def taking_spaces(token: str) -> AddedToken:
    """A special token that takes the white space around it with it."""
    return AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
