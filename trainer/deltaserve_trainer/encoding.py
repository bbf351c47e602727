"""Rows to token ids, with the tokens that carry loss marked.

The server's own tokenizer and chat rendering are used, so the prompt part of a row gets exactly the tokens that
serving computes for that prompt; the trained part ends with the end-of-sequence token, so that answers end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaserve.errors import DeltaserveError
from deltaserve.text import Tokenizer
from deltaserve_trainer.data import DataFormat, Example
from deltaserve_trainer.errors import TrainingError

Ids = list[int]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """``trained[i]`` says whether predicting token i counts."""

    line: int
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    is_truncated: bool

    @property
    def num_trained(self) -> int:
        """Tokens with loss; the first token of a sequence has nothing to be predicted from."""
        return sum(self.trained[1:])


class Encoder:
    """Renders and tokenises with the base's own tokenizer and chat template; cuts rows at ``max_length`` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        if not tokenizer.eos_token_ids:
            raise TrainingError("the base has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_ids[0]
        self._max_length = max_length

    @classmethod
    def from_folder(cls, base_folder: Path, max_length: int) -> Encoder:
        """Reads the tokenizer of a base from disk; never from the network. Rows never exceed the base's context."""
        return cls(Tokenizer.from_folder(base_folder), min(max_length, _context_length(base_folder) or max_length))

    @property
    def pad_token_id(self) -> int:
        """Fills rows on the right, where nothing sees it."""
        return self._end

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._tokenizer.eos_token_ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded example, or one per trained turn where the template rewrites earlier turns."""
        if example.format is DataFormat.MESSAGES:
            return self._encode_chat(example)
        if example.format is DataFormat.TEXT:
            return [self._finish(example.line, [(self._prompt(example.turns[0].content), True)])]
        prompt, completion = (turn.content for turn in example.turns)
        before = self._prompt(prompt)
        whole = self._prompt(prompt + completion)
        # Where a token would span the border, the completion is encoded on its own: the served prompt ends there too.
        after = whole[len(before) :] if whole[: len(before)] == before else self._plain(completion)
        return [self._finish(example.line, [(before, False), (after, True)])]

    def prompt_ids(self, example: Example) -> tuple[int, ...]:
        """What the server would compute for this row: everything before the last trained turn (for text: the text)."""
        if example.format is DataFormat.MESSAGES:
            last = max(i for i, turn in enumerate(example.turns) if turn.is_trained)
            return tuple(self._render(example, last, is_prompt=True))
        return tuple(self._prompt(example.turns[0].content))

    def _encode_chat(self, example: Example) -> list[EncodedExample]:
        trained = [i for i, turn in enumerate(example.turns) if turn.is_trained]
        spans = [self._span(example, i) for i in trained]
        last = spans[-1][1]
        if all(last[: len(after)] == after for _, after in spans):
            return [self._finish(example.line, self._pieces(spans))]
        return [self._finish(example.line, self._pieces([span])) for span in spans]

    def _span(self, example: Example, turn: int) -> tuple[int, Ids]:
        """(where the answer of ``turn`` starts, ids of the chat up to and with it)."""
        before, after = self._render(example, turn, is_prompt=True), self._render(example, turn + 1)
        start = 0
        while start < min(len(before), len(after)) and before[start] == after[start]:
            start += 1
        if start < len(before) and not self.decode(after).startswith(self.decode(before)):
            raise TrainingError(
                f"line {example.line}: the base's chat template does not continue its own generation prompt, so "
                "the answer cannot be told from the prompt; use prompt/completion rows for this base"
            )
        return start, after

    def _pieces(self, spans: list[tuple[int, Ids]]) -> list[tuple[Ids, bool]]:
        """What a template writes after the end token (often a newline) is never generated, so it is not trained."""
        pieces: list[tuple[Ids, bool]] = []
        done = 0
        for start, after in spans:
            answer = after[start:]
            ends = [i for i, token in enumerate(answer) if token in self.eos_token_ids]
            cut = ends[-1] + 1 if ends else len(answer)
            pieces += [(after[done:start], False), (answer[:cut], True), (answer[cut:], False)]
            done = len(after)
        return pieces

    def _render(self, example: Example, num_turns: int, *, is_prompt: bool = False) -> Ids:
        messages = [{"role": turn.role, "content": turn.content} for turn in example.turns[:num_turns]]
        try:
            return self._tokenizer.render_chat(messages, add_generation_prompt=is_prompt)
        except DeltaserveError as error:
            raise TrainingError(f"line {example.line}: {error.message}") from error

    def _prompt(self, text: str) -> Ids:
        ids = self._tokenizer.encode(text)
        # Some tokenizers close every text; a prompt stays open and the end is placed by _finish.
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.eos_token_ids else ids

    def _plain(self, text: str) -> Ids:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _finish(self, line: int, pieces: list[tuple[Ids, bool]]) -> EncodedExample:
        if not any(token in self.eos_token_ids for piece, is_trained in pieces[-2:] if is_trained for token in piece):
            pieces = [*pieces, ([self._end], True)]
        ids = [token for piece, _ in pieces for token in piece]
        trained = [is_trained for piece, is_trained in pieces for _ in piece]
        cut = self._max_length
        return EncodedExample(line, tuple(ids[:cut]), tuple(trained[:cut]), len(ids) > cut)


def _context_length(base_folder: Path) -> int | None:
    """Positions the base knows, in tokens; None where its config names no limit."""
    config = json.loads((base_folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    return config.get("max_position_embeddings") or config.get("n_positions")
