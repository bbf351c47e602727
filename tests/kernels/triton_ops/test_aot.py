"""Every kernel compiled for GPUs that are not here, at Llama-3.1-8B shapes in bf16, and its machine code read.

What the interpreter cannot show: spills, loads of two bytes where sixteen fit, shared memory, matrix instructions.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and it is the compiler", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

from deltaserve_kernels.triton_ops import (
    aot,
    attention,
    attention_kernels,
    block_kernels,
    block_rows,
    blocks,
    dense,
    dense_kernels,
    lora,
    lora_programs,
    lora_rows,
    members,
    module_kernels,
    modules,
    norm_kernels,
    pointwise,
    pointwise_kernels,
    rotary,
    rotation_kernels,
    rotations,
    row_items,
    sparse,
    sparse_kernels,
    sparse_wide,
    tile_kernels,
    vector_row_kernels,
    vector_rows,
    vectors,
    vocabulary,
    vocabulary_kernels,
)

BF16, FP32 = "*bf16", "*fp32"
TYPES = {
    **dict.fromkeys(
        ("x", "x_t", "y", "q", "k", "v", "out", "both", "kept", "k_cache", "v_cache", "sinks", "weight", "cos", "sin"),
        BF16,
    ),
    **dict.fromkeys(("other", "kept"), BF16),
    **dict.fromkeys(("h", "planes", "part_scale", "part_acc", "part_max", "part_sum"), FP32),
    **dict.fromkeys(("gain", "shift", "normalised"), FP32),
    **dict.fromkeys(("pointers", "turns", "vectors", "kv_index", "low_rank", "ids"), "*i64"),
    **dict.fromkeys(
        ("tile_item", "tile_first", "rows", "item_rows", "item_parts", "item_plane", "part_slot", "records"), "*i32"
    ),
    **dict.fromkeys(
        (
            "ranks",
            "sizes",
            "row_item",
            "flags",
            "found",
            "counts",
            "touched",
            "counters",
            "block_tables",
            "cu_seqlens_q",
            "kv_lens",
        ),
        "*i32",
    ),
    **dict.fromkeys(("depth", "scale", "softcap", "eps", "offset", "unit"), "fp32"),
}


@dataclass(frozen=True)
class Spec:
    """``narrow``: 16-bit loads in the code; 0 unless said where they come from. ``wide``: 128-bit loads at least."""

    kernel: Any
    constants: dict[str, Any]
    narrow: int = 0
    wide: int = 1
    shared: int = 48 * 1024
    types: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


def of_kernel(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


QKV = members.place_of([4096, 1024, 1024], [0, 4096, 5120])


def shrink_of(form: lora.LoraForm, in_features: int) -> dict[str, Any]:
    return {
        "K": in_features,
        "CHUNK": form.chunk(in_features),
        "BLOCK_K": form.block_k,
        "TILE_ROWS": form.tile_rows,
        "RANK_TILE": form.rank_tile,
        "FOLD": form.fold,
    }


def expand_of(form: lora.LoraForm, in_features: int) -> dict[str, Any]:
    return {
        "SPLITS": form.splits(in_features),
        "TILE_ROWS": form.tile_rows,
        "RANK_TILE": form.b_ranks,
        "BLOCK_N": form.block_n,
        "VECTORS": False,
        "FOLD": form.fold,
        **QKV,
    }


def fused_of(form: lora.LoraForm, in_features: int) -> dict[str, Any]:
    both = {**expand_of(form, in_features), **shrink_of(form, in_features), "NUM_MEMBERS": 3, "TILES_N": 48}
    return {name: value for name, value in both.items() if name != "FOLD"}


HEAD = {"D": 128, "BLOCK_D": 128, "BLOCK_N": 32, "HAS_WINDOW": True}
SEGMENTS = {"SEGMENTS": attention.DEFAULT.segments, "MIN_SEGMENT": attention.DEFAULT.min_segment}
FOLDED = {"h": BF16}


def sparse_of(form: sparse.SparseForm, in_features: int) -> dict[str, Any]:
    return {
        "K": in_features,
        "TILE_ROWS": form.tile_rows,
        "STAGE": form.stage(in_features),
        "STEP": form.step,
        **QKV,
    }


def dense_of(form: dense.DenseForm, in_features: int) -> dict[str, Any]:
    return {
        "K": in_features,
        "BLOCK_K": form.block_k,
        "TILE_ROWS": form.tile_rows,
        "BLOCK_N": form.block_n,
        **QKV,
    }


def turn_of(form: rotations.RotationForm) -> dict[str, Any]:
    return {"TILE_ROWS": form.tile_rows, "STEP": form.step, "BLOCK_N": form.block_n}


ROTATION = {
    "HEADS": 32,
    "KV_HEADS": 8,
    "TILE_HEADS": rotary.TILE_HEADS,
    "D": 128,
    "HALF": 64,
    "BLOCK_D": 128,
    "BLOCK_HALF": 64,
    "BLOCK_REST": 1,
}

SPECS = {
    "shrink": Spec(lora_programs.shrink, shrink_of(lora.PRODUCTS, 4096)),
    "expand": Spec(lora_programs.expand, expand_of(lora.PRODUCTS, 14336)),
    # Narrow: nothing; h, and a row of x or y, are one number or eight a thread. B's tile of 16 ranks: sixteen loads.
    "shrink_rows": Spec(
        lora_rows.shrink_rows,
        {"K": 14336, "CHUNK": lora.DECODE.block_k, "GROUP": lora.DECODE.rank_tile, "PROGRAMS": 4},
        wide=4 * 4 + 4 * 2,
        num_warps=lora.DECODE.num_warps,
    ),
    "expand_rows": Spec(
        lora_rows.expand_rows,
        of_kernel(lora_rows.expand_rows, expand_of(lora.DECODE, 14336)),
        wide=2 * 16,
        num_warps=lora.DECODE.b_warps,
    ),
    "fused": Spec(
        lora_programs.fused,
        fused_of(lora.ONE_LAUNCH, 4096),
    ),
    # Vectors are fp32: a thread's eight of each are two loads.
    "expand_rows_vectors": Spec(
        lora_rows.expand_rows,
        {**of_kernel(lora_rows.expand_rows, expand_of(vectors.FORM, 14336)), "VECTORS": True},
        wide=2 * 8 + 4,
        num_warps=lora.DECODE.b_warps,
    ),
    "fused_vectors": Spec(
        lora_programs.fused,
        {**fused_of(lora.ONE_LAUNCH, 4096), "VECTORS": True},
    ),
    # Narrow: angles, one number a thread.
    "rotate_and_store": Spec(
        rotary.rotate_and_store,
        {**ROTATION, "SECOND": 0},
        narrow=4,
        wide=6,
        num_warps=2,
    ),
    "rotate_and_store_two_halves": Spec(
        rotary.rotate_and_store, {**ROTATION, "SECOND": 64}, narrow=8, wide=6, num_warps=2
    ),
    "rms_norm_rows": Spec(
        pointwise_kernels.rms_norm_rows,
        {"SIZE": 4096, "BLOCK": 4096},
        wide=2 * 2,
        num_warps=pointwise.norm_warps(4096),
    ),
    "gated_rows": Spec(
        pointwise_kernels.gated_rows, {"SIZE": 14336, "IS_GELU": False, "BLOCK": pointwise.GATED_BLOCK}, wide=2
    ),
    "gated_rows_gelu": Spec(
        pointwise_kernels.gated_rows, {"SIZE": 14336, "IS_GELU": True, "BLOCK": pointwise.GATED_BLOCK}, wide=2
    ),
    "rms_norm": Spec(norm_kernels.rms_norm, {"SIZE": 4096, "BLOCK": 4096}, wide=3, num_warps=4),
    "prefill_shrink": Spec(
        lora_programs.shrink,
        shrink_of(lora.PREFILL, 4096),
        types=FOLDED,
        num_warps=lora.PREFILL.num_warps,
        shared=64 * 1024,
    ),
    "prefill_expand": Spec(
        lora_programs.expand,
        expand_of(lora.PREFILL, 4096),
        types=FOLDED,
        num_warps=lora.PREFILL.num_warps,
    ),
    "decode": Spec(
        attention_kernels.decode,
        {"KV_HEADS": 8, "GROUP": 4, "TILE_HEADS": 16, "HAS_SOFTCAP": True, **HEAD, **SEGMENTS},
    ),
    # One 16-bit load for each sink a thread holds: a number per head.
    "combine": Spec(
        attention_kernels.combine, {"HEADS": 32, "HAS_SINKS": True, **HEAD, **SEGMENTS}, narrow=1, num_warps=1
    ),
    "prefill": Spec(
        attention_kernels.prefill,
        {"GROUP": 4, "TILE_HEADS": 4, "TILE_QUERIES": 8, "HAS_SOFTCAP": True, "HAS_SINKS": True, **HEAD},
        narrow=4,
    ),
    "store_kv": Spec(attention_kernels.store_kv, {"KV_HEADS": 8, "TILE_HEADS": 8, "D": 128, "BLOCK_D": 128}, wide=2),
    # Narrow: lanes, and y, one element a thread. A pack is 64 bits; wide: x on its way to shared memory.
    "sparse": Spec(
        sparse_kernels.sparse,
        of_kernel(sparse_kernels.sparse, sparse_of(sparse.DECODE, 14336)),
        narrow=2,
        wide=14336 // 8 // 128,
    ),
    # x element by element: 32 a thread.
    "sparse_gathered": Spec(
        sparse_kernels.sparse,
        of_kernel(sparse_kernels.sparse, sparse_of(sparse.SparseForm(staged=False), 4096)),
        narrow=32 + 2,
        wide=0,
    ),
    # x through a list: 32 rows of 128 columns over 128 threads; 32 of 32.
    "shrink_blocks": Spec(
        block_kernels.shrink_blocks,
        of_kernel(block_kernels.shrink_blocks, shrink_of(blocks.PROMPTS, 14336)),
        narrow=32,
        wide=3,
    ),
    "expand_blocks": Spec(
        block_kernels.expand_blocks,
        {**of_kernel(block_kernels.expand_blocks, expand_of(blocks.PROMPTS, 14336)), "BLOCK_C": blocks.BLOCK_COLUMNS},
        narrow=8,
        wide=4,
    ),
    # Narrow: x through a list, four a thread and one; y, one element a thread.
    "blocks_by_row": Spec(
        block_rows.blocks_by_row,
        {
            "K": 14336,
            "CHUNK": blocks.DECODE.chunk,
            "GROUP": blocks.DECODE.group,
            "BLOCK_C": blocks.DECODE.block_c,
            "BLOCK_N": blocks.DECODE.block_n,
            **QKV,
        },
        narrow=6,
        wide=6,
        num_warps=blocks.DECODE.num_warps,
    ),
    "dense": Spec(
        dense_kernels.dense,
        dense_of(dense.DECODE, 14336),
        wide=8,
        num_warps=dense.DECODE.num_warps,
        num_stages=dense.DECODE.num_stages,
    ),
    "dense_prompts": Spec(
        dense_kernels.dense,
        dense_of(dense.PROMPTS, 4096),
        wide=8,
        shared=64 * 1024,
        num_warps=dense.PROMPTS.num_warps,
        num_stages=dense.PROMPTS.num_stages,
    ),
    "module_down": Spec(
        module_kernels.module_down,
        {"SIZE": 4096, "CHUNK": modules.FORM.chunk, "GROUP": modules.FORM.group},
        wide=4,
    ),
    "module_up": Spec(
        module_kernels.module_up,
        {"SIZE": 4096, "RANK_TILE": modules.FORM.rank_tile, "BLOCK_N": modules.FORM.block_n},
        wide=2,
    ),
    "set_module_rows_aside": Spec(module_kernels.set_module_rows_aside, {"SIZE": 4096, "BLOCK_N": 1024}),
    "put_module_rows_back": Spec(module_kernels.put_module_rows_back, {"SIZE": 4096, "BLOCK_N": 1024}, wide=2),
    # Through lists, one number a thread.
    "turn_rows": Spec(rotation_kernels.turn_rows, turn_of(rotations.DECODE), narrow=33, wide=0),
    "turn_rows_prompts": Spec(rotation_kernels.turn_rows, turn_of(rotations.PROMPTS), narrow=33, wide=0),
    "transpose": Spec(sparse_wide.transpose, {"K": 4096, "BLOCK_K": 128, "TILE_ROWS": 32}),
    "sparse_wide": Spec(
        sparse_wide.sparse_wide,
        of_kernel(sparse_wide.sparse_wide, sparse_of(sparse.PROMPTS, 14336)),
        narrow=1,
        wide=4 * 4 + 4,
        num_warps=sparse.PROMPTS.num_warps,
    ),
    # Vector terms by row: a thread has eight columns, of which a row is one load, and fp32 vectors two each.
    "scale_rows": Spec(
        vector_row_kernels.scale_rows,
        {"HAS_GAIN": False, "HAS_SHIFT": False, "BLOCK_N": vector_rows.BLOCK, **QKV},
        wide=1 + 2 * 2,
    ),
    "scale_rows_of_norms": Spec(
        vector_row_kernels.scale_rows,
        {
            "HAS_GAIN": True,
            "HAS_SHIFT": True,
            "BLOCK_N": vector_rows.BLOCK,
            **members.place_of([4096, 0, 0], [0, 0, 0]),
        },
        types={"y": FP32},
        wide=5 * 2,
    ),
    "feed_rows": Spec(vector_row_kernels.feed_rows, {"K": 14336, "BLOCK_K": vector_rows.BLOCK}, wide=1 + 2),
    "gather_rows": Spec(vector_row_kernels.gather_rows, {"BLOCK_N": vector_rows.BLOCK, **QKV}),
    "set_rows_aside": Spec(vector_row_kernels.set_rows_aside, {"N": 4096, "BLOCK_N": vector_rows.BLOCK}),
    "put_rows_back": Spec(vector_row_kernels.put_rows_back, {"N": 4096, "BLOCK_N": vector_rows.BLOCK}, wide=2),
    "changed_norm_rows": Spec(
        vector_row_kernels.changed_norm_rows,
        {"SIZE": 4096, "BLOCK": 4096},
        wide=2 * 2 + 3 * 4,
        num_warps=pointwise.norm_warps(4096),
    ),
    "change_norm_rows": Spec(
        vector_row_kernels.change_norm_rows,
        {"HAS_SHIFT": True, "SIZE": 4096, "BLOCK": vector_rows.BLOCK},
        wide=5 * 2,
    ),
    # Narrow: the one factor of a token in A of a low-rank embedding; a head's logit.
    "embedding_rows": Spec(
        vocabulary_kernels.embedding_rows,
        {"VOCAB": 128256, "WIDTH": 4096, "BLOCK": vector_rows.BLOCK},
        types={"weight": BF16},
        narrow=8,
        wide=3,
    ),
    "put_rows": Spec(vocabulary_kernels.put_rows, {"WIDTH": 4096, "BLOCK": vector_rows.BLOCK}, types={"values": BF16}),
    "head_rows": Spec(
        vocabulary_kernels.head_rows, {"PROGRAMS": vocabulary.PROGRAMS, "WIDTH": 4096, "BLOCK": 4096}, narrow=2, wide=8
    ),
    "hide_added_rows": Spec(
        vocabulary_kernels.hide_added_rows,
        {"BLOCK": vocabulary.HIDDEN_AT_ONCE},
        types={"y": FP32},
        wide=0,
        num_warps=1,
    ),
    # A few numbers an item: nothing to read wide.
    "flag_rows": Spec(row_items.flag_rows, {"BLOCK": row_items.FLAG_ROWS}, wide=0),
    "store_items": Spec(row_items.store_items, {"TILE_ROWS": row_items.TILE_ROWS}, wide=0, num_warps=1),
    "build_tiles": Spec(tile_kernels.build_tiles, {"TILE_ROWS": 16}, wide=0),
}

BY_ROW = (
    "scale_rows", "feed_rows", "gather_rows", "set_rows_aside", "put_rows_back", "changed_norm_rows",
    "change_norm_rows",
)  # fmt: skip
COMPILED: dict[tuple[str, int], aot.Compiled] = {}


def compiled(name: str, arch: int) -> aot.Compiled:
    if (name, arch) not in COMPILED:
        spec = SPECS[name]
        types = {param.name: (TYPES | spec.types).get(param.name, "i32") for param in spec.kernel.params}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's notices about its own settings
            early = {"EARLY": arch >= 90} if "EARLY" in spec.kernel.arg_names else {}
            COMPILED[name, arch] = aot.compile_kernel(
                spec.kernel, types, spec.constants | early, arch, num_warps=spec.num_warps, num_stages=spec.num_stages
            )
    return COMPILED[name, arch]


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", SPECS)
def test_machine_code(name: str, arch: int) -> None:
    spec, code = SPECS[name], compiled(name, arch)
    assert code.spills == 0, code
    assert code.stack_bytes == 0, code
    assert code.shared_bytes <= spec.shared, code
    assert code.loads.get(16, 0) <= spec.narrow, code
    assert code.loads.get(128, 0) >= spec.wide, code


@pytest.mark.parametrize("name", ["shrink", "expand", "fused", "decode", "prefill", "dense"])
def test_no_warpgroup_product_below_64_rows(name: str) -> None:
    """Their left operands come from registers, which ptxas before 13.3 may reuse under a warpgroup product."""
    assert "HGMMA" not in compiled(name, 90).instructions
    assert compiled(name, 90).instructions["HMMA"] > 0


@pytest.mark.parametrize("name", ["prefill_shrink", "prefill_expand", "dense_prompts"])
def test_warpgroup_products_take_both_operands_from_shared_memory(name: str) -> None:
    products = [line for line in compiled(name, 90).listing if "HGMMA" in line]
    assert products
    for line in products:
        _, left, *_ = line.split(",")
        assert left.strip().startswith("gdesc"), line


@pytest.mark.parametrize("name", ["fused", "fused_vectors"])
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_one_launch_asks_for_b_and_y_before_it_waits(name: str, arch: int) -> None:
    """The wait is an acquiring read of the flag in a loop of its own, the products of B come after it."""
    listing = compiled(name, arch).listing
    waits = [i for i, line in enumerate(listing) if "LDG.E.STRONG.GPU" in line]
    assert len(waits) == 1, waits
    products = [i for i, line in enumerate(listing) if line.lstrip("@!P0123456 ").startswith("HMMA")]
    shrink_end = max(i for i in products if i < waits[0])
    asked = [line for line in listing[shrink_end : waits[0]] if "LDG.E.128" in line]
    assert len(asked) >= 4, asked  # two of B, two of y
    assert max(products) > waits[0]


def test_y_is_stored_wide() -> None:
    for name in ("expand", "fused", "prefill_expand", "prefill", "store_kv", "rms_norm_rows", "gated_rows", *BY_ROW):
        assert compiled(name, 90).stores.get(128, 0) >= 1, name
        assert compiled(name, 90).stores.get(16, 0) == 0, name


def test_the_gate_sees_narrow_loads_and_large_tiles() -> None:
    """A width that is no multiple of 8 must show as loads of two bytes, or the gate sees nothing."""
    spec = SPECS["expand"]
    types = {param.name: TYPES.get(param.name, "i32") for param in spec.kernel.params}
    odd = aot.compile_kernel(spec.kernel, types, {**spec.constants, "WIDTH0": 4095, "EARLY": True}, 90)
    assert odd.loads.get(16, 0) > 8
