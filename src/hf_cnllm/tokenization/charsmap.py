"""SentencePiece's compiled normalization rules (`precompiled_charsmap`), exactly, as `tokenizers` normalizers.

SentencePiece replaces, from left to right, the longest text that a rule is for. The rules of `nfkc` and `nmt_nfkc` are
of two kinds: for single characters, and for every spelling of a composed character (`e` + `◌́`, `ﾊ` + `ﾞ`, Hangul jamo).

The Rust `Precompiled` normalizer looks rules up for whole grapheme clusters and takes the shortest one that fits, which
is right only where a cluster is one character. So the clusters are taken apart for it, and NFC does the composing:

1. `BORDER`, which no rule knows, goes wherever the rules do not compose two neighbors though NFC might;
2. `APART`, another such character, goes between the characters of every cluster;
3. `Precompiled` applies the rules for single characters;
4. `APART` goes, and NFC composes what is left adjacent: the result of the longest rule, since all are compositions;
5. `BORDER` goes.
"""

import struct
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from tokenizers import Regex, normalizers

from .regex import any_of

# Characters that continue a grapheme cluster, or may in a later version of Unicode than the Rust side's. Every rule that
# composes has one of them in second place, or a jamo.
EXTENDS = r"\p{M}\p{Cn}\x{200C}\x{200D}\x{FF9E}\x{FF9F}\x{0E33}\x{0EB3}"
# Unassigned, and clusters of their own (Grapheme_Cluster_Break=Control). Both are lost from a text that has them.
APART, BORDER = "\U000e0ffe", "\U000e0fff"
LEADING_JAMO = range(0x1100, 0x1113)
FOLLOWING_JAMO = range(0x1161, 0x11C3)

DAMAGED = "its normalization rules are not a character map"


