"""Byte-level BPE from a tiktoken file: reading it, and the merges that its ranks stand for.

A `.tiktoken` file holds one token a line, its bytes in base64 and its rank (which is also its id). tiktoken encodes by
joining, again and again, the leftmost pair of neighbors whose joined bytes have the lowest rank. The Rust `tokenizers`
library encodes the same way, from a list of merges (a, b) in order of priority. So the merges must be found: which of
the ways to split a token into two others is the one that tiktoken ever takes?

*There is at most one per token.* While tiktoken works on a text, the merges inside the bytes of a token X that comes to
be formed are the very merges, in the same order, that it does on the bytes of X alone: nothing outside takes part, or X
would not be formed. So the last merge of X's own encoding, (a, b), is the only pair that ever becomes X. `merges_of`
finds it for every token; pairs sorted by the rank of what they form then give tiktoken's ids for every text.
"""

import os
import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

# The original's: words with one leading mark, single digits, runs of punctuation, white space.
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_ID = 2**20 - 1

_LINE = re.compile(rb"(?i)((?:[a-z0-9+/]{4})*[a-z0-9+/]{2}(?:[a-z0-9+/]{2}|[a-z0-9+/]=|==))[ \t]+([0-9]+)[ \t]*")
# GPT-2's table: a byte that is printable in Latin-1 stands for itself, the others take the characters from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = count(0x100)
_BYTE_TO_CHAR = {byte: chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256)}
_CHAR_TO_BYTE = {ord(char): byte for byte, char in _BYTE_TO_CHAR.items()}


def to_name(token: bytes) -> str:
    """The token as the backend writes it: one printable character for each byte."""
    return token.decode("latin-1").translate(_BYTE_TO_CHAR)


def to_bytes(name: str) -> bytes:
    """The bytes of a token that the backend writes as `name`. Characters outside the table stand for themselves."""
    try:
        return name.translate(_CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()


def gap_name(index: int) -> str:
    """The name of an id that no token uses, between extra tokens. No text is encoded to it."""
    return f"<|unused_{index}|>"


def read_tiktoken(path: str | os.PathLike) -> dict[bytes, int]:
    """Read a `.tiktoken` file: token bytes -> rank.

    Raises:
        ValueError: a line is not `<base64> <rank>`, or a token or a rank stands in two lines; it is named.
    """
    ranks: dict[bytes, int] = {}
    line_of: dict[bytes | int, int] = {}

    def damaged(fault: str) -> ValueError:
        return ValueError(f"{path}: {fault}. Download the file again, or give every token one line and one rank.")

    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        parsed = _LINE.fullmatch(line)
        if parsed is None:
            raise damaged(f"line {number} is damaged: expected '<token in base64> <rank>', found {line[:80]!r}")
        token, rank = a2b_base64(parsed[1]), int(parsed[2])
        if rank > MAX_ID:
            raise damaged(f"line {number}: rank {rank} is out of range, the largest id is {MAX_ID}")
        for key in (token, rank):
            if key in line_of:
                kind = "token" if key is token else "rank"
                raise damaged(f"line {number}: the {kind} {key!r} stands in line {line_of[key]} already")
            line_of[key] = number
        ranks[token] = rank
    if not ranks:
        raise damaged("the file holds no tokens")
    return ranks


def write_tiktoken(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    """Write `ranks` as `read_tiktoken` reads it, in the order of the ranks."""
    lines = (b"%s %d\n" % (b2a_base64(token, newline=False), rank) for token, rank in by_rank(ranks))
    Path(path).write_bytes(b"".join(lines))


def by_rank(ranks: dict[bytes, int]) -> list[tuple[bytes, int]]:
    return sorted(ranks.items(), key=lambda item: item[1])


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For every token the pair that tiktoken joins into it, in order of rank (see the module's docstring).

    Every token is encoded as tiktoken does it, which shows its last merge. One that its own bytes are not encoded to is
    never formed and has none.
    """
    merges, none = [], MAX_ID + 1
    for token, _ in by_rank(ranks):
        parts = [token[i : i + 1] for i in range(len(token))]
        pairs = [ranks.get(token[i : i + 2], none) for i in range(len(token) - 1)]  # of each part with the next
        while len(parts) > 2 and (lowest := min(pairs)) < none:
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del pairs[at]
            if at > 0:
                pairs[at - 1] = ranks.get(parts[at - 1] + parts[at], none)
            if at < len(pairs):
                pairs[at] = ranks.get(parts[at] + parts[at + 1], none)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def build_backend(ranks: dict[bytes, int], special_tokens: Sequence[str]) -> Tokenizer:
    """The Rust tokenizer that gives tiktoken's ids: NFC, the special tokens, Qwen's pattern, BPE.

    The special tokens take the first free ids. They are matched in the normal form of the text, like the original's
    (`normalized=True`): a `>` that the next character composes with does not end one.

    Raises:
        ValueError: a byte has no token, or an id or a name of a special token is taken.
    """
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"The vocabulary has no token for {len(missing)} of the 256 bytes (the first is {missing[0]})."
        )
    used = set(ranks.values())
    start = next(i for i in count() if i not in used)
    specials = {name: start + i for i, name in enumerate(special_tokens)}
    if clash := used.intersection(specials.values()):
        raise ValueError(
            f"No token has the rank {start}, so the {len(specials)} special tokens take the ids {start} to "
            f"{start + len(specials) - 1}, but {min(clash)} is the rank of a token. Either lines are missing from the "
            "vocabulary file, or the ids of an extra vocabulary must come after the special tokens."
        )
    names = {token: to_name(token) for token in ranks}
    if taken := set(names.values()).intersection(specials):
        raise ValueError(f"{min(taken)} is a special token and cannot be an ordinary token too.")
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    if len(vocabulary) > start:
        # Extra tokens come after the special tokens. The backend numbers what is added by the size of the model's
        # vocabulary, so that must know the special tokens, and have no gaps.
        vocabulary |= specials
        gaps = set(range(max(used))) - used - set(specials.values())
        vocabulary |= {gap_name(i): i for i in gaps}

    merges = [(names[a], names[b]) for a, b in merges_of(ranks)]
    # ignore_merges: a whole word that is a token is that token, formed by merges or not
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=True) for name in specials])
    return backend
