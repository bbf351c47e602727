"""The deltas that plans mean. A matrix is made, and decomposed, once for all plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaserve_store.dense_deltas import WORD_BITS, DenseDelta, SignDelta
from deltaserve_store.packed_factors import PackedFactors, pack_rows
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_trainer.extraction.activations import Measure
from deltaserve_trainer.extraction.plan import Choice, Plan
from deltaserve_trainer.extraction.quantise import quantised, scale_dtype
from deltaserve_trainer.extraction.worth import SPAN, Directions, directions_of, heaviest, signs_of

Piece = LoraDelta | PackedFactors | SparseDelta | DenseDelta | SignDelta


def pieces_of(
    plans: Sequence[Plan],
    matrix: Callable[[str], Tensor],
    measure: Callable[[str], Measure],
    dtype: torch.dtype,
) -> list[dict[str, Piece]]:
    """For each plan the delta of each linear that it has chosen something for. ``matrix(name)`` makes a linear's delta
    [out, in], float32, ``measure(name)`` tells how its errors count. Numbers are kept in ``dtype``."""
    made: list[dict[str, Piece]] = [{} for _ in plans]
    for name in dict.fromkeys(name for plan in plans for name in plan.choices):
        delta, how = matrix(name), measure(name)
        wanted = [plan.choices.get(name) for plan in plans]
        ranks = [max(len(choice.bits), choice.rank) for choice in wanted if choice and choice.form in _DIRECTED]
        found = directions_of(delta, how, max(ranks)) if ranks else None
        pieces: dict[Choice, Piece] = {}
        for place, choice in enumerate(wanted):
            if choice is not None:
                if choice not in pieces:
                    pieces[choice] = _piece(name, choice, delta, found, how, dtype)
                made[place][name] = pieces[choice]
    return made


_DIRECTED = ("low rank", "mixed precision")


def _piece(
    name: str, choice: Choice, delta: Tensor, found: Directions | None, measure: Measure, dtype: torch.dtype
) -> Piece:
    if found is not None and choice.form == "low rank":
        a, b = found.a[: choice.size], found.b[: choice.size].t()
        return LoraDelta(name, a.to(dtype).contiguous(), b.to(dtype).contiguous(), 1.0)
    if found is not None and choice.form == "mixed precision":
        return packed_of(name, delta, found, torch.tensor(choice.bits), measure)
    if choice.form == "sparse":
        keys = heaviest(delta, measure, choice.size).sort().values
        rows, columns = (keys // delta.shape[1]).int(), (keys % delta.shape[1]).int()
        return SparseDelta(name, rows, columns, delta.flatten()[keys].to(dtype))
    if choice.form == "dense":
        return DenseDelta(name, delta.to(dtype))
    signs, scale = signs_of(delta, measure, dtype)
    return SignDelta(name, _words(signs), scale)


def packed_of(name: str, delta: Tensor, found: Directions, bits: Tensor, measure: Measure) -> PackedFactors:
    """The directions that have some of ``bits`` [r]. The rows of ``a`` are rounded first; ``b`` is then fitted to what
    they became, all directions at once, and rounded."""
    dtype = scale_dtype(found.a, found.b)
    bands = sorted(set(bits.tolist()) - {0}, reverse=True)
    chosen = [(width, (bits == width).nonzero().flatten()) for width in bands]
    sides_a = [quantised(found.a[place], width, SPAN, measure.diagonal, dtype) for width, place in chosen]
    rooted = measure.rooted(torch.cat([values for *_, values in sides_a]))
    fitted = torch.linalg.lstsq(rooted.t(), measure.rooted(delta).t()).solution
    sides_b, start = [], 0
    for width, place in chosen:
        sides_b.append(quantised(fitted[start : start + len(place)], width, SPAN, dtype=dtype))
        start += len(place)
    codes, scales = [], []
    for (width, _), *sides in zip(chosen, sides_a, sides_b, strict=True):
        for levels, scale, _ in sides:
            codes.append(pack_rows(levels, width).flatten())
            scales.append(scale.flatten())
    ranks = {width: len(place) for width, place in chosen}
    return PackedFactors(name, (delta.shape[0], delta.shape[1]), ranks, SPAN, torch.cat(codes), torch.cat(scales))


def dense_of(piece: Piece, shape: tuple[int, int]) -> Tensor:
    """What a piece stands for, float32 [out, in]."""
    if isinstance(piece, LoraDelta):
        return piece.b.float() @ piece.a.float()
    if isinstance(piece, PackedFactors):
        a, b = piece.factors()
        return b @ a
    if isinstance(piece, DenseDelta):
        return piece.delta.float()
    if isinstance(piece, SignDelta):
        return piece.dense(shape[1])
    total = torch.zeros(shape)
    total[piece.rows.long(), piece.cols.long()] = piece.values.float()
    return total


def _words(signs: Tensor) -> Tensor:
    """int32 [out, ceil(in / 32)] of bool [out, in], as ``SignDelta`` has them."""
    rows, columns = signs.shape
    padded = torch.zeros(rows, -(-columns // WORD_BITS) * WORD_BITS, dtype=torch.int64)
    padded[:, :columns] = signs.long()
    words = (padded.view(rows, -1, WORD_BITS) << torch.arange(WORD_BITS)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
