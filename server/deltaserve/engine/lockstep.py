"""The rows of one choice of an ensemble: a sequence for each member, which start, advance and end together.

All rows share one list of tokens, so what is drawn from the mix is there for every member at once. The first row leads:
the queue, sampling and books of the request know the others through it alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.core import Ensemble
from deltaserve.engine.mixing import mix
from deltaserve_kernels import upload

if TYPE_CHECKING:
    from deltaserve.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Lockstep:
    """``rows[k]`` is member k of ``ensemble``; at least one. ``versions``: of all rows, one after the other."""

    ensemble: Ensemble
    rows: tuple[Sequence, ...]
    versions: tuple[str, ...]
    _gathered: list[Tensor] = field(default_factory=list)

    @property
    def is_level(self) -> bool:
        """One token away from the next sample, the first included, in every row."""
        return all(row.num_uncomputed_tokens == 1 for row in self.rows)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that no row had to compute."""
        return min(row.num_cached_tokens for row in self.rows)

    def gather(self, logits: Tensor) -> Tensor | None:
        """A step's logits of one row after the other; the mix of all when the last row's have come."""
        self._gathered.append(logits)
        if len(self._gathered) < len(self.rows):
            return None
        gathered, self._gathered = self._gathered, []
        return mix(gathered, self.ensemble)


def join(rows: Items[Sequence], ensemble: Ensemble) -> None:
    """Bind new sequences to each other: one for each member, with consecutive ids and one list of tokens."""
    lockstep = Lockstep(ensemble, tuple(rows), tuple(version for row in rows for version in row.versions))
    for row in rows:
        row.lockstep = lockstep


def chunk_sizes(rows: Items[Sequence], num_tokens: int, num_all_rows: int) -> list[int]:
    """How many of its uncomputed tokens each row computes next, ``num_tokens`` together at most.

    Rows may begin at different places, by what the prefix cache has of each. No row gets its last token before all can,
    so that their logits come in one step. Where the prompt's own logits are mixed (``num_all_rows`` of them at most),
    every row computes the same tokens.
    """
    wanted = [row.num_uncomputed_tokens for row in rows]
    if rows[0].wants_all_rows:
        return [min(wanted[0], num_tokens // len(rows), num_all_rows // len(rows))] * len(rows)
    if sum(wanted) <= num_tokens:
        return wanted
    sizes = []
    for count in wanted:
        sizes.append(min(count - 1, num_tokens))
        num_tokens -= sizes[-1]
    return sizes


def mix_rows(logits: Tensor, seqs: Items[Sequence]) -> tuple[Tensor, list[Sequence]]:
    """``logits`` [R, vocab] of ``seqs`` -> one row for each choice, and the sequences that draw from them.

    Rows of an ensemble stand side by side and become one; all others keep their bits.
    """
    leads = [i for i, seq in enumerate(seqs) if seq.leads]
    kept = logits.index_select(0, upload(torch.tensor(leads), logits.device))
    for place, i in enumerate(leads):
        lockstep = seqs[i].lockstep
        if lockstep is not None:
            kept[place] = mix(torch.unbind(logits[i : i + len(lockstep.rows)]), lockstep.ensemble)
    return kept, [seqs[i] for i in leads]
