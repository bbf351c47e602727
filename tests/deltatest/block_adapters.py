"""Random adapters of row and column blocks in the project's own format."""

from __future__ import annotations

from pathlib import Path

import torch

from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.formats.deltaserve_blocks import write_block_adapter
from deltaserve_store.spec import BaseSpec
from deltatest.block_cases import listed

KINDS = ("rows", "cols", "both", "s2ft")


def make_blocks(kind: str, spec: BaseSpec, folder: Path, *, seed: int = 0, std: float = 0.2, size: int = 7) -> Path:
    """Blocks of ``size`` listed rows, columns or both, of every linear; ``s2ft``: columns of the linears that write to
    the residual stream, rows of the others."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for index, (name, linear) in enumerate(spec.linears.items()):
        is_outward = name.endswith(("o_proj", "down_proj", "c_proj", "dense"))
        has_rows = kind in ("rows", "both") or (kind == "s2ft" and not is_outward)
        has_cols = kind in ("cols", "both") or (kind == "s2ft" and is_outward)
        rows = listed(linear.out_features, size if has_rows else None, seed + 2 * index)
        cols = listed(linear.in_features, size + 2 if has_cols else None, seed + 2 * index + 1)
        shape = (
            linear.out_features if rows is None else len(rows),
            linear.in_features if cols is None else len(cols),
        )
        deltas.append(BlockDelta(name, rows, cols, torch.randn(shape, generator=generator) * std))
    write_block_adapter(folder, deltas, spec.fingerprint, base_name=spec.names[0], method=kind)
    return folder
