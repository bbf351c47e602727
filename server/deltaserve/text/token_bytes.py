"""The bytes that one token stands for, which decoding its id alone cannot tell (half a character, a space)."""

from __future__ import annotations

import re
from functools import cache

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece-style vocabularies spell a single byte (byte fallback)."""


@cache
def _byte_of_symbol() -> dict[str, int]:
    """The inverse of GPT-2's byte-to-symbol table: printable Latin-1 stands for itself, the rest for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in printable)
    table.update({chr(0x100 + position): byte for position, byte in enumerate(hidden)})
    return table


def bytes_of_symbols(piece: str) -> bytes:
    """As a byte-level decoder reads a piece: symbols as their bytes; a piece with any other character as UTF-8."""
    table = _byte_of_symbol()
    found = [table.get(symbol) for symbol in piece]
    known = [byte for byte in found if byte is not None]
    return bytes(known) if len(known) == len(found) else piece.encode("utf-8", "replace")


def bytes_of_token(piece: str, *, is_byte_level: bool, is_byte_fallback: bool) -> bytes:
    """Bytes of the vocabulary entry ``piece`` (an ordinary token, not an added one)."""
    if is_byte_level:
        table = _byte_of_symbol()
        if all(symbol in table for symbol in piece):
            return bytes(table[symbol] for symbol in piece)
    if is_byte_fallback and (match := BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode("utf-8", "replace")
