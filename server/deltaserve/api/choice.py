"""One returned sequence: its tokens turned into text, with stop strings applied, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaserve.core import FinishReason, SequenceDelta, TokenLogprob
from deltaserve.text import StopStrings, Tokenizer


@dataclass(slots=True)
class TokenEntry:
    """A completion token as log probabilities show it. ``text_offset``: characters of text before it."""

    token_id: int
    logprob: TokenLogprob | None
    text_offset: int


@dataclass(slots=True)
class ChoiceDelta:
    """What one step added to one choice. ``index`` counts over all prompts of the HTTP request.

    ``tokens`` is empty where nobody asked for them.
    """

    index: int
    text: str
    tokens: tuple[TokenEntry, ...]
    finish_reason: FinishReason | None = None


class Choice:
    """``min_tokens``: stop strings are looked for only in the text of later tokens. ``keeps_tokens``: deltas carry
    their tokens, for answers that tell log probabilities or ids.

    The token that ended a sequence is counted; it is part of the text only with ``include_stop``.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        keeps_tokens: bool = True,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._detokenizer = tokenizer.detokenizer(context_ids=prompt_ids, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stops, include=include_stop)
        self._keeps_tokens = keeps_tokens
        self._is_text_alone = not keeps_tokens and not stops

    def push(self, delta: SequenceDelta) -> ChoiceDelta | None:
        """The addition to show, or None once the choice has ended. Tokens after a stop string are not counted."""
        if self.finish_reason is not None:
            return None
        text = ""
        entries: list[TokenEntry] = []
        if self._is_text_alone:  # all at once: a whole answer comes in one delta
            self.num_tokens += len(delta.token_ids)
            text = self._detokenizer.push(delta.token_ids)
            if delta.finish_reason is None:
                return ChoiceDelta(self.index, text, ())
        else:
            logprobs: Sequence[TokenLogprob | None] = delta.logprobs or (None,) * len(delta.token_ids)
            for token_id, logprob in zip(delta.token_ids, logprobs, strict=True):
                self.num_tokens += 1
                if self._keeps_tokens:
                    entries.append(TokenEntry(token_id, logprob, self._detokenizer.num_chars))
                text += self._filter(self._detokenizer.push((token_id,)))
                if self._stops.matched is not None:
                    self.finish_reason = FinishReason.STOP
                    return ChoiceDelta(self.index, text, tuple(entries), self.finish_reason)
        if delta.stop_token_id is not None:
            self.num_tokens += 1
            if self._include_stop:
                text += self._filter(self._detokenizer.push((delta.stop_token_id,)))
        if delta.finish_reason is not None:
            text += self._finish(delta.finish_reason)
        return ChoiceDelta(self.index, text, tuple(entries), self.finish_reason)

    def _finish(self, reason: FinishReason) -> str:
        text = self._filter(self._detokenizer.finish())
        self.finish_reason = FinishReason.STOP if self._stops.matched is not None else reason
        return text + self._stops.flush()

    def _filter(self, piece: str) -> str:
        return piece if self.num_tokens <= self._min_tokens else self._stops.push(piece)