class CharsMap:
    """A `precompiled_charsmap`: the size of a Darts double array (uint32), the array, the replacement strings.

    A unit of the array (https://github.com/s-yata/darts-clone) holds the label of the edge into it (bits 0-7 and 31),
    whether a rule ends there (bit 8), and the offset to its children (bits 10-30, times 256 if bit 9 is set).

    Raises:
        ValueError: the bytes are not such a map.
    """

    ENDS_RULE = 1 << 8

    def __init__(self, data: bytes):
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        if size % 4 or not 4 <= size <= len(data) - 4:
            raise ValueError(DAMAGED)
        self.units = np.frombuffer(data, dtype="<u4", count=size // 4, offset=4)
        self.replacements = data[4 + size :]
        if not self._is_sound():
            raise ValueError(DAMAGED)
        self.characters, self.compositions = self._rules()

    def _is_sound(self) -> bool:
        """Whether every look-up stays inside the map: the Rust side does not check."""
        nodes = np.flatnonzero(self.units >> 31 == 0).astype(np.uint32)
        children = nodes ^ self._offsets(nodes)
        if not (children | 0xFF < len(self.units)).all():
            return False
        values = self.units[children[(self.units[nodes] & self.ENDS_RULE) != 0]] & 0x7FFFFFFF
        text = np.frombuffer(self.replacements, dtype=np.uint8)
        if not (values < len(text)).all() or not self.replacements.endswith(b"\0"):
            return False
        starts_inside_character = text[values] & 0xC0 == 0x80
        return not starts_inside_character.any() and _text(self.replacements) is not None

    def normalizers(self, symbols: list[str]) -> list[normalizers.Normalizer]:
        """Normalizers that apply the rules to everything but the user-defined `symbols`, which stay as they are."""
        return [
            normalizers.Replace(Regex(self._borders(symbols)), BORDER),
            normalizers.Replace(Regex(rf"(?<=\r)(?=\n)|(?<=[\s\S])(?=[{EXTENDS}])"), APART),
            normalizers.Precompiled(self._without([symbol for symbol in symbols if len(symbol) == 1])),
            normalizers.Replace(APART, ""),
            normalizers.NFC(),
            normalizers.Replace(BORDER, ""),
        ]

    def _rules(self) -> tuple[dict[str, str], dict[str, str]]:
        """The rules for single characters, and those for spellings of composed ones that do not begin with a jamo."""
        characters: dict[str, str] = {}
        compositions: dict[str, str] = {}
        labels = np.arange(1, 256, dtype=np.uint32)
        keys, nodes, visited = [b""], np.zeros(1, dtype=np.uint32), 1
        while keys:
            children = (nodes ^ self._offsets(nodes))[:, None] ^ labels
            rows, columns = np.nonzero((self.units[children] & 0x800000FF) == labels)
            nodes = children[rows, columns]
            visited += len(nodes)
            if visited > len(self.units):  # a loop
                raise ValueError(DAMAGED)
            keys = [
                keys[row] + bytes([column + 1]) for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
            ]
            ends = (self.units[nodes] & self.ENDS_RULE).astype(bool).tolist()
            kept = []
            for index, (key, is_rule) in enumerate(zip(keys, ends, strict=True)):
                text = _text(key)
                if text is not None and is_rule:
                    (characters if len(text) == 1 else compositions)[text] = self._replacement(nodes[index])
                if text is None or len(text) > 1 or not _is_jamo(characters.get(text, text), LEADING_JAMO):
                    kept.append(index)
            nodes, keys = nodes[kept], [keys[index] for index in kept]
        return characters, compositions

    def _offsets(self, nodes: np.ndarray) -> np.ndarray:
        units = self.units[nodes]
        return (units >> 10) << ((units & (1 << 9)) >> 6)

    def _replacement(self, node: np.ndarray) -> str:
        value = int(self.units[node ^ self._offsets(node)] & 0x7FFFFFFF)
        return self.replacements[value : self.replacements.index(b"\0", value)].decode()

    def _without(self, texts: list[str]) -> bytes:
        """The map's bytes without the rules for exactly these texts."""
        units = self.units.copy()
        for text in texts:
            node = np.uint32(0)
            for byte in text.encode():
                node = node ^ self._offsets(node) ^ np.uint32(byte)
                if units[node] & 0x800000FF != byte:
                    break
            else:
                units[node] &= ~np.uint32(self.ENDS_RULE)
        return struct.pack("<I", units.nbytes) + units.tobytes() + self.replacements

    def _borders(self, symbols: list[str]) -> str:
        """Pattern of the (empty) places for borders. `\\K` keeps what is before it out of the match, so a spelling that
        a rule composes is stepped over as a whole, and a border follows it."""
        bases = {text[0] for text in self.compositions}
        protected = [symbol for symbol in symbols if len(symbol) > 1 and symbol[-1] in bases]
        places = [rf"{any_of(protected)}(?=[{EXTENDS}])"] if protected else []
        places.append(rf"(?=[\s\S][{EXTENDS}])(?:{self._spellings()}|[\s\S])")
        # NFC would also add a jamo to a finished syllable, or to one from which a deleted character keeps it.
        closed = [text for text, to in self.characters.items() if not to or "가" <= to[-1] <= "힣"]
        following = [text for text, to in self.characters.items() if _is_jamo(to, FOLLOWING_JAMO)]
        places.append(rf"[가-힣{_class(closed)}](?=[\x{{1161}}-\x{{11C2}}{_class(following)}])")
        return "|".join(rf"{place}\K" for place in places)

    def _spellings(self) -> str:
        """Pattern of `compositions`, the longest first; bases that compose with the same marks share one branch."""
        marks = defaultdict(set)
        for text in self.compositions:
            marks[text[0]].add(text[1:])
        bases = defaultdict(list)
        for base, tails in marks.items():
            bases[frozenset(tails)].append(base)
        return "|".join(f"[{_class(group)}]{any_of(tails)}" for tails, group in bases.items())


@lru_cache(maxsize=4)  # reading a map takes a tenth of a second, and most vocabularies have the same
def read_charsmap(data: bytes) -> CharsMap:
    """[`CharsMap`] of `data`, to be read only."""
    return CharsMap(data)


def _text(key: bytes) -> str | None:
    """The key as text, None if it ends inside a character."""
    try:
        return key.decode()
    except UnicodeDecodeError:
        return None


def _is_jamo(text: str, jamo: range) -> bool:
    return bool(text) and ord(text[0]) in jamo


def _class(chars: Iterable[str]) -> str:
    return "".join(rf"\x{{{ord(char):X}}}" for char in sorted(chars))
