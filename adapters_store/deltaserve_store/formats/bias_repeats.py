"""Biases that PEFT writes once more: with ``bias: all`` it saves whatever is called so, beside modules saved whole too.

Of a module saved whole there is the trained bias again, ``<module>.modules_to_save.bias``, or, where what was saved is
a module that holds it, ``<holder>.modules_to_save.<adapter>.<rest>.bias``; it must be the same. And there is the
base's, ``<holder>.original_module.<rest>.bias``, which no pass uses while the adapter is on: it must fit, and is left
out.
Source: peft 0.21, ``tuners/tuners_utils.py`` (``_get_learnable_bias_state_dict``), ``utils/other.py``.
"""

from __future__ import annotations

import torch

from deltaserve_store.findings import Findings
from deltaserve_store.formats.saved_modules import SavedModules
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.formats.trained_biases import check_vectors, read_vectors

_ORIGINAL, _TRAINED = ".original_module.", ".modules_to_save."


class BiasRepeats:
    """Those that ``tensors`` has of modules in ``saved``; other files than those of ``bias: all`` may have none."""

    def __init__(self, option: str, saved: SavedModules, tensors: TensorFile) -> None:
        self._of: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        sizes = saved.bias_sizes if option == "all" else {}
        for name in tensors.header.tensors if sizes else ():
            path = name.removeprefix(PEFT_PREFIX)
            holder, separator, rest = path.partition(_ORIGINAL if _ORIGINAL in path else _TRAINED)
            if not separator or not name.startswith(PEFT_PREFIX) or not f".{rest}".endswith(".bias"):
                continue
            if separator == _TRAINED and rest != "bias":
                rest = rest.partition(".")[2]
            own = f"{PEFT_PREFIX}{holder}.{rest}"
            module = f"{holder}.{rest}".removesuffix(".bias")
            if own in sizes and saved.holder_of(module) == holder:
                self._sizes[name] = sizes[own]
                if separator == _TRAINED:
                    self._of[name] = own

    @property
    def names(self) -> set[str]:
        return set(self._sizes)

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        check_vectors(self._sizes, "bias", tensors, findings)

    def check_values(self, tensors: TensorFile, findings: Findings) -> None:
        """Whether they are finite, and the trained ones equal."""
        found = read_vectors(self._sizes, tensors, findings)
        for name, own in self._of.items():
            if not torch.equal(found[name], tensors.read(own)):
                findings.add("invalid_value", name, "another bias than the module's", f"the values of {own}")
