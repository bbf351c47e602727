"""Streaming decoder for tokenizers whose decoder is GPT-2's byte level: one table look-up a token.

Such a decoder joins the bytes of all tokens and reads them as UTF-8, so a token's bytes never depend on its neighbours
and nothing has to be decoded a second time, as ``IncrementalDetokenizer`` must for every other family.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

_LONGEST_CUT = 3
"""Bytes of a character that are not yet all of it, at most: where a character begins is plain from its bytes."""


class VisibleToken(NamedTuple):
    """``text`` is None where the bytes are not whole characters."""

    data: bytes
    text: str | None


_NOTHING = VisibleToken(b"", "")


class ByteTable(dict[int, VisibleToken]):
    """``VisibleToken`` by id, filled as ids are met; ids that are unknown or not to be shown are empty.

    ``bytes_of``: the bytes of a known id, else None.
    """

    def __init__(self, bytes_of: Callable[[int], bytes | None], hidden: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(hidden, _NOTHING))
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> VisibleToken:
        data = self._bytes_of(token_id)
        if data is None:  # not kept: prompts are read before their ids are checked, and there are endless such ids
            return _NOTHING
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = None
        entry = self[token_id] = VisibleToken(data, text)
        return entry


class ByteDetokenizer:
    """Streaming decoder of one sequence; the same face and the same text as ``IncrementalDetokenizer``.

    Bytes that begin a character are held until it is whole; bytes that cannot become one are U+FFFD at once.
    """

    def __init__(self, table: ByteTable, *, context_ids: Sequence[int] = ()) -> None:
        self._table = table
        # A character cut in two by the end of the prompt is completed, and shown, by the completion.
        self._held = self._cut_character(context_ids) if context_ids else b""
        self.num_chars = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Adds ids and returns the text that is certain now, possibly empty."""
        text = ""
        for token_id in token_ids:
            data, whole = self._table[token_id]
            if whole is not None and not self._held:
                text += whole
            elif data:
                data = self._held + data
                piece, num_read = utf_8_decode(data, "replace", False)
                self._held = data[num_read:]
                text += piece
        self.num_chars += len(text)
        return text

    def finish(self) -> str:
        """The text still held: U+FFFD for bytes that never became a character."""
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        self.num_chars += len(text)
        return text

    def _cut_character(self, prompt_ids: Sequence[int]) -> bytes:
        data = b""
        for token_id in reversed(prompt_ids):
            data = self._table[token_id][0] + data
            if len(data) >= _LONGEST_CUT:
                break
        _, num_read = utf_8_decode(data, "replace", False)
        return data[num_read:]
