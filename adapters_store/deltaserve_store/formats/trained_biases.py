"""``bias`` of a PEFT config: trained biases of the base, beside whatever the adapter is.

``<kind>_only`` saves those of the targeted linears, ``<module>.base_layer.bias``; ``all`` those of every other linear,
of the head and of norms too, ``<module>.bias``. They stand in place of the base's; a module without a bias gets none.
Source: peft 0.21, ``tuners/tuners_utils.py`` (``_get_learnable_bias_state_dict``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, PEFT_PREFIX, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta


class TrainedBiases:
    """The biases that a file with this ``option`` must hold. ``modules``: the targets, linears and the head; ``saved``:
    modules that are saved whole, with their bias."""

    def __init__(self, option: str, modules: Collection[str], base: BaseSpec, saved: Collection[str] = ()) -> None:
        self.of_linears: dict[str, str] = {}
        self._of_norms: dict[str, str] = {}
        linears = {**base.linears, **({} if base.head is None else {base.head.name: base.head})}
        for name, linear in linears.items() if option != "none" else ():
            if name in modules and linear.has_bias:
                self.of_linears[name] = f"{PEFT_PREFIX}{name}.base_layer.bias"
            elif linear.has_bias and option == "all" and name not in saved:
                self.of_linears[name] = f"{PEFT_PREFIX}{name}.bias"
        if option == "all":
            norms = [n for n, norm in base.norms.items() if norm.has_bias and n not in saved]
            self._of_norms = {n: f"{PEFT_PREFIX}{n}.bias" for n in norms}
        self.sizes = {tensor: linears[name].out_features for name, tensor in self.of_linears.items()}
        self.sizes |= {tensor: base.norms[name].size for name, tensor in self._of_norms.items()}

    def norm_deltas(self, found: Mapping[str, Tensor]) -> list[NormDelta]:
        return [NormDelta(norm, shift=found[name], replaces=True) for norm, name in self._of_norms.items()]


def check_vectors(sizes: Mapping[str, int], why: str, tensors: TensorFile, findings: Findings) -> None:
    """Every vector is there, of its size."""
    for name, size in sizes.items():
        info = tensors.header.tensors.get(name)
        if info is None:
            findings.add("missing_tensor", name, "nothing", f"[{size}] by {why}")
            continue
        check_dtype(info, FLOAT_DTYPES, findings)
        check_shape(info, (size,), "by the base", findings)


def read_vectors(sizes: Mapping[str, int], tensors: TensorFile, findings: Findings) -> dict[str, Tensor]:
    """By tensor name, checked for their values."""
    found = {name: tensors.read(name) for name in sizes}
    for name, values in found.items():
        check_values(name, values, findings)
    return found
