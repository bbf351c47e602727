"""``modules_to_save`` of a PEFT config: modules that were trained whole, beside whatever the adapter is.

``<module>.weight`` and ``.bias`` stand in place of the base's, in the orientation in which the base stores them. Of
embedding, head, norms and linears of the layers, and of modules that hold nothing else (``mlp``). A classifier, which a
causal model does not have, is no name of the base. A module that is a target too is saved, and not a target. Source:
peft 0.21, ``utils/other.py`` (``_set_trainable``, ``ModulesToSaveWrapper``), ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.dense_deltas import WholeDelta
from deltaserve_store.findings import Findings
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, PEFT_PREFIX, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.formats.vocabulary_rows import check_rows, read_rows, rows_shape
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

SavedDelta = RowsDelta | NormDelta | WholeDelta | VectorDelta


class SavedModules:
    """The modules that ``names`` mean, by what they are; names that the base does not have are added to ``findings``.

    PEFT compares endings of a module's whole path here, without looking for a dot, and takes all that lies below.
    """

    def __init__(self, names: Sequence[str] | None, base: BaseSpec, where: str, findings: Findings) -> None:
        self._names = tuple(names or ())
        self._base, self._where = base, f"{where}:modules_to_save"
        self.matrices = self._below(base.vocabulary)
        self.norms = self._below(base.norms)
        self.linears = self._below(base.linears)
        known = (*self.matrices, *self.norms, *self.linears)
        for name in self._names:
            if not any(_is_below(module, name) for module in known):
                allowed = "names of the embedding, the head, norms or linears"
                findings.add("unknown_module", self._where, name, allowed)

    def _below(self, modules: Iterable[str]) -> list[str]:
        return [module for module in modules if any(_is_below(module, name) for name in self._names)]

    def not_saved(self, targets: Iterable[str], findings: Findings) -> tuple[str, ...]:
        """Of targeted modules those that PEFT does not leave out because they are saved."""
        kept = tuple(target for target in targets if not any(f".{name}." in f".{target}." for name in self._names))
        for module in kept:
            if any(_is_below(module, name) for name in self._names):
                allowed = "whole parts of a path, where its module is a target too"
                findings.add("invalid_value", self._where, module, allowed)
        return kept

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor but the matrices with a row for each token."""
        base = self._base
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.linears:
            linear = base.linears[name]
            size = (linear.out_features, linear.in_features)
            shapes[f"{PEFT_PREFIX}{name}.weight"] = size[::-1] if linear.transposed else size
            if linear.has_bias:
                shapes[f"{PEFT_PREFIX}{name}.bias"] = (linear.out_features,)
        for name in self.norms:
            for part in ("weight", "bias") if base.norms[name].has_bias else ("weight",):
                shapes[f"{PEFT_PREFIX}{name}.{part}"] = (base.norms[name].size,)
        for name in self.matrices:
            if base.vocabulary[name].has_bias:
                shapes[f"{PEFT_PREFIX}{name}.bias"] = (base.vocabulary[name].out_features,)
        return shapes

    @property
    def bias_sizes(self) -> dict[str, int]:
        """Sizes of the biases, by tensor name."""
        return {name: shape[0] for name, shape in self._shapes.items() if name.endswith(".bias")}

    @property
    def modules(self) -> set[str]:
        return {*self.matrices, *self.norms, *self.linears}

    def holder_of(self, module: str) -> str | None:
        """The module itself, or that above it, which PEFT put its wrapper around."""
        parts = module.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((path for path in paths if path.endswith(self._names)), None)

    @property
    def _rows(self) -> dict[str, str]:
        """Tensors that are a matrix with a row for every token, by name: the matrix."""
        return {f"{PEFT_PREFIX}{name}.weight": name for name in self.matrices}

    @property
    def names(self) -> set[str]:
        """Of the tensors."""
        return {*self._shapes, *self._rows}

    @property
    def num_parameters(self) -> int:
        rows = [rows_shape(name, self._base) for name in self.matrices]
        return sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in (*self._shapes.values(), *rows))

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        """Every tensor is there, of the base's sizes."""
        expected = {**self._shapes, **{name: rows_shape(module, self._base) for name, module in self._rows.items()}}
        for name, shape in expected.items():
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"{list(shape)} by modules_to_save")
            elif name in self._rows:
                check_rows(info, self._rows[name], self._base, findings)
            else:
                check_dtype(info, FLOAT_DTYPES, findings)
                check_shape(info, shape, "by the base", findings)

    def read(self, tensors: TensorFile, findings: Findings) -> list[SavedDelta]:
        """The deltas, checked for their values."""
        base, rows = self._base, self._rows
        found = {name: tensors.read(name) for name in self._shapes}
        found |= {name: read_rows(tensors, name, module, base) for name, module in rows.items()}
        for name, values in found.items():
            check_values(name, values, findings)
        deltas: list[SavedDelta] = [RowsDelta(module, None, found[name]) for name, module in rows.items()]
        for name in self.linears:
            weight = found[f"{PEFT_PREFIX}{name}.weight"]
            deltas.append(WholeDelta(name, weight.t() if base.linears[name].transposed else weight))
        for name in (*self.linears, *self.matrices):
            if (bias := found.get(f"{PEFT_PREFIX}{name}.bias")) is not None:
                deltas.append(VectorDelta(name, new_bias=bias))
        for name in self.norms:
            prefix = f"{PEFT_PREFIX}{name}"
            deltas.append(NormDelta(name, found[f"{prefix}.weight"], found.get(f"{prefix}.bias"), replaces=True))
        return deltas


def _is_below(module: str, name: str) -> bool:
    """Whether the path of the module, or of one that it lies in, ends with ``name``."""
    return f"{module}.".find(f"{name}.") >= 0
