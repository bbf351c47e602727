"""Multi-adapter operators: a plain PyTorch definition of each, and fast twins that are held to it.

Imports torch only; the C++ library is built at its first use.
"""

from __future__ import annotations

from deltaserve_kernels.apart import add_modules, dense_linear
from deltaserve_kernels.apart_family import ApartEntries, ApartFamily, ApartStep, split_apart
from deltaserve_kernels.apart_rows import (
    ApartRows,
    dense_rows,
    module_rows,
    put_module_rows_back,
    set_module_rows_aside,
    shares_points,
    split_apart_rows,
)
from deltaserve_kernels.backend import BACKENDS, select, use_backend
from deltaserve_kernels.base_weight import PANEL, ReadWeight, WeightView
from deltaserve_kernels.block_tables import BlockEntry, BlockTables
from deltaserve_kernels.checks import BLOCK_SIZE
from deltaserve_kernels.dense_tables import DenseEntry, DenseTables, pack_bits, unpack_bits
from deltaserve_kernels.errors import (
    BackendUnavailable,
    DeviceMismatch,
    DtypeMismatch,
    KernelError,
    Misaligned,
    NotContiguous,
    OutOfRange,
    ShapeMismatch,
)
from deltaserve_kernels.module_tables import ACTIVATIONS, ModuleEntry, ModuleTables
from deltaserve_kernels.operators import lora_linear, paged_attention, sparse_linear, write_kv
from deltaserve_kernels.padded_list import PaddedLayout
from deltaserve_kernels.prefix_tables import PrefixEntry, PrefixTables
from deltaserve_kernels.rotation_tables import RotationEntry, RotationFactor, RotationTables
from deltaserve_kernels.rotations import rotate_blocks, rotation_change
from deltaserve_kernels.sources import source_digest
from deltaserve_kernels.tables import LoraTables, SparseEntry, SparseTables
from deltaserve_kernels.terms import block_linear, lora_vector_linear, rms_norm, rotate_and_write_kv, scale_shift
from deltaserve_kernels.transfer import upload
from deltaserve_kernels.vector_family import Prepared, VectorEntries, VectorFamily, VectorStep, split_runs
from deltaserve_kernels.vector_rows import (
    VectorRows,
    change_norm,
    changed_rms_norm,
    fan_out,
    gather_members,
    put_back,
    scaled_input,
    set_aside,
    split_vectors,
    turn_fanned,
    turn_rows,
    turns_twice,
)
from deltaserve_kernels.vector_tables import NormTables, VectorEntry, VectorTables
from deltaserve_kernels.vocabulary import VocabularyStep, changed_embeddings, split_vocabulary, stored_rows, widened
from deltaserve_kernels.vocabulary_family import EMBEDDING, HEAD, RowsEntry, VocabularyEntries, VocabularyFamily
from deltaserve_kernels.vocabulary_rows import change_embeddings, change_head, hide_added
from deltaserve_kernels.worklist import WorkList, build_work_list, build_work_list_runs

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "BLOCK_SIZE",
    "EMBEDDING",
    "HEAD",
    "PANEL",
    "ApartEntries",
    "ApartFamily",
    "ApartRows",
    "ApartStep",
    "BackendUnavailable",
    "BlockEntry",
    "BlockTables",
    "DenseEntry",
    "DenseTables",
    "DeviceMismatch",
    "DtypeMismatch",
    "KernelError",
    "LoraTables",
    "Misaligned",
    "ModuleEntry",
    "ModuleTables",
    "NormTables",
    "NotContiguous",
    "OutOfRange",
    "PaddedLayout",
    "PrefixEntry",
    "PrefixTables",
    "Prepared",
    "ReadWeight",
    "RotationEntry",
    "RotationFactor",
    "RotationTables",
    "RowsEntry",
    "ShapeMismatch",
    "SparseEntry",
    "SparseTables",
    "VectorEntries",
    "VectorEntry",
    "VectorFamily",
    "VectorRows",
    "VectorStep",
    "VectorTables",
    "VocabularyEntries",
    "VocabularyFamily",
    "VocabularyStep",
    "WeightView",
    "WorkList",
    "add_modules",
    "block_linear",
    "build_work_list",
    "build_work_list_runs",
    "change_embeddings",
    "change_head",
    "change_norm",
    "changed_embeddings",
    "changed_rms_norm",
    "dense_linear",
    "dense_rows",
    "fan_out",
    "gather_members",
    "hide_added",
    "lora_linear",
    "lora_vector_linear",
    "module_rows",
    "pack_bits",
    "paged_attention",
    "put_back",
    "put_module_rows_back",
    "rms_norm",
    "rotate_and_write_kv",
    "rotate_blocks",
    "rotation_change",
    "scale_shift",
    "scaled_input",
    "select",
    "set_aside",
    "set_module_rows_aside",
    "shares_points",
    "source_digest",
    "sparse_linear",
    "split_apart",
    "split_apart_rows",
    "split_runs",
    "split_vectors",
    "split_vocabulary",
    "stored_rows",
    "turn_fanned",
    "turn_rows",
    "turns_twice",
    "unpack_bits",
    "upload",
    "use_backend",
    "widened",
    "write_kv",
]
