"""The project's own format of sums: ``adapter.json`` and ``adapter.safetensors``. See ``docs/adapter-format.md``.

One linear may have several terms, ``y = out_scale * W (in_scale * x) + b + bias + B (A x) + S x + Q x``: ``<module>.a``
[rank, in] and ``.b`` [out, rank] with every scaling inside, further directions of few bits in ``.codes`` and
``.scales`` (``packed_factors``), ``.rows``, ``.cols``, ``.values`` [k] as in the sparse format, ``.delta`` or
``.signs`` and ``.scale`` as in the dense format, and the vectors of the vector format; norms have ``.gain`` and
``.shift``. Merged and extracted adapters need this: a sum of a LoRA and a sparse delta is neither. The JSON has the
base's fingerprint and, per module, what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Unpack

import torch
from torch import Tensor

from deltaserve_store.dense_deltas import WORD_BITS, DenseDelta, SignDelta
from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.deltaserve_dense import MAX_DENSE_WEIGHTS, check_bits
from deltaserve_store.formats.deltaserve_sparse import PARTS as ENTRY_PARTS
from deltaserve_store.formats.deltaserve_sparse import read_entries
from deltaserve_store.formats.deltaserve_vectors import LINEAR_PARTS, NORM_PARTS, vector_shapes
from deltaserve_store.formats.module_match import is_head
from deltaserve_store.formats.own_config import (
    BY_FILE,
    Told,
    check_listed,
    fields_of,
    modules_of,
    parsed_file,
    write_files,
)
from deltaserve_store.formats.packed_terms import ALLOWED as PACKED_ALLOWED
from deltaserve_store.formats.packed_terms import packed_shapes, read_packed, told_of
from deltaserve_store.formats.sparse_entries import sort_entries
from deltaserve_store.formats.tensor_checks import check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.packed_factors import PackedFactors
from deltaserve_store.parsed import Kind, LoraDelta, ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

FORMAT: Final = "deltaserve-terms"
MAX_RANK = 1024
FIELDS: Mapping[str, str] = fields_of(
    FORMAT,
    f"object: path of a linear to an object with some of rank (1 to {MAX_RANK}, with packed ones), packed "
    f"({PACKED_ALLOWED}), entries (at least 1), matrix (delta or signs), vectors (some of {', '.join(LINEAR_PARTS)}); "
    f"path of a norm to vectors alone (some of {', '.join(NORM_PARTS)})",
)
MATRICES: Mapping[str, tuple[str, ...]] = {"delta": ("delta",), "signs": ("signs", "scale")}
DTYPES = {**dict.fromkeys(("rows", "cols", "signs"), ("I32",)), "codes": ("U8",)}
"""Of the parts that are no floating-point numbers."""
Delta = LoraDelta | SparseDelta | DenseDelta | SignDelta | VectorDelta | NormDelta


def write_terms_adapter(
    folder: Path, deltas: Iterable[Delta | PackedFactors], base_fingerprint: str, **told: Unpack[Told]
) -> None:
    """Writes both files into ``folder`` (made if missing). ``scaling`` of a low-rank delta is multiplied into ``b``.

    Raises ``ValueError`` for two deltas of one sort for a module, for one that this format has no words for (a
    magnitude, ``new_bias``, ``scales_bias``, ``replaces``), or when there is nothing to write.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for delta in deltas:
        given = modules.setdefault(delta.module, {})
        made, entry = _tensors(delta)
        if set(entry) & set(given):
            raise ValueError(f"{delta.module}: two deltas of one sort")
        given |= entry
        tensors |= {f"{delta.module}.{part}": tensor.contiguous() for part, tensor in made.items()}
    modules = {module: entry for module, entry in modules.items() if entry}
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def _tensors(delta: Delta | PackedFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one delta by part, and what ``modules`` says of it; both empty for a delta of nothing."""
    if isinstance(delta, PackedFactors):
        return {"codes": delta.codes, "scales": delta.scales}, {"packed": told_of(delta)}
    if isinstance(delta, DenseDelta):
        return {"delta": delta.delta}, {"matrix": "delta"}
    if isinstance(delta, SignDelta):
        return {"signs": delta.signs, "scale": delta.scale}, {"matrix": "signs"}
    if isinstance(delta, LoraDelta):
        if delta.magnitude is not None:
            raise ValueError(f"{delta.module}: a magnitude; write its scale as a vector")
        b = delta.b if delta.scaling == 1.0 else (delta.b.float() * delta.scaling).to(delta.b.dtype)
        return {"a": delta.a, "b": b}, {"rank": delta.rank}
    if isinstance(delta, SparseDelta):
        if not delta.num_entries:
            return {}, {}
        width = int(delta.cols.max()) + 1
        *entries, num_duplicates = sort_entries(delta.rows, delta.cols, delta.values, width)
        if num_duplicates:
            raise ValueError(f"{num_duplicates} positions of {delta.module} occur twice")
        return dict(zip(ENTRY_PARTS, entries, strict=True)), {"entries": delta.num_entries}
    is_linear = isinstance(delta, VectorDelta)
    if delta.replaces if isinstance(delta, NormDelta) else _is_foreign(delta):
        raise ValueError(f"{delta.module}: not a change that this format can say")
    parts = LINEAR_PARTS if is_linear else NORM_PARTS
    vectors = {part: vector for part in parts if (vector := getattr(delta, part)) is not None}
    return vectors, {"vectors": list(vectors)} if vectors else {}


def _is_foreign(delta: VectorDelta) -> bool:
    return delta.new_bias is not None or delta.bias_scale is not None or delta.scales_bias


def parse_deltaserve_terms(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    modules = modules_of(config, FIELDS, FORMAT, base, findings)
    shapes: dict[str, tuple[int, ...]] = {}
    for module, told in modules.items():
        shapes |= _shapes(module, told, base, findings)
    _check_size(shapes, findings)
    allowed = f"tensors listed in {SPARSE_CONFIG}"
    check_listed(shapes, tensors, findings, why=BY_FILE, allowed=allowed, noun="term", dtypes=DTYPES)
    if findings:
        return None
    deltas: list[Delta] = []
    for module in [name for name in (*base.linears, *base.norms) if name in modules]:
        deltas += _read_module(module, modules[module], base, tensors, findings)
    if findings:
        return None
    kinds = sorted({_KINDS[type(delta)] for delta in deltas})
    ranks = [delta.rank for delta in deltas if isinstance(delta, LoraDelta)]
    return parsed_file(
        config,
        kinds,
        deltas,
        num_parameters=sum(_num_parameters(delta, base) for delta in deltas),
        rank=max(ranks, default=None),
    )


_KINDS: dict[type, Kind] = {
    LoraDelta: "lora",
    SparseDelta: "sparse",
    DenseDelta: "dense",
    SignDelta: "dense",
    VectorDelta: "vector",
    NormDelta: "vector",
}


def _num_parameters(delta: Delta, base: BaseSpec) -> int:
    """Numbers that it holds, indices apart; as many of a packed one as it stands for."""
    if isinstance(delta, LoraDelta):
        return delta.a.numel() + delta.b.numel()
    if isinstance(delta, SparseDelta):
        return delta.num_entries
    if isinstance(delta, SignDelta):
        return len(delta.signs) * base.linears[delta.module].in_features + delta.scale.numel()
    tensors = (getattr(delta, part, None) for part in ("delta", *LINEAR_PARTS, *NORM_PARTS))
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _shapes(module: str, told: Any, base: BaseSpec, findings: Findings) -> dict[str, tuple[int, ...]]:
    """The tensors of one module with their shapes; empty when it cannot have what is told of it."""
    where = f"{SPARSE_CONFIG}:modules:{module}"
    linear = base.linears.get(module)
    if is_head(module):
        findings.add("unsupported_target", where, module, "linears and norms of the decoder")
        return {}
    if linear is None and module not in base.norms:
        findings.add("unknown_module", where, module, "names of linears and norms of the base")
        return {}
    known = {"rank", "packed", "entries", "matrix", "vectors"} if linear is not None else {"vectors"}
    if not isinstance(told, dict) or not told or not set(told) <= known:
        findings.add("invalid_value", where, told, FIELDS["modules"])
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(told.get("vectors"), list) and {"in_scale", "out_scale"} <= set(map(str, told["vectors"])):
        # Its strength would not be linear, and the terms beside it are.
        findings.add("unsupported_feature", where, "scales on both sides of one linear", "a scale on one side")
    elif "vectors" in told:
        shapes |= vector_shapes(module, told["vectors"], base, findings, allowed=FIELDS["modules"])
    rank = told.get("rank", 0)
    if linear is not None and "rank" in told:
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            findings.add("rank_out_of_range", f"{where}:rank", rank, f"1 to {MAX_RANK}")
            rank = 0
        else:
            shapes |= {f"{module}.a": (rank, linear.in_features), f"{module}.b": (linear.out_features, rank)}
    if linear is not None and "packed" in told:
        found = packed_shapes(told["packed"], linear, f"{where}:packed", MAX_RANK - rank, findings)
        shapes |= {f"{module}.{part}": shape for part, shape in found.items()}
    if linear is not None and "matrix" in told:
        shapes |= _matrix_shapes(told["matrix"], linear, where, findings)
    if linear is not None and "entries" in told:
        count, size = told["entries"], linear.out_features * linear.in_features
        if type(count) is not int or not 1 <= count <= size:
            findings.add("invalid_value", f"{where}:entries", count, f"1 to {size}, the size of the layer")
        else:
            shapes |= {f"{module}.{part}": (count,) for part in ENTRY_PARTS}
    return shapes


def _matrix_shapes(form: Any, linear: LinearSpec, where: str, findings: Findings) -> dict[str, tuple[int, ...]]:
    if not isinstance(form, str) or form not in MATRICES:
        findings.add("invalid_value", f"{where}:matrix", form, "delta or signs")
        return {}
    rows, words = linear.out_features, -(-linear.in_features // WORD_BITS)
    of_part = {"delta": (rows, linear.in_features), "signs": (rows, words), "scale": (rows,)}
    return {f"{linear.name}.{part}": of_part[part] for part in MATRICES[form]}


def _check_size(shapes: Mapping[str, tuple[int, ...]], findings: Findings) -> None:
    """As in the dense format: a whole matrix is held in the serving dtype on the device, signs in one bit a weight."""
    weights = {"delta": 1, "signs": WORD_BITS / 16}
    of_parts = [(name.rpartition(".")[2], torch.Size(shape).numel()) for name, shape in shapes.items()]
    total = sum(weights[part] * count for part, count in of_parts if part in weights)
    if total > MAX_DENSE_WEIGHTS:
        findings.add(
            "file_too_large", f"{SPARSE_CONFIG}:modules", f"{total:.0f} weights", f"at most {MAX_DENSE_WEIGHTS}"
        )


def _read_module(
    module: str, told: Mapping[str, Any], base: BaseSpec, tensors: TensorFile, findings: Findings
) -> list[Delta]:
    def read(part: str) -> Tensor:
        values = tensors.read(f"{module}.{part}")
        check_values(f"{module}.{part}", values, findings)
        return values

    deltas: list[Delta] = []
    low_rank = LoraDelta(module, read("a"), read("b"), 1.0) if "rank" in told else None
    if "packed" in told:
        low_rank = read_packed(told["packed"], base.linears[module], low_rank, tensors, findings)
    if low_rank is not None:
        deltas.append(low_rank)
    if told.get("matrix") == "delta":
        deltas.append(DenseDelta(module, read("delta")))
    elif told.get("matrix") == "signs":
        signs = tensors.read(f"{module}.signs")
        check_bits(f"{module}.signs", signs, base.linears[module], findings)
        deltas.append(SignDelta(module, signs, read("scale")))
    if "entries" in told and (entries := read_entries(base.linears[module], tensors, findings)) is not None:
        deltas.append(entries)
    if "vectors" in told:
        vectors: dict[str, Any] = {part: read(part) for part in told["vectors"]}
        deltas.append(VectorDelta(module, **vectors) if module in base.linears else NormDelta(module, **vectors))
    return deltas
