"""C++ operators for CPUs: fp32, bf16 and fp16, instruction sets chosen at run time.

Same arguments, results and refusals as ``reference``; checks run in C++. The library is built at first use.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.cpu import build
from deltaserve_kernels.errors import DeviceMismatch, DtypeMismatch, OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import PointerTables
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.tables import LoraTables, SparseTables
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList

logger = logging.getLogger(__name__)

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
ACTIVATIONS = ("silu", "gelu_tanh")

_lock = threading.Lock()
_loaded = False
_reason: str | None = None


def is_available() -> bool:
    """Build and load the library if that has not been tried yet; False leaves one warning in the log."""
    global _loaded, _reason
    if _loaded or _reason is not None:
        return _loaded
    with _lock:
        if not _loaded and _reason is None:
            try:
                torch.ops.load_library(str(build.ensure_built()))
                _loaded = True
            except (build.BuildFailed, OSError) as error:
                _reason = str(error)
                logger.warning("CPU operators unavailable, the slower PyTorch versions serve instead: %s", error)
    return _loaded


def unavailable_reason() -> str | None:
    """Why ``is_available`` is False; None before the first try and after success."""
    return _reason


def level() -> str:
    """The instruction set in use, one of LEVELS. Needs ``is_available()``."""
    return LEVELS[torch.ops.deltaserve_cpu.level()]


def available_levels() -> tuple[str, ...]:
    """What this machine can run, slowest first. Needs ``is_available()``."""
    return LEVELS[: torch.ops.deltaserve_cpu.max_level() + 1]


def set_level(name: str) -> None:
    """Use another instruction set (tests, bench). Raises OutOfRange where the machine lacks it."""
    if name not in available_levels():
        raise OutOfRange(f"instruction set {name!r} is not one of {', '.join(available_levels())}")
    torch.ops.deltaserve_cpu.set_level(LEVELS.index(name))


def lora_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: LoraTables, members: Sequence[Member], depth: float
) -> None:
    _check(x, work, tables)
    torch.ops.deltaserve_cpu.lora_linear(
        y,
        x,
        prepared(work),
        tables.pointers,
        tables.ranks,
        tables.dims,
        list(chain.from_iterable(members)),
        depth,
    )


def sparse_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: SparseTables, members: Sequence[Member], depth: float
) -> None:
    _check(x, work, tables)
    torch.ops.deltaserve_cpu.sparse_linear(
        y,
        x,
        prepared(work),
        tables.pointers,
        tables.extents,
        tables.dims,
        list(chain.from_iterable(members)),
        depth,
    )


def block_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: BlockTables, members: Sequence[Member], depth: float
) -> None:
    _check(x, work, tables)
    torch.ops.deltaserve_cpu.block_linear(
        y,
        x,
        prepared(work),
        tables.pointers,
        tables.sizes,
        tables.dims,
        list(chain.from_iterable(members)),
        depth,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    one_query: bool = False,
) -> Tensor:
    if window is not None and window < 1:
        raise OutOfRange(f"window {window} must be at least 1")
    if softcap is not None and not softcap > 0:
        raise OutOfRange(f"softcap {softcap} must be positive")
    return torch.ops.deltaserve_cpu.paged_attention(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, scale, window or 0, softcap or 0.0, sinks
    )


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    torch.ops.deltaserve_cpu.write_kv(k, v, k_cache, v_cache, kv_index)


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
    if not tables.is_on_host:
        raise DeviceMismatch(f"the tables are on {tables.device}; y is on the CPU")
    columns = list(chain.from_iterable(members))
    operator("scale_shift")(y, prepared(work), tables.pointers, tables.dims, columns, gain, shift, unit, depth)


def rotate_blocks(
    y: Tensor, x: Tensor, work: WorkList, tables: RotationTables, members: Sequence[Member], depth: float
) -> None:
    """As ``deltaserve_kernels.rotate_blocks``; here y may be x itself."""
    operator("rotate_blocks")(y, x, *_turns(x, work, tables), list(chain.from_iterable(members)), depth)


def pack_weight(weight: Tensor) -> Tensor:
    """A bf16 or fp16 weight [N, K] as panels of 16 outputs, [ceil(N / 16), K, 16]. Raises ValueError."""
    return torch.ops.deltaserve_cpu.pack_weight(weight)


def unpack_weight(packed: Tensor, outputs: int) -> Tensor:
    """The weight [outputs, K] that ``pack_weight`` was given, a copy. Raises ValueError."""
    return torch.ops.deltaserve_cpu.unpack_weight(packed, outputs)


def packed_linear(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    """``x`` [T, K] -> [T, outputs] in its dtype, with fp32 sums in one order whatever T is. Raises ValueError."""
    return torch.ops.deltaserve_cpu.packed_linear(x, packed, outputs, bias)


def packed_linear_lora(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None,
    work: WorkList,
    tables: LoraTables,
    columns: list[int],
    depth: float,
) -> Tensor:
    """``packed_linear`` and ``lora_linear`` in one: the deltas join the fp32 sums, which are rounded once.

    ``columns`` are the members one after another. One call is cheaper than two, and where many rows make the product
    all arithmetic, the adapters' matrices are fetched from memory meanwhile. A row's bits depend on that row and its
    binding alone. Raises ValueError.
    """
    _check(x, work, tables)
    return operator("packed_linear_lora")(
        x, packed, outputs, bias, prepared(work), tables.pointers, tables.ranks, tables.dims, columns, depth
    )


def changes(vectors: VectorTables, work: WorkList) -> Tensor:
    """What the tables have for the rows of ``work``, of every linear or norm, as operators read it: looked through once
    for all of them. Holds addresses, so it is good until the tables change. Raises ValueError."""
    if not vectors.is_on_host:
        raise DeviceMismatch(f"the tables are on {vectors.device}; they must be on the CPU")
    return operator("prepare_changes")(prepared(work), vectors.pointers, vectors.dims)


def rms_norm_changed(
    x: Tensor, weight: Tensor, eps: float, offset: float, changes: Tensor, norm: int, depth: float
) -> Tensor:
    """``rms_norm`` where rows have ``offset + weight + sum over parts of scale * difference`` as gain: the scales that
    ``changes`` has are the differences. Rows without one have the bits of ``rms_norm``. Raises ValueError."""
    return operator("rms_norm_changed")(x, weight, eps, offset, changes, norm, depth)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` by row: ``x`` [T, H], ``weight`` [H]; fp32, rounded once."""
    return torch.ops.deltaserve_cpu.rms_norm(x, weight, eps, offset)


