"""Logits to tokens, for all rows of a step together.

Order of operations, as in transformers: penalties, logit bias, forbidden stops, temperature, top-k, top-p, min-p.
Each row is worked on by itself and each sequence draws its own numbers, so the token a sequence gets does not depend
on who shares the batch, nor on preemption.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from deltaserve.core import SamplingParams, TokenLogprob
from deltaserve.engine.draw import draw_filtered, draw_plain
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.token_counts import TokenCounts, penalize

_SLICE_ROWS = 64

_COLDEST = torch.finfo(torch.float32).tiny
"""A temperature below this would be zero in float32, and zero by zero is not a number. It is greedy long before."""


class Sampler:
    """Rows are float32 [R, vocab]. Keeps nothing between steps but a buffer; draws and counts are the sequences'."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        # Large tensors are fresh pages at every step otherwise.
        self._buffer: Tensor = torch.empty(0)

    @torch.inference_mode()
    def sample(self, rows: Tensor, seqs: Rows[Sequence]) -> list[int]:
        """One token per row; -1 where the logits are not numbers."""
        rows = self._adjust(rows, seqs)
        peaks = rows.amax(dim=-1)
        is_sound: list[bool] = peaks.isfinite().tolist()
        tokens = [-1] * len(seqs)
        greedy = [i for i, seq in enumerate(seqs) if is_sound[i] and seq.sampling.temperature == 0]
        drawn = [i for i, seq in enumerate(seqs) if is_sound[i] and seq.sampling.temperature > 0]
        if greedy:
            best = (rows if len(greedy) == len(seqs) else rows[greedy]).argmax(dim=-1)
            _put(tokens, greedy, best.tolist())
        for filtered in (False, True):
            some = [i for i in drawn if _is_filtered(seqs[i].sampling) == filtered]
            if some:
                _put(tokens, some, self._draw(rows, peaks, some, [seqs[i] for i in some], filtered=filtered))
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

    def _adjust(self, rows: Tensor, seqs: Rows[Sequence]) -> Tensor:
        """Penalties, bias and forbidden stops; the caller's rows stay as they are."""
        penalized = [i for i, seq in enumerate(seqs) if _is_penalized(seq.sampling)]
        biased = [i for i, seq in enumerate(seqs) if seq.sampling.logit_bias or _is_stop_forbidden(seq)]
        if not penalized and not biased:
            return rows
        rows = rows.clone()
        if penalized:
            some = [seqs[i] for i in penalized]
            rows[penalized] = penalize(
                rows[penalized], [self._counts(seq, rows.device) for seq in some], [seq.sampling for seq in some]
            )
        for i in biased:
            if seqs[i].sampling.logit_bias:
                ids, bias = zip(*seqs[i].sampling.logit_bias, strict=True)
                rows[i].index_add_(0, torch.tensor(ids, device=rows.device), torch.tensor(bias, device=rows.device))
            if _is_stop_forbidden(seqs[i]):
                # Tokenizers may know more tokens than the base has logits; those are never sampled anyway.
                rows[i, sorted(stop for stop in seqs[i].stop_token_ids if stop < self.vocab_size)] = float("-inf")
        return rows

    def _counts(self, seq: Sequence, device: torch.device) -> TokenCounts:
        if seq.counts is None:
            ids, split = seq.token_ids, seq.num_prompt_tokens
            seq.counts = TokenCounts(self.vocab_size, ids[:split], ids[split:], device)
        return seq.counts

    def _draw(
        self, rows: Tensor, peaks: Tensor, chosen: list[int], seqs: list[Sequence], *, filtered: bool
    ) -> list[int]:
        """Tokens of the ``chosen`` rows, whose sequences are ``seqs``."""
        if len(chosen) < len(rows):
            rows, peaks = rows[chosen], peaks[chosen]
        if self._buffer.numel() < rows.numel() or self._buffer.device != rows.device:
            self._buffer = torch.empty(rows.numel(), device=rows.device)
        weights = self._buffer[: rows.numel()].view(rows.shape)
        temperatures = torch.tensor([max(seq.sampling.temperature, _COLDEST) for seq in seqs], device=rows.device)
        # The peak goes first, so that a tiny temperature gives minus infinity, never infinity minus infinity.
        torch.sub(rows, peaks[:, None], out=weights)
        weights.div_(temperatures[:, None]).exp_()
        draws = [seq.rng.random() for seq in seqs]
        if filtered:
            return draw_filtered(weights, [seq.sampling for seq in seqs], draws)
        return draw_plain(weights, draws)


def _is_penalized(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _is_stop_forbidden(seq: Sequence) -> bool:
    return 0 < seq.sampling.min_tokens > seq.num_completion_tokens and bool(seq.stop_token_ids)


def _put(tokens: list[int], places: list[int], values: list[int]) -> None:
    for place, value in zip(places, values, strict=True):
        tokens[place] = value
