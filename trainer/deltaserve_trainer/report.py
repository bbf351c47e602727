"""The data doctor: what a data set looks like to the training loop, before any time is spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaserve_trainer.data import Dataset, Example
from deltaserve_trainer.encoding import EncodedExample, Encoder

MAX_LISTED_LINES = 20
NUM_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered row; ``is_trained`` stretches carry loss."""

    text: str
    is_trained: bool


@dataclass(frozen=True, slots=True)
class DataReport:
    """Findings over the training and held-out rows.

    ``histogram`` maps an upper length (a power of two, in tokens) to the number of rows up to it. Lines are those of
    the training file, at most ``MAX_LISTED_LINES`` of each kind.
    """

    format: str
    num_train_rows: int
    num_eval_rows: int
    num_train_tokens: int
    num_eval_tokens: int
    longest_row_tokens: int
    histogram: dict[int, int]
    truncated_share: float
    masked_token_share: float
    num_duplicates: int
    duplicate_lines: tuple[int, ...]
    num_empty_answers: int
    empty_answer_lines: tuple[int, ...]
    num_dropped: int
    dropped_lines: tuple[int, ...]
    num_leaked: int
    leaked_lines: tuple[int, ...]
    unused_keys: dict[str, int]
    samples: tuple[tuple[Segment, ...], ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each finding that deserves a look."""
        found = []
        if self.truncated_share:
            found.append(f"{self.truncated_share:.1%} of the rows are longer than max_length and are cut")
        if self.num_dropped:
            found.append(
                f"{self.num_dropped} rows have no trained token left inside max_length and are skipped: "
                f"lines {_lines(self.dropped_lines)}"
            )
        if self.num_duplicates:
            found.append(f"{self.num_duplicates} rows repeat an earlier row: lines {_lines(self.duplicate_lines)}")
        if self.num_empty_answers:
            found.append(f"{self.num_empty_answers} answers are empty: lines {_lines(self.empty_answer_lines)}")
        if self.num_leaked:
            found.append(f"{self.num_leaked} training prompts are also held out: lines {_lines(self.leaked_lines)}")
        if self.unused_keys:
            found.append("keys that are not used: " + ", ".join(f"{k} ({n} rows)" for k, n in self.unused_keys.items()))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "warnings": list(self.warnings)}


def encode_all(encoder: Encoder, examples: Sequence[Example]) -> tuple[list[EncodedExample], list[int]]:
    """(encoded examples that carry loss, lines of the others)."""
    encoded = [piece for example in examples for piece in encoder.encode(example)]
    dropped = [piece.line for piece in encoded if not piece.num_trained]
    return [piece for piece in encoded if piece.num_trained], dropped


def report_on(
    dataset: Dataset,
    train: Sequence[Example],
    held_out: Sequence[Example],
    encoded_train: Sequence[EncodedExample],
    encoded_eval: Sequence[EncodedExample],
    dropped: Sequence[int],
    encoder: Encoder,
) -> DataReport:
    """``train`` and ``held_out`` as read; ``encoded_*`` and ``dropped`` as ``encode_all`` returned them."""
    lengths = [len(piece.input_ids) for piece in encoded_train]
    seen: set[str] = set()
    duplicates = [e.line for e in train if e.digest in seen or seen.add(e.digest)]  # type: ignore[func-returns-value]
    empty = [e.line for e in train if any(turn.is_trained and not turn.content.strip() for turn in e.turns)]
    prompts = {e.prompt_digest for e in held_out}
    leaked = [e.line for e in train if e.prompt_digest in prompts]
    histogram = Counter(1 << (length - 1).bit_length() for length in lengths)
    num_tokens = sum(lengths)
    return DataReport(
        format=str(dataset.format),
        num_train_rows=len(train),
        num_eval_rows=len(held_out),
        num_train_tokens=num_tokens,
        num_eval_tokens=sum(len(piece.input_ids) for piece in encoded_eval),
        longest_row_tokens=max(lengths, default=0),
        histogram=dict(sorted(histogram.items())),
        truncated_share=sum(piece.is_truncated for piece in encoded_train) / max(1, len(encoded_train)),
        masked_token_share=1 - sum(piece.num_trained for piece in encoded_train) / max(1, num_tokens),
        num_duplicates=len(duplicates),
        duplicate_lines=tuple(duplicates[:MAX_LISTED_LINES]),
        num_empty_answers=len(empty),
        empty_answer_lines=tuple(empty[:MAX_LISTED_LINES]),
        num_dropped=len(dropped),
        dropped_lines=tuple(dropped[:MAX_LISTED_LINES]),
        num_leaked=len(leaked),
        leaked_lines=tuple(leaked[:MAX_LISTED_LINES]),
        unused_keys=dataset.unused_keys,
        samples=tuple(_segments(piece, encoder) for piece in encoded_train[:NUM_SAMPLES]),
    )


def _segments(piece: EncodedExample, encoder: Encoder) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    start = 0
    for i in range(1, len(piece.input_ids) + 1):
        if i == len(piece.input_ids) or piece.trained[i] != piece.trained[start]:
            segments.append(Segment(encoder.decode(piece.input_ids[start:i]), piece.trained[start]))
            start = i
    return tuple(segments)


def _lines(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines)) + (", ..." if len(lines) == MAX_LISTED_LINES else "")
