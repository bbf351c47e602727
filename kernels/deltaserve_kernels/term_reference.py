"""The operators of ``terms`` in plain PyTorch: definition, oracle and fallback in one. See ``reference``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels import checks, term_checks
from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.reference import TILE_ROWS, add_parts, items_of, write_kv
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.vector_tables import NormTables, VectorTables
from deltaserve_kernels.worklist import WorkList


def block_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: BlockTables, members: Sequence[Member], depth: float
) -> None:
    """``y[row, start:stop] += sum over parts of scale * put_O(D take_I x[row])`` for every member and row."""
    checks.check_linear(y, x, work, tables, members)
    add_parts(y, x, work, tables, members, depth, _block_delta)


def _block_delta(x_tile: Tensor, inverse: Tensor, in_cols: Tensor, d: Tensor, scale: float) -> Tensor:
    taken = x_tile[:, in_cols.long()] if in_cols.numel() else x_tile
    if not inverse.numel():
        return taken @ d.float() * scale
    put = (taken @ d.float().t())[:, inverse.clamp(min=0).long()]
    return put.masked_fill(inverse < 0, 0.0) * scale


def lora_vector_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: LoraTables,
    vectors: VectorTables,
    members: Sequence[Member],
    depth: float,
) -> None:
    """``y = y * (1 + sum of scale * (s - 1)) + sum of scale * b + sum of scale * B A x`` over a row's parts."""
    checks.check_linear(y, x, work, tables, members)
    term_checks.check_vectors(vectors, tables, members)
    for rows, parts in items_of(work):
        for first in range(0, len(rows), TILE_ROWS):
            index = torch.tensor(rows[first : first + TILE_ROWS], device=x.device)
            x_tile = torch.zeros(TILE_ROWS, x.shape[1], device=x.device)
            x_tile[: len(index)] = x[index].float()
            for linear, start, stop in members:
                total = torch.zeros(TILE_ROWS, stop - start, device=x.device)
                factor, shift = torch.ones(stop - start, device=x.device), torch.zeros(stop - start, device=x.device)
                has_any = False
                for slot, scale_first, scale_last in parts:
                    scale = scale_first + (scale_last - scale_first) * depth
                    low_rank, vector = tables.get(linear, slot), vectors.get(linear, slot)
                    has_any = has_any or low_rank is not None or vector is not None
                    if low_rank is not None:
                        a, b_t = low_rank
                        total += (x_tile @ a.float().t() * scale) @ b_t.float()
                    if vector is not None:
                        s, b = vector
                        factor = factor + scale * (s - 1) if s.numel() else factor
                        shift = shift + scale * b if b.numel() else shift
                if has_any:
                    changed = y[index, start:stop].float() * factor + shift
                    y[index, start:stop] = (changed + total[: len(index)]).to(y.dtype)


def scale_shift(
    y: Tensor,
    work: WorkList,
    tables: VectorTables,
    members: Sequence[Member],
    depth: float,
    gain: Tensor | None,
    shift: Tensor | None,
    unit: float,
) -> None:
    """``y = y * (gain + sum of scale * (s - unit)) + (shift + sum of scale * b)`` over the parts that have vectors."""
    term_checks.check_scale_shift(y, work, tables, members, gain, shift)
    for rows, parts in items_of(work):
        for linear, start, stop in members:
            factor = torch.ones(stop - start, device=y.device) if gain is None else gain
            total = torch.zeros(stop - start, device=y.device) if shift is None else shift
            has_any = False
            for slot, scale_first, scale_last in parts:
                vectors = tables.get(linear, slot)
                if vectors is None:
                    continue
                has_any = True
                scale = scale_first + (scale_last - scale_first) * depth
                s, b = vectors
                factor = factor + scale * (s - unit) if s.numel() else factor
                total = total + scale * b if b.numel() else total
            if has_any:
                y[rows, start:stop] = (y[rows, start:stop].float() * factor + total).to(y.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, work: WorkList, tables: NormTables, norm: int, depth: float
) -> Tensor:
    """torch's ``rms_norm`` for every row; rows whose parts have gains again, with ``weight + sum of scale * delta``."""
    term_checks.check_norm(x, weight, work, tables, norm)
    term_checks.check_slots(work, tables.num_slots)
    out = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    for rows, parts in items_of(work):
        found = [(tables.get(norm, slot), first + (last - first) * depth) for slot, first, last in parts]
        deltas = [scale * entry[0] for entry, scale in found if entry is not None]
        if rows and deltas:
            gain = weight.float() + torch.stack(deltas).sum(0)
            out[rows] = torch.nn.functional.rms_norm(x[rows].float(), weight.shape, gain, eps).to(x.dtype)
    return out


def rotate_and_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor
) -> None:
    """Rotate ``q`` in place; store rotated ``k``, and ``v``, at positions ``kv_index``."""
    term_checks.check_rotary(q, k, cos, sin)
    checks.check_write(k, v, k_cache, v_cache, kv_index)
    q.copy_(_rotated(q, cos, sin))
    write_kv(_rotated(k, cos, sin), v, k_cache, v_cache, kv_index)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1]
    c, s = cos.float()[:, None], sin.float()[:, None]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)
