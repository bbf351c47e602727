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
from deltaserve.engine.draw import FilteredDraw, draw_plain
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.token_counts import TokenCounts, penalize
from deltaserve_kernels import upload

_SLICE_ROWS = 64

_COLDEST = torch.finfo(torch.float32).tiny
"""A temperature below this would be zero in float32, and zero by zero is not a number. It is greedy long before."""


class Sampler:
    """Rows are float32 [R, vocab]; in a step with an adapter that adds tokens they are wider, and minus infinity there
    in rows of others. Keeps nothing between steps but a buffer; draws and counts are the sequences'."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        # Large tensors are fresh pages at every step otherwise.
        self._buffer: Tensor = torch.empty(0)

    @torch.inference_mode()
    def sample(self, rows: Tensor, seqs: Rows[Sequence]) -> list[int]:
        """One token per row; -1 where the logits are not numbers."""
        rows = self._adjust(rows, seqs)
        peaks = rows.amax(dim=-1)
        is_sound = peaks.isfinite()
        groups: list[list[int]] = [[], [], []]
        for i, seq in enumerate(seqs):
            groups[0 if seq.sampling.temperature == 0 else 1 + _is_filtered(seq.sampling)].append(i)
        found: list[Tensor] = []
        filtered: FilteredDraw | None = None
        for kind, chosen in enumerate(groups):
            if not chosen:
                continue
            some, some_peaks, sound = rows, peaks, is_sound
            if len(chosen) < len(seqs):
                index = upload(torch.tensor(chosen), rows.device)
                some, some_peaks, sound = (every.index_select(0, index) for every in (rows, peaks, is_sound))
            if kind == 0:
                found.append(torch.where(sound, some.argmax(dim=-1), -1))
                continue
            params = [seqs[i].sampling for i in chosen]
            weights = self._weights(some, some_peaks, params)
            draws = [seqs[i].rng.random() for i in chosen]
            if kind == 1:
                found.append(torch.where(sound, draw_plain(weights, draws), -1))
            else:
                filtered = FilteredDraw(weights, params, draws)
                # A row that is not sound counts as finished.
                found += torch.where(sound, filtered.first, -1)
        # The one wait of a step: everything up to here is in the device's queue.
        drawn: list[int] = torch.cat(found).tolist()
        if filtered is not None:
            split = len(seqs) - len(groups[2])
            tokens_first, num_kept = drawn[split : len(seqs)], drawn[len(seqs) :]
            drawn[split:] = filtered.finish(tokens_first, num_kept)
        tokens = [-1] * len(seqs)
        for place, token in zip([i for chosen in groups for i in chosen], drawn, strict=True):
            tokens[place] = token
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
            ids = upload(torch.tensor(token_ids[begin : begin + _SLICE_ROWS]), rows.device)
            logprobs = self._log_softmax(part)
            own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
            values, indices = logprobs.topk(min(num_top, self.vocab_size), dim=-1)
            tops = zip(indices.tolist(), values.tolist(), strict=True)
            for token_id, value, (best, best_values) in zip(ids.tolist(), own, tops, strict=True):
                found.append(TokenLogprob(token_id, value, tuple(zip(best, best_values, strict=True))))
        return found

    def _log_softmax(self, rows: Tensor) -> Tensor:
        """Of each row over the tokens that it has: a sum is taken in pieces that go by its length, and must not depend
        on the adapter with the most tokens in the step."""
        num_added = rows.shape[1] - self.vocab_size
        if num_added <= 0:
            return torch.log_softmax(rows, dim=-1, dtype=torch.float32)
        found = torch.full_like(rows, float("-inf"))
        has_token = ~rows[:, self.vocab_size :].isneginf()
        own = (has_token * torch.arange(1, num_added + 1, device=rows.device)).amax(dim=1)
        for added in own.unique().tolist():
            chosen, width = own == added, self.vocab_size + added
            found[chosen, :width] = torch.log_softmax(rows[chosen, :width], dim=-1, dtype=torch.float32)
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
            index = upload(torch.tensor(penalized), rows.device)
            counts = [self._counts(seq, rows.device) for seq in some]
            changed = penalize(rows.index_select(0, index), counts, [seq.sampling for seq in some])
            rows.index_copy_(0, index, changed)
        for i in biased:
            if seqs[i].sampling.logit_bias:
                ids, bias = zip(*seqs[i].sampling.logit_bias, strict=True)
                index, added = (upload(torch.tensor(numbers), rows.device) for numbers in (ids, bias))
                rows[i].index_add_(0, index, added)
            if _is_stop_forbidden(seqs[i]):
                # Tokenizers may know more tokens than the base has logits; those are never sampled anyway.
                stops = sorted(stop for stop in seqs[i].stop_token_ids if stop < rows.shape[1])
                rows[i].index_fill_(0, upload(torch.tensor(stops, dtype=torch.int64), rows.device), float("-inf"))
        return rows

    def _counts(self, seq: Sequence, device: torch.device) -> TokenCounts:
        if seq.counts is None:
            ids, split = seq.token_ids, seq.num_prompt_tokens
            num_token_ids = max(self.vocab_size, seq.binding.num_token_ids)
            seq.counts = TokenCounts(num_token_ids, ids[:split], ids[split:], device)
        return seq.counts

    def _weights(self, rows: Tensor, peaks: Tensor, params: list[SamplingParams]) -> Tensor:
        """``exp((row - peak) / temperature)`` in the buffer."""
        if self._buffer.numel() < rows.numel() or self._buffer.device != rows.device:
            self._buffer = torch.empty(rows.numel(), device=rows.device)
        weights = self._buffer[: rows.numel()].view(rows.shape)
        temperatures = upload(torch.tensor([max(p.temperature, _COLDEST) for p in params]), rows.device)
        # The peak goes first, so that a tiny temperature gives minus infinity, never infinity minus infinity.
        torch.sub(rows, peaks[:, None], out=weights)
        return weights.div_(temperatures[:, None]).exp_()


def _is_penalized(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _is_stop_forbidden(seq: Sequence) -> bool:
    return 0 < seq.sampling.min_tokens > seq.num_completion_tokens and bool(seq.stop_token_ids)
