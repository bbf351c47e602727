"""The runtime form of an adapter: per base linear, the terms that are added to its output, in the serving dtype.

Of the delta algebra a folded adapter holds the low-rank and the sparse terms, each with its own scaling already inside
(``b_t``, ``values``), the vector terms (``vector_terms``), rotations (``rotation_terms``) and a prefix (``prefixes``):
loading is then read and copy. Names are those of the base's linears and norms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.deltas.blocks import BlockTerm, take_block
from deltaserve.deltas.dense import DenseTerm, take_dense
from deltaserve.deltas.folded_file import FileDamaged, read_tensors, write_tensors
from deltaserve.deltas.modules import ModuleTerm, take_module
from deltaserve.deltas.prefixes import PREFIX, PrefixTerm, take_prefix
from deltaserve.deltas.rotation_terms import RotationTerm, take_rotations
from deltaserve.deltas.vector_terms import NormTerm, VectorTerm, take_norm, take_vectors
from deltaserve.deltas.vocabulary import RowsTerm, take_rows
from deltaserve.errors import AdapterUnavailable

if TYPE_CHECKING:
    from deltaserve_store.spec import BaseSpec, LinearSpec

FOLD_VERSION = 3
"""Version of the maths and layout of folding. Raising it makes every stored folded file stale: it is folded again."""

FOLDED_FILE_NAME = "folded.safetensors"
"""Name of the file inside the version's derived folder (``AdapterStore.derived_dir(version, fold_key(...))``)."""


class FoldedFileInvalid(AdapterUnavailable):
    """A folded file is damaged, or was folded for another base, dtype or fold version. Fold again from the version."""

    code = "folded_file_invalid"


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """``y += b_t.T @ (a @ x)``: ``a [rank, in]`` and ``b_t [rank, out]`` in the serving dtype, scaling in ``b_t``."""

    a: Tensor
    b_t: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b_t.nbytes


@dataclass(frozen=True, slots=True)
class SparseTerm:
    """``y += S x`` with S in compressed rows: ``indptr`` int32 ``[out+1]``, ``cols`` int32 ``[nnz]``, ``values``
    ``[nnz]`` in the serving dtype; columns ascend inside a row."""

    indptr: Tensor
    cols: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.cols.nbytes + self.values.nbytes


Term = LowRankTerm | SparseTerm | VectorTerm | RotationTerm | DenseTerm | RowsTerm | BlockTerm


_FAMILIES: dict[type, str] = {
    LowRankTerm: "lora",
    SparseTerm: "sparse",
    VectorTerm: "vector",
    RotationTerm: "rotation",
    DenseTerm: "dense",
    RowsTerm: "rows",
    BlockTerm: "block",
}


