"""A probe while the engine works on it: one prompt, logits of every position, at lowest priority."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deltaserve.core import Binding, Logits, SamplingParams
from deltaserve.engine.sequence import Sequence

PROBE_DELAY_SECONDS = 2.0
"""A probe queues as if it had arrived this much later: behind every fresh request, but never behind all future ones."""


def make_probe_sequence(
    probe_id: str, prompt_ids: tuple[int, ...], binding: Binding, arrival_seconds: float, seq_id: int
) -> Sequence:
    """Samples nothing, enters no prefix cache."""
    return Sequence(
        seq_id=seq_id,
        request_id=probe_id,
        index=0,
        token_ids=list(prompt_ids),
        num_prompt_tokens=len(prompt_ids),
        sampling=SamplingParams(max_tokens=0),
        binding=binding,
        versions=binding.versions,
        priority=(arrival_seconds + PROBE_DELAY_SECONDS, seq_id),
        arrival_seconds=arrival_seconds,
        stop_token_ids=frozenset(),
        is_probe=True,
    )


@dataclass(slots=True, eq=False)
class LiveProbe:
    """Collects rows chunk by chunk; a preempted probe starts over."""

    seq: Sequence
    chunks: list[bytes] = field(default_factory=list)
    vocab_size: int = 0

    def collect(self, rows: Tensor, start: int) -> None:
        """Rows float32 [n, vocab] of the positions from ``start`` on."""
        if start == 0:
            self.chunks = []
        self.vocab_size = rows.shape[1]
        self.chunks.append(rows.contiguous().cpu().numpy().tobytes())

    def result(self) -> Logits:
        return Logits(self.seq.num_prompt_tokens, self.vocab_size, b"".join(self.chunks))
