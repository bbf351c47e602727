"""PEFT C3A (Chen et al., arXiv:2407.19342): the delta is made of circulant blocks.

``c3a_kernel [out / b, in / b, b]``: block (i, j) has ``kernel[i, j, (t - u) mod b] / in`` in its row u and column t. A
circulant block is diagonal in the Fourier basis, one number for each of b frequencies, so the whole delta falls apart
into b matrices ``[out / b, in / b]`` and has full rank unless some of those have less. Source: peft 0.21,
``tuners/c3a/{layer,utils}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    BIAS,
    COMMON_FIELDS,
    LAYER_FIELDS,
    FieldRule,
    is_int,
    is_pattern,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_VECTORS_AT_ONCE = 256


def _is_size(value: object) -> bool:
    return is_int(value) and isinstance(value, int) and 1 <= value <= 1 << 20


class C3a(PeftReader):
    peft_type = "C3A"
    title = "C3A"
    source = "`c3a_kernel`"
    delta = "`circulant blocks / in`"
    term = "low rank, rank min(in, out)"
    limits = "a block size that does not divide both sides; an error above the limit, where the rank exceeds the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        **LAYER_FIELDS,
        "block_size": FieldRule("understood", _is_size, "an integer above 0", required=True),
        "block_size_pattern": FieldRule(
            "understood",
            lambda value: is_pattern(value, _is_size),
            "module paths to integers above 0",
            per_key=_is_size,
        ),
        "bias": BIAS,
        "init_weights": FieldRule(
            "descriptive",
            one_of(None, True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
            "null, true, false, gaussian, kaiming_uniform or xavier_uniform",
        ),
    }

    def _block(self, linear: LinearSpec) -> int:
        return int(self.patterns("block_size_pattern").value_for(linear.name, self.config["block_size"]))

    def check(self, findings: Findings) -> None:
        for linear in self.linears:
            block = self._block(linear)
            if linear.in_features % block or linear.out_features % block:
                allowed = f"a divisor of {linear.in_features} and {linear.out_features}, the sizes of {linear.name}"
                findings.add("invalid_value", f"{self.where}:block_size", block, allowed)

    def bound(self, linear: LinearSpec) -> int:
        return linear.narrow

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        block = self._block(linear)
        return {"c3a_kernel": TensorRule((linear.out_features // block, linear.in_features // block, block))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        kernel = parts["c3a_kernel"].float()
        block = kernel.shape[2]
        turn = (torch.arange(block) - torch.arange(block)[:, None]) % block
        delta = kernel[:, :, turn].permute(0, 2, 1, 3).reshape(linear.out_features, linear.in_features)

        def dense() -> Tensor:
            """PEFT's product in the Fourier basis, on every unit vector, some at a time."""
            spectrum, columns = torch.fft.fft(kernel), []
            for unit in torch.eye(linear.in_features).view(linear.in_features, -1, block).split(_VECTORS_AT_ONCE):
                product = torch.einsum("xnb,mnb->xmb", torch.fft.ifft(unit), spectrum)
                columns.append(torch.fft.fft(product).real.flatten(1))
            return torch.cat(columns).t() / linear.in_features

        return converted(linear, delta / linear.in_features, self.conversion, dense)