@dataclass(frozen=True, slots=True)
class FoldedAdapter:
    """All terms of one adapter version for one base and dtype. At most one term of each class per linear, the embedding
    and the head (linears from and to the vocabulary) included.

    ``modules`` are residual modules by attach point. ``kinds`` names the term families present, sorted ("block",
    "bottleneck", "dense", "lora", "prefix", "rotation", "rows", "sparse", "vector"); ``rank`` is the largest, None
    without low-rank terms. ``num_token_ids``, where the adapter adds tokens, counts the base's and those.
    """

    terms: Mapping[str, tuple[Term, ...]]
    base_fingerprint: str
    dtype: torch.dtype
    norms: Mapping[str, NormTerm] = field(default_factory=dict)
    modules: Mapping[str, ModuleTerm] = field(default_factory=dict)
    prefix: PrefixTerm | None = None
    num_token_ids: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        found = {_FAMILIES[type(term)] for part in self.terms.values() for term in part}
        found |= {"vector"} if self.norms else set()
        found |= {"bottleneck"} if self.modules else set()
        found |= {"prefix"} if self.prefix is not None else set()
        return tuple(sorted(found))

    @property
    def rank(self) -> int | None:
        ranks = [term.rank for part in self.terms.values() for term in part if isinstance(term, LowRankTerm)]
        return max(ranks, default=None)

    @property
    def nbytes(self) -> int:
        linears = sum(term.nbytes for part in self.terms.values() for term in part)
        others = (*self.norms.values(), *self.modules.values(), *((self.prefix,) if self.prefix is not None else ()))
        return linears + sum(term.nbytes for term in others)

    def save(self, path: Path) -> None:
        """Write one safetensors file (``folded_file``), atomically and durably. Raises ``OSError``."""
        tensors: dict[str, Tensor] = {}
        for linear, part in self.terms.items():
            for term in part:
                if isinstance(term, LowRankTerm):
                    tensors[f"{linear}:a"] = term.a
                    tensors[f"{linear}:b_t"] = term.b_t
                elif isinstance(term, VectorTerm | RotationTerm | DenseTerm | BlockTerm):
                    tensors |= {f"{linear}:{role}": tensor for role, tensor in term.tensors().items()}
                elif isinstance(term, RowsTerm):
                    tensors |= {f"{linear}:ids": term.ids, f"{linear}:row_values": term.values}
                else:
                    tensors[f"{linear}:indptr"] = term.indptr
                    tensors[f"{linear}:cols"] = term.cols
                    tensors[f"{linear}:values"] = term.values
        for norm, change in self.norms.items():
            tensors |= {f"{norm}:{role}": tensor for role, tensor in change.tensors().items()}
        for point, module in self.modules.items():
            tensors |= {f"{point}:{role}": tensor for role, tensor in module.tensors().items()}
        if self.prefix is not None:
            tensors |= {f"{PREFIX}:{role}": tensor for role, tensor in self.prefix.tensors().items()}
        told = {point: [module.activation, module.is_parallel] for point, module in self.modules.items()}
        identity = {**_identity(self.base_fingerprint, self.dtype), **_content(self)}
        write_tensors(path, tensors, {**identity, "modules": json.dumps(told), "token_ids": str(self.num_token_ids)})

    @classmethod
    def load(cls, path: Path, spec: BaseSpec, dtype: torch.dtype, *, mmap: bool = False) -> FoldedAdapter:
        """Read a file that ``save`` wrote, and verify digest, metadata, shapes and dtypes against the base.

        The tensors are views of one 16-byte aligned buffer. Raises ``FoldedFileInvalid``, or ``OSError`` when the
        file is missing or unreadable.
        """
        try:
            tensors, metadata = read_tensors(path, mmap=mmap)
            _require(metadata, _identity(spec.fingerprint, dtype))
            grouped = _grouped(tensors)
            changes = {
                name: take_norm(name, grouped.pop(name), norm) for name, norm in spec.norms.items() if name in grouped
            }
            told = json.loads(metadata.get("modules", "{}"))
            modules = {
                name: take_module(name, grouped.pop(name), told.get(name), spec.hidden_size, dtype)
                for name in sorted(spec.points & set(grouped))
            }
            prefix = take_prefix(grouped.pop(PREFIX), spec, dtype) if PREFIX in grouped else None
            count = int(metadata.get("token_ids", "0"))
            terms = {linear: _linear_terms(linear, roles, spec, dtype, count) for linear, roles in grouped.items()}
            folded = cls(terms, spec.fingerprint, dtype, changes, modules, prefix, count)
            _require(metadata, _content(folded))
        except FileDamaged as error:
            raise FoldedFileInvalid(f"The folded adapter file is damaged: {error}. Fold the version again.") from error
        return folded


def _require(metadata: Mapping[str, str], allowed: Mapping[str, str]) -> None:
    for key, value in allowed.items():
        if metadata.get(key) != value:
            raise FoldedFileInvalid(
                f"The folded adapter file has {key} {metadata.get(key)!r}, this server needs {value!r}. "
                "Fold the version again."
            )


def _identity(fingerprint: str, dtype: torch.dtype) -> dict[str, str]:
    """What the file was folded for."""
    return {
        "format": "deltaserve-folded",
        "fold_version": str(FOLD_VERSION),
        "base_fingerprint": fingerprint,
        "dtype": dtype_name(dtype),
    }


def _content(folded: FoldedAdapter) -> dict[str, str]:
    return {"kinds": ",".join(folded.kinds), "rank": str(folded.rank or 0)}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by linear or norm, then by role."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        linear, _, role = name.rpartition(":")
        grouped.setdefault(linear, {})[role] = tensor
    return grouped


