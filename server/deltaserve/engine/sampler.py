"""Logits to tokens, for all rows of a step together.

Order of operations, as in transformers: penalties, logit bias, forbidden stops, temperature, top-k, top-p, min-p.
Each row is reduced on its own and each sequence draws its own numbers, so the token a sequence gets does not depend on
who shares the batch, nor on preemption.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from deltaserve.core import TokenLogprob
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.token_counts import TokenCounts

NUM_CANDIDATES = 256
"""Filters look at this many best tokens first; a row that keeps them all is looked at whole."""

_SLICE_ROWS = 64


class Sampler:
    """Rows are float32 [R, vocab]. Stateless but for what it keeps inside the sequences (draws, counts)."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @torch.inference_mode()
    def sample(self, rows: Tensor, seqs: Rows[Sequence]) -> list[int]:
        """One token per row; -1 where the logits are not numbers."""
        rows = self._adjust(rows, seqs)
        best = rows.argmax(dim=-1)
        is_sound = rows.gather(1, best[:, None])[:, 0].isfinite()
        tokens: list[int] = torch.where(is_sound, best, -1).tolist()
        drawn = [i for i, seq in enumerate(seqs) if seq.sampling.temperature > 0 and tokens[i] >= 0]
        if drawn:
            chosen = self._draw(rows[drawn] if len(drawn) < len(tokens) else rows, [seqs[i] for i in drawn])
            for i, token in zip(drawn, chosen, strict=True):
                tokens[i] = token
        for seq, token in zip(seqs, tokens, strict=True):
            if seq.counts is not None and token >= 0:
                seq.counts.add(token)
        return tokens

    @torch.inference_mode()
    def logprobs(self, rows: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprob]:
        """Log probabilities of ``token_ids`` under rows as the model gave them, with ``num_top`` best alternatives."""
        found: list[TokenLogprob] = []
        for begin in range(0, len(token_ids), _SLICE_ROWS):
            part = rows[begin : begin + _SLICE_ROWS]
            ids = torch.tensor(token_ids[begin : begin + _SLICE_ROWS], device=rows.device)
            logprobs = torch.log_softmax(part, dim=-1, dtype=torch.float32)
            own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
            values, indices = logprobs.topk(min(num_top, self.vocab_size), dim=-1)
            tops = zip(indices.tolist(), values.tolist(), strict=True)
            for token_id, value, (best, best_values) in zip(ids.tolist(), own, tops, strict=True):
                found.append(TokenLogprob(token_id, value, tuple(zip(best, best_values, strict=True))))
        return found

    # ------------------------------------------------------------ before the choice

    def _adjust(self, rows: Tensor, seqs: Rows[Sequence]) -> Tensor:
        """Penalties, bias and forbidden stops; the caller's rows stay as they are."""
        changed: Tensor | None = None
        for i, seq in enumerate(seqs):
            row = self._adjusted(rows[i], seq)
            if row is not None:
                changed = rows.clone() if changed is None else changed
                changed[i] = row
        return rows if changed is None else changed

    def _adjusted(self, row: Tensor, seq: Sequence) -> Tensor | None:
        sampling = seq.sampling
        is_penalized = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        is_stop_forbidden = seq.num_completion_tokens < sampling.min_tokens and bool(seq.stop_token_ids)
        if not (is_penalized or sampling.logit_bias or is_stop_forbidden):
            return None
        row = row.clone()
        if is_penalized:
            if seq.counts is None:
                ids, split = seq.token_ids, seq.num_prompt_tokens
                seq.counts = TokenCounts(self.vocab_size, ids[:split], ids[split:], row.device)
            row = seq.counts.penalize(
                row,
                repetition=sampling.repetition_penalty,
                presence=sampling.presence_penalty,
                frequency=sampling.frequency_penalty,
            )
        for token_id, bias in sampling.logit_bias:
            row[token_id] += bias
        if is_stop_forbidden:
            row[torch.tensor(sorted(seq.stop_token_ids), device=row.device)] = float("-inf")
        return row

    # ------------------------------------------------------------ the choice

    def _draw(self, rows: Tensor, seqs: Rows[Sequence]) -> list[int]:
        """Invert each row's cumulative distribution at the sequence's next uniform number."""
        sampling = [seq.sampling for seq in seqs]
        draws = [seq.rng.random() for seq in seqs]
        temperatures = torch.tensor([s.temperature for s in sampling], device=rows.device)[:, None]
        # The maximum goes first, so that a tiny temperature gives minus infinity, never infinity minus infinity.
        weights = ((rows - rows.amax(dim=-1, keepdim=True)) / temperatures).exp_()
        filtered = [i for i, s in enumerate(sampling) if s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0]
        plain = sorted(set(range(len(seqs))) - set(filtered))
        tokens = [0] * len(seqs)
        if plain:
            cumulative = weights[plain].cumsum(dim=-1, dtype=torch.float64)
            chosen = _invert(cumulative, cumulative[:, -1], [draws[i] for i in plain])
            for i, token in zip(plain, chosen.tolist(), strict=True):
                tokens[i] = token
        if filtered:
            chosen_ids = self._draw_filtered(
                weights[filtered], [seqs[i] for i in filtered], [draws[i] for i in filtered]
            )
            for i, token in zip(filtered, chosen_ids, strict=True):
                tokens[i] = token
        return tokens

    def _draw_filtered(self, weights: Tensor, seqs: Rows[Sequence], draws: list[float]) -> list[int]:
        """Top-k, top-p and min-p each keep a head of the row sorted by weight; draw from the shortest head."""
        totals = weights.cumsum(dim=-1, dtype=torch.float64)[:, -1]
        num_candidates = min(NUM_CANDIDATES, self.vocab_size)
        best, ids = weights.topk(num_candidates, dim=-1)
        tokens, num_kept = _draw_heads(best, ids, totals, seqs, draws)
        if num_candidates < self.vocab_size:
            for i, seq in enumerate(seqs):
                if num_kept[i] == num_candidates and not 0 < seq.sampling.top_k <= num_candidates:
                    whole, whole_ids = weights[i : i + 1].sort(dim=-1, descending=True, stable=True)
                    tokens[i] = _draw_heads(whole, whole_ids, totals[i : i + 1], [seq], [draws[i]])[0][0]
        return tokens


