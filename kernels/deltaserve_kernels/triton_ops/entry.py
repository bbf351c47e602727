"""The operators behind one name, for ``deltaserve_kernels.operators`` and ``terms``. Imports triton."""

from __future__ import annotations

from deltaserve_kernels.triton_ops.attention import paged_attention, write_kv
from deltaserve_kernels.triton_ops.blocks import block_linear
from deltaserve_kernels.triton_ops.dense import dense_linear
from deltaserve_kernels.triton_ops.lora import lora_linear
from deltaserve_kernels.triton_ops.modules import add_modules, put_module_rows_back, set_module_rows_aside
from deltaserve_kernels.triton_ops.rotary import rotate_and_write_kv
from deltaserve_kernels.triton_ops.rotations import turn_rows
from deltaserve_kernels.triton_ops.sparse import sparse_linear
from deltaserve_kernels.triton_ops.vector_rows import (
    change_norm,
    changed_rms_norm,
    fan_out,
    gather_members,
    put_back,
    scale_shift,
    scaled_input,
    set_aside,
)
from deltaserve_kernels.triton_ops.vectors import lora_vector_linear, rms_norm

__all__ = [
    "add_modules",
    "block_linear",
    "change_norm",
    "changed_rms_norm",
    "dense_linear",
    "fan_out",
    "gather_members",
    "lora_linear",
    "lora_vector_linear",
    "paged_attention",
    "put_back",
    "put_module_rows_back",
    "rms_norm",
    "rotate_and_write_kv",
    "scale_shift",
    "scaled_input",
    "set_aside",
    "set_module_rows_aside",
    "sparse_linear",
    "turn_rows",
    "write_kv",
]