def _linear_terms(
    linear: str, roles: dict[str, Tensor], spec: BaseSpec, dtype: torch.dtype, num_token_ids: int
) -> tuple[Term, ...]:
    matrices = spec.vocabulary
    known = spec.linears.get(linear) or matrices.get(linear)
    if known is None:
        raise FileDamaged(f"the base has no linear {linear!r}")
    terms: list[Term] = []
    if "a" in roles and "b_t" in roles:
        terms.append(_low_rank(linear, roles.pop("a"), roles.pop("b_t"), known, dtype))
    if "indptr" in roles and "cols" in roles and "values" in roles:
        terms.append(_sparse(linear, roles.pop("indptr"), roles.pop("cols"), roles.pop("values"), known, dtype))
    dense = take_dense(linear, roles, known, dtype) if linear in spec.linears else None
    if dense is not None:
        terms.append(dense)
    vectors = take_vectors(linear, roles, known, is_wide=linear in matrices)
    if vectors is not None:
        if linear in matrices and not _suits_matrix(vectors, linear, spec):
            raise FileDamaged(f"{linear!r} has vectors that no embedding or head takes")
        terms.append(vectors)
    if linear in spec.linears:
        terms.extend(take_rotations(linear, roles, known, dtype))
    block = take_block(linear, roles, known, dtype) if linear in spec.linears else None
    if block is not None:
        terms.append(block)
    rows = take_rows(linear, roles, spec, dtype, num_token_ids) if linear in matrices else None
    if rows is not None:
        terms.append(rows)
    if roles or not terms:
        raise FileDamaged(f"{linear!r} has the unexpected parts {sorted(roles)}")
    return tuple(terms)


def _suits_matrix(vectors: VectorTerm, name: str, spec: BaseSpec) -> bool:
    """The head takes a scale and a bias of its outputs, the embedding a scale."""
    is_embedding = spec.embedding is not None and name == spec.embedding.name
    return vectors.in_scale is None and not (is_embedding and (vectors.bias is not None or vectors.scale is None))


def _low_rank(linear: str, a: Tensor, b_t: Tensor, known: LinearSpec, dtype: torch.dtype) -> LowRankTerm:
    rank = a.shape[0] if a.dim() == 2 else 0
    if tuple(a.shape) != (rank, known.in_features) or tuple(b_t.shape) != (rank, known.out_features) or rank < 1:
        raise FileDamaged(f"{linear!r} has factors {tuple(a.shape)} and {tuple(b_t.shape)}")
    if a.dtype != dtype or b_t.dtype != dtype:
        raise FileDamaged(f"{linear!r} has dtypes {a.dtype} and {b_t.dtype}, not {dtype}")
    return LowRankTerm(a=a, b_t=b_t)


def _sparse(
    linear: str, indptr: Tensor, cols: Tensor, values: Tensor, known: LinearSpec, dtype: torch.dtype
) -> SparseTerm:
    """An index outside the base would make an operator read foreign memory, so every one is checked."""
    count = values.numel()
    if tuple(indptr.shape) != (known.out_features + 1,) or tuple(cols.shape) != (count,) or values.dim() != 1:
        raise FileDamaged(f"{linear!r} has row pointers {tuple(indptr.shape)} and {count} values")
    if (indptr.dtype, cols.dtype, values.dtype) != (torch.int32, torch.int32, dtype):
        raise FileDamaged(f"{linear!r} has dtypes {indptr.dtype}, {cols.dtype} and {values.dtype}")
    steps_down = bool((indptr[1:] < indptr[:-1]).any())
    if int(indptr[0]) != 0 or int(indptr[-1]) != count or steps_down:
        raise FileDamaged(f"{linear!r} has row pointers that do not span its {count} values")
    if count and not (int(cols.min()) >= 0 and int(cols.max()) < known.in_features):
        raise FileDamaged(f"{linear!r} has column indices outside 0..{known.in_features - 1}")
    return SparseTerm(indptr=indptr, cols=cols, values=values)
