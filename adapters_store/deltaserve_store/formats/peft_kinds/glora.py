"""PEFT GLoRA (Chavan et al., arXiv:2306.07967): ``W + W o A + B``, and of the bias ``b + b o D + E + W C``.

Each of the five is a product ``Xd Xu`` (``lora``), a vector ``X`` or one number (``constant``), or absent, which the
file tells by zeros. A and B as vectors scale and shift rows: a scale of outputs, and a term of rank 1 that adds the
same number along a row. A as a product multiplies the weight entry by entry, as HiRA does. C, D and E are there where
the base has a bias. Source: peft 0.21, ``tuners/glora/{config,layer}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import COMMON_FIELDS, FLAG, RANK, FieldRule, one_of
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import Delta, PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import FunctionDelta, LoraDelta
from deltaserve_store.spec import LinearSpec
from deltaserve_store.vector_deltas import VectorDelta


def _paths(*values: str) -> FieldRule:
    return FieldRule("understood", one_of(*values), ", ".join(values), required=True)


class Glora(PeftReader):
    peft_type = "GLORA"
    title = "GLoRA"
    source = "`glora_A` to `glora_E`, each `.Xd` and `.Xu`, `.X` or `.zeros`"
    delta = "`W ∘ A + B`; of the bias `b ∘ D + E + W C`"
    term = "A as a vector or number: vector, and low rank, rank 1; as a product: low rank, rank min(in, out)"
    limits = "Conv1D; an error above the limit, where A is a product and the rank exceeds the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        "r": RANK,
        "config_A_B": _paths("lora", "vector", "constant", "none"),
        "config_C": _paths("lora", "vector", "none"),
        "config_D_E": _paths("vector", "constant", "none"),
        "bias": FieldRule(
            "understood", one_of("none"), "none (its own terms say what becomes of a bias)", "unsupported_feature"
        ),
        "init_weights": FLAG,
    }

    def bound(self, linear: LinearSpec) -> int | None:
        return linear.narrow if self.config["config_A_B"] == "lora" else None

    def rank(self, linear: LinearSpec) -> int | None:
        path = self.config["config_A_B"]
        return super().rank(linear) if path == "lora" else None if path == "none" else 1

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        out_features, in_features = linear.out_features, linear.in_features
        of_bias = {name: self.config[name] if linear.has_bias else "none" for name in ("config_C", "config_D_E")}
        rules: dict[str, TensorRule] = {}
        for letter in "AB":
            rules |= self._path(f"glora_{letter}", self.config["config_A_B"], (out_features, in_features), vector=0)
        rules |= self._path("glora_C", of_bias["config_C"], (in_features, 1), vector=0)
        for letter in "DE":
            rules |= self._path(f"glora_{letter}", of_bias["config_D_E"], (out_features,), vector=None)
        return rules

    def _path(self, name: str, path: str, shape: tuple[int, ...], *, vector: int | None) -> dict[str, TensorRule]:
        """``vector``: the side whose numbers a column has, None where ``shape`` is a vector's."""
        rank = int(self.config["r"])
        if path == "lora":
            return {f"{name}.Xd": TensorRule((shape[0], rank)), f"{name}.Xu": TensorRule((rank, shape[1]))}
        if path == "vector":
            return {f"{name}.X": TensorRule(shape if vector is None else (shape[vector], 1))}
        return {f"{name}.X": TensorRule((1,))} if path == "constant" else {f"{name}.zeros": TensorRule(shape)}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> tuple[Delta, ...]:
        for suffix, values in parts.items():
            if suffix.endswith(".zeros") and bool(values.any()):
                found = "numbers other than 0"
                findings.add("invalid_value", f"{PEFT_PREFIX}{linear.name}.{suffix}", found, "zeros, by the config")
        wholes = {letter: _whole(f"glora_{letter}", parts) for letter in "ABCDE"}
        column, scale, shift = (wholes[letter] for letter in "CDE")
        made: list[Delta] = []
        out_scale = None
        if self.config["config_A_B"] == "lora":
            made.append(self._products(linear, parts))
        elif (rows := wholes["B"]) is not None and (factor := wholes["A"]) is not None:
            out_scale = 1 + factor.flatten().expand(linear.out_features)
            made.append(_along_rows(linear, rows))
        vectors = VectorDelta(
            linear.name,
            out_scale=out_scale,
            bias=None if shift is None else shift.expand(linear.out_features),
            in_bias=None if column is None else column.flatten(),
            bias_scale=None if scale is None else 1 + scale.expand(linear.out_features),
        )
        if any(vector is not None for vector in (out_scale, shift, column, scale)):
            made.append(vectors)
        return tuple(made)

    def _products(self, linear: LinearSpec, parts: Mapping[str, Tensor]) -> FunctionDelta:
        factors = tuple(parts[f"glora_{letter}.X{side}"].float() for letter in "AB" for side in "du")

        def term(product: Tensor, dense: Callable[[], Tensor]) -> LoraDelta:
            return converted(linear, product, self.conversion, dense)

        def dense(weight: Tensor) -> Tensor:
            """One direction after the other, those of A with the weight scaled on both of its sides."""
            down_a, up_a, down_b, up_b = factors
            total = weight.new_zeros(weight.shape)
            for index in range(len(up_a)):
                total.addcmul_(weight * down_a[:, index : index + 1], up_a[index : index + 1])
                total.addr_(down_b[:, index], up_b[index])
            return total

        return FunctionDelta(
            linear.name, factors, self.conversion.rank_of(linear, linear.narrow), _scaled_and_shifted, term, dense
        )


def _scaled_and_shifted(weight: Tensor, down_a: Tensor, up_a: Tensor, down_b: Tensor, up_b: Tensor) -> Tensor:
    return weight * (down_a @ up_a) + down_b @ up_b


def _along_rows(linear: LinearSpec, numbers: Tensor) -> LoraDelta:
    """The same number added to all entries of a row."""
    rows = numbers.flatten().expand(linear.out_features)

    def dense() -> Tensor:
        return rows[:, None].expand(linear.out_features, linear.in_features).clone()

    return LoraDelta(linear.name, torch.ones(1, linear.in_features), rows[:, None].contiguous(), 1.0, dense=dense)


def _whole(name: str, parts: Mapping[str, Tensor]) -> Tensor | None:
    """What a path gives, float32; None for an absent one."""
    if f"{name}.Xd" in parts:
        return parts[f"{name}.Xd"].float() @ parts[f"{name}.Xu"].float() if name == "glora_C" else None
    given = parts.get(f"{name}.X")
    return None if given is None else given.float()
