"""SentencePiece's compiled normalisation rules (`precompiled_charsmap`) as `tokenizers` normalisers."""

import struct

from tokenizers import normalizers


class CharsMap:
    """A `precompiled_charsmap`: the size of a Darts double array (uint32), the array, the replacement strings.

    A unit of the array (https://github.com/s-yata/darts-clone) holds the label of the edge into it (bits 0-7 and 31),
    whether a rule ends there (bit 8), and the offset to its children (bits 10-30, times 256 if bit 9 is set).
    """

    ENDS_RULE = 1 << 8

    def __init__(self, data: bytes):
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        if size % 4 or not 4 <= size <= len(data) - 4:
            raise ValueError("the SentencePiece model's precompiled_charsmap is damaged")
        self.units = list(struct.unpack_from(f"<{size // 4}I", data, 4))
        self.replacements = data[4 + size :]

    @staticmethod
    def _offset(unit: int) -> int:
        return (unit >> 10) << ((unit & (1 << 9)) >> 6)

    def _find(self, text: str) -> int | None:
        """Index of the unit that `text` leads to."""
        position = 0
        for byte in text.encode():
            position ^= self._offset(self.units[position]) ^ byte
            if position >= len(self.units) or self.units[position] & (1 << 31 | 0xFF) != byte:
                return None
        return position

    def without(self, texts: list[str]) -> "CharsMap":
        """The map without the rules for exactly these texts."""
        trimmed = CharsMap(self.to_bytes())
        for text in texts:
            position = self._find(text)
            if position is not None:
                trimmed.units[position] &= ~self.ENDS_RULE
        return trimmed

    def to_bytes(self) -> bytes:
        return struct.pack(f"<I{len(self.units)}I", 4 * len(self.units), *self.units) + self.replacements

    def normalizers(self, symbols: list[str]) -> list[normalizers.Normalizer]:
        """Normalisers that apply the rules to everything but the user-defined `symbols`."""
        return [normalizers.Precompiled(self.without([symbol for symbol in symbols if len(symbol) == 1]).to_bytes())]
