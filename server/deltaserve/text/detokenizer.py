"""Token ids to text, piece by piece, so that the pieces joined equal the decoding of all ids at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
"""Tokens of the prompt shown to the decoder, so that a leading space of the first completion token survives."""
_MAX_HELD = 8
"""Tokens that end inside a character before the finished part of them is let out (a character has 4 bytes at most)."""
_MAX_HELD_BYTE_RUN = 64
"""The same for byte-fallback vocabularies, where one bad byte changes how the whole run of byte tokens is decoded."""


class _Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...
    def is_special(self, token_id: int) -> bool: ...
    def is_byte_token(self, token_id: int) -> bool: ...
    def is_known(self, token_id: int) -> bool: ...


class IncrementalDetokenizer:
    """Streaming decoder of one sequence.

    Two indices slide over the ids: text is the difference between decoding ``ids[context:]`` and
    ``ids[context:done]``, so every token is decoded beside its predecessors. Text that ends inside a UTF-8 character
    is held until the character is whole; ``finish`` lets out whatever is left.
    """

    def __init__(
        self, tokenizer: _Decoder, *, context_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = self._context(context_ids)
        self._done = len(self._ids)
        # A character cut in two by the end of the prompt is completed, and shown, by the completion.
        self._done_text = self._decode(self._ids).removesuffix(_REPLACEMENT)
        self.num_chars = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Adds ids and returns the text that is certain now, possibly empty. Many at once are decoded once."""
        visible = [token_id for token_id in token_ids if self._is_visible(token_id)]
        if not visible:
            return ""
        self._ids += visible
        text = self._advance()
        self.num_chars += len(text)
        return text

    def finish(self) -> str:
        """The text still held, with U+FFFD for bytes that never became a character."""
        text = self._take(len(self._ids)) if self._done < len(self._ids) else ""
        self.num_chars += len(text)
        return text

    def _advance(self) -> str:
        held = len(self._ids) - self._done
        if self._tokenizer.is_byte_token(self._ids[-1]):
            return self._take_stable_part() if held > _MAX_HELD_BYTE_RUN else ""
        if self._decode(self._ids).endswith(_REPLACEMENT):
            return self._take_stable_part() if held > _MAX_HELD else ""
        return self._take(len(self._ids))

    def _take_stable_part(self) -> str:
        """Lets out a long undecided run up to the last place where cutting it does not change its text."""
        whole = self._decode(self._ids[self._done :])
        for tail in range(1, 5):
            cut = len(self._ids) - tail
            if self._decode(self._ids[self._done : cut]) + self._decode(self._ids[cut:]) == whole:
                return self._take(cut)
        return ""

    def _take(self, stop: int) -> str:
        """Text of ``ids[done:stop]``; these ids become the context of the next ones."""
        text = self._decode(self._ids[:stop])
        delta = text[len(self._done_text) :] if text.startswith(self._done_text) else text
        self._ids = self._ids[self._done :]
        self._done = stop - self._done
        self._done_text = self._decode(self._ids[: self._done])
        return delta

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last visible ids of the prompt, reaching back to the beginning of a run of byte tokens."""
        visible = [i for i in prompt_ids[-4 * _MAX_HELD_BYTE_RUN :] if self._is_visible(i)]
        start = max(0, len(visible) - _CONTEXT_TOKENS)
        while start > 0 and self._tokenizer.is_byte_token(visible[start]):
            start -= 1
        return visible[start:]

    def _is_visible(self, token_id: int) -> bool:
        if self._skip and self._tokenizer.is_special(token_id):
            return False
        return self._tokenizer.is_known(token_id)