def _draw_heads(
    best: Tensor, ids: Tensor, totals: Tensor, seqs: Rows[Sequence], draws: list[float]
) -> tuple[list[int], list[int]]:
    """``best`` [n, c] weights in descending order (the largest is 1), ``ids`` their tokens, ``totals`` float64 [n] the
    sums of whole rows. Returns the tokens drawn and how many candidates each row kept."""
    num_candidates = best.shape[1]
    sampling = [seq.sampling for seq in seqs]

    def column(values: Rows[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=best.device)[:, None]

    top_k = column([min(s.top_k, num_candidates) or num_candidates for s in sampling], torch.int64)
    has_top_k = column([0 < s.top_k <= num_candidates for s in sampling], torch.bool)
    cumulative = best.cumsum(dim=-1, dtype=torch.float64)
    # What top-p is a share of: everything that top-k left.
    mass = torch.where(has_top_k, cumulative.gather(1, top_k - 1), totals[:, None])
    keep = torch.arange(num_candidates, device=best.device) < top_k
    keep &= cumulative - best < column([s.top_p for s in sampling], torch.float64) * mass
    keep &= best >= column([s.min_p for s in sampling], best.dtype)
    keep[:, 0] = True
    num_kept = keep.sum(dim=-1)
    position = _invert(cumulative, cumulative.gather(1, num_kept[:, None] - 1)[:, 0], draws)
    return ids.gather(1, position[:, None])[:, 0].tolist(), num_kept.tolist()


def _invert(cumulative: Tensor, masses: Tensor, draws: list[float]) -> Tensor:
    """First index [n] at which ``cumulative`` [n, c] exceeds ``draws`` (each in [0, 1)) times ``masses`` [n]."""
    targets = torch.tensor(draws, dtype=torch.float64, device=cumulative.device) * masses
    targets = torch.minimum(targets, torch.nextafter(masses, torch.zeros_like(masses)))
    return torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
