"""What any kind of PEFT may have beside its own tensors: modules saved whole, and trained biases of the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.findings import Findings
from deltaserve_store.formats.bias_repeats import BiasRepeats
from deltaserve_store.formats.saved_modules import SavedDelta, SavedModules
from deltaserve_store.formats.tensor_checks import check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.formats.trained_biases import TrainedBiases, check_vectors, read_vectors
from deltaserve_store.formats.vocabulary_rows import check_rows, copies_in, read_rows
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import VectorDelta


class Beside:
    """Of a file with an accepted ``config`` and these ``targets``; ``targets`` are then those that are not saved whole.

    Copies of the base's embedding and head may be there, as PEFT writes them where the caller asks for it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        targets: Iterable[str],
        tensors: TensorFile,
        base: BaseSpec,
        where: str,
        findings: Findings,
    ) -> None:
        self._base = base
        self.saved = SavedModules(config.get("modules_to_save"), base, where, findings)
        self.targets = self.saved.not_saved(targets, findings)
        option = config.get("bias", "none")
        self._biases = TrainedBiases(option, self.targets, base, self.saved.modules)
        self._repeats = BiasRepeats(option, self.saved, tensors)
        self._copies = copies_in(tensors, base, self.saved.names)

    @property
    def names(self) -> set[str]:
        """Tensors that are accounted for."""
        return {*self.saved.names, *self._biases.sizes, *self._repeats.names, *self._copies}

    @property
    def num_parameters(self) -> int:
        """Numbers in the file; copies are none of the adapter's."""
        return self.saved.num_parameters + sum(self._biases.sizes.values())

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        """Every tensor is there, of the base's sizes."""
        self.saved.check_layout(tensors, findings)
        check_vectors(self._biases.sizes, "bias", tensors, findings)
        self._repeats.check_layout(tensors, findings)
        for name, module in self._copies.items():
            check_rows(tensors.header.tensors[name], module, self._base, findings)

    def read(self, tensors: TensorFile, findings: Findings) -> list[SavedDelta]:
        """The deltas, checked for their values."""
        deltas = self.saved.read(tensors, findings)
        self._repeats.check_values(tensors, findings)
        found = read_vectors(self._biases.sizes, tensors, findings)
        deltas += [VectorDelta(module, new_bias=found[name]) for module, name in self._biases.of_linears.items()]
        deltas += self._biases.norm_deltas(found)
        for name, module in self._copies.items():
            values = read_rows(tensors, name, module, self._base)
            check_values(name, values, findings)
            deltas.append(RowsDelta(module, None, values, is_copy=True))
        return deltas