def gated_product(both: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of ``both`` [T, gate | up] -> [T, N]; activation "silu" or "gelu_tanh"; rounded once."""
    return torch.ops.deltaserve_cpu.gated_product(both, ACTIVATIONS.index(activation))


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """Rotary position embedding of halves, and the KV write, in one pass over ``qkv`` [T, q heads | k heads | v heads].

    ``cos`` and ``sin`` [T, rotary size]. q is rotated in place; k, rotated, and v go to ``kv_index`` of the caches
    [num_blocks, kv_heads, 16, D], as in ``write_kv``. Raises ValueError.
    """
    torch.ops.deltaserve_cpu.rotate_and_store(qkv, cos, sin, k_cache, v_cache, kv_index)


@cache
def operator(name: str) -> Callable[..., Any]:
    """The operator itself: looking it up costs as much as a small product."""
    return getattr(torch.ops.deltaserve_cpu, name).default


def prepared(work: WorkList) -> Tensor:
    """The list as the C++ operators read it: checked and taken apart at its first use. Raises ValueError."""
    found = work.prepared
    if found is None:
        found = torch.ops.deltaserve_cpu.prepare_work(
            work.rows, work.item_rows, work.item_parts, work.part_slot, work.part_scale, work.num_rows
        )
        work.remember(found)
    return found


def _turns(x: Tensor, work: WorkList, tables: RotationTables) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, work, tables)
    return prepared(work), tables.pointers, tables.dims


def _check(x: Tensor, work: WorkList, tables: LoraTables | SparseTables | BlockTables | RotationTables) -> None:
    check_dtype(x.dtype, tables)
    check_rows(x.shape[0], work, tables)


def check_dtype(dtype: torch.dtype, tables: PointerTables) -> None:
    if tables.dtype is not dtype and tables.dtype is not None:
        raise DtypeMismatch(f"x is {dtype}; the tables hold {tables.dtype}")


def check_rows(rows: int, work: WorkList, tables: PointerTables) -> None:
    if not tables.is_on_host:
        raise DeviceMismatch(f"the tables are on {tables.device}; x is on the CPU")
    if rows != work.num_rows:
        raise ShapeMismatch(f"x has {rows} rows and the work list is of {work.num_rows}")
