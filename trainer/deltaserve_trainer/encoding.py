"""Rows to token ids, with the tokens that carry loss marked.

The prompt part of a row gets exactly the tokens that the server computes for that prompt, so that training and
serving see the same thing; the trained part ends with the end-of-sequence token, so that answers end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve_trainer.data import DataFormat, Example
from deltaserve_trainer.errors import TrainingError


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """``trained[i]`` says whether predicting token i counts. ``num_prompt_tokens`` precede the first trained one."""

    line: int
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    is_truncated: bool

    @property
    def num_trained(self) -> int:
        """Tokens with loss; the first token of a sequence has nothing to be predicted from."""
        return sum(self.trained[1:])

    @property
    def num_prompt_tokens(self) -> int:
        return self.trained.index(True) if True in self.trained else len(self.trained)


class Encoder:
    """Renders and tokenises with the base's own tokenizer and chat template; cuts rows at ``max_length`` tokens."""

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...], max_length: int) -> None:
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._max_length = max_length

    @classmethod
    def from_folder(cls, base_folder: Path, max_length: int) -> Encoder:
        """Reads tokenizer and end tokens of a base from disk; never from the network."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(base_folder), local_files_only=True)
        eos = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        for name in ("generation_config.json", "config.json"):
            path = base_folder / name
            value = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
            eos.update([value] if isinstance(value, int) else value or ())
        if not eos:
            raise TrainingError("the base has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        first = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(eos)
        return cls(tokenizer, (first, *sorted(eos - {first})), max_length)

    @property
    def pad_token_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(pad) if pad is not None else self._eos[0]

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded example, or one per trained turn where the template rewrites earlier turns."""
        if example.format is DataFormat.MESSAGES:
            return self._encode_chat(example)
        if example.format is DataFormat.TEXT:
            ids = self._ids(example.turns[0].content, special=True)
            pieces = [(ids, True)]
        else:
            prompt, completion = example.turns
            before = self._ids(prompt.content, special=True)
            pieces = [(before, False), (self._continuation(before, prompt.content, completion.content, True), True)]
        if pieces[-1][0][-1:] != [self._eos[0]]:
            pieces.append(([self._eos[0]], True))
        return [self._finish(example.line, pieces)]

    def prompt_ids(self, example: Example) -> tuple[int, ...]:
        """What the server would be sent for this row: everything before the last trained turn."""
        last = max(i for i, turn in enumerate(example.turns) if turn.is_trained)
        if example.format is DataFormat.MESSAGES:
            return tuple(self._ids(self._render(example, last, generation=True), special=False))
        return tuple(self._ids(example.turns[0].content, special=True))

    def decode(self, ids: list[int] | tuple[int, ...], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos

    def _encode_chat(self, example: Example) -> list[EncodedExample]:
        trained = [i for i, turn in enumerate(example.turns) if turn.is_trained]
        spans = [(self._render(example, i, generation=True), self._render(example, i + 1)) for i in trained]
        for before, after in spans:
            if not after.startswith(before):
                raise TrainingError(
                    f"line {example.line}: the base's chat template does not continue its own generation prompt, so "
                    "the answer cannot be told from the prompt; use prompt/completion rows for this base"
                )
        last = spans[-1][1]
        if all(last.startswith(after) for _, after in spans):
            return [self._finish(example.line, self._pieces(spans))]
        return [self._finish(example.line, self._pieces([span])) for span in spans]

    def _pieces(self, spans: list[tuple[str, str]]) -> list[tuple[list[int], bool]]:
        pieces: list[tuple[list[int], bool]] = []
        ids: list[int] = []
        text = ""
        for before, after in spans:
            for target, is_trained in ((before, False), (after, True)):
                piece = self._continuation(ids, text, target[len(text) :], False)
                ids, text = ids + piece, target
                if is_trained:
                    answer, tail = self._cut_after_end(piece)
                    pieces += [(answer, True), (tail, False)]
                else:
                    pieces.append((piece, False))
        if not any(token in self._eos for token in piece):
            pieces.append(([self._eos[0]], True))
        return pieces

    def _cut_after_end(self, piece: list[int]) -> tuple[list[int], list[int]]:
        """What a template writes after the end token (often a newline) is never generated, so it is not trained."""
        ends = [i for i, token in enumerate(piece) if token in self._eos]
        end = ends[-1] + 1 if ends else len(piece)
        return piece[:end], piece[end:]

    def _render(self, example: Example, num_turns: int, *, generation: bool = False) -> str:
        if not self._tokenizer.chat_template:
            raise TrainingError("the base has no chat template; use prompt/completion or text rows")
        messages = [{"role": turn.role, "content": turn.content} for turn in example.turns[:num_turns]]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # jinja2 and the template's own raise_exception
            raise TrainingError(f"line {example.line}: the base's chat template refuses the row: {error}") from error
        return text

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        if special and len(ids) > 1 and ids[-1] in self._eos:
            return ids[:-1]  # tokenizers that close every text: the end is placed by encode()
        return ids

    def _continuation(self, before: list[int], before_text: str, text: str, special: bool) -> list[int]:
        """Tokens of ``text`` after ``before``: of the whole where it keeps ``before`` intact, else on its own."""
        whole = self._ids(before_text + text, special=special)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._ids(text, special=False)

    def _finish(self, line: int, pieces: list[tuple[list[int], bool]]) -> EncodedExample:
        ids = [token for piece, _ in pieces for token in piece]
        trained = [is_trained for piece, is_trained in pieces for _ in piece]
        cut = self._max_length
        return EncodedExample(line, tuple(ids[:cut]), tuple(trained[:cut]), len(ids) > cut)
