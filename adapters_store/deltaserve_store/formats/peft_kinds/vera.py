"""PEFT VeRA (Kopiczko et al., arXiv:2310.11454): two vectors a linear, and projections A and B that all linears share.

``vera_lambda_d [r]``, ``vera_lambda_b [out]``; the delta is ``diag(b) B[:out] diag(d) A[:, :in]``. The projections are
``base_model.vera_A [r, max in]`` and ``base_model.vera_B [max out, r]``, maxima over the targeted linears, or, with
``save_projection: false``, drawn from ``projection_prng_key``: A, then B, uniform within ``sqrt(6 / columns)``, one CPU
generator for both. That draw is repeated only where this build's generator gives the numbers that it gave when this was
written. Source: peft 0.21, ``tuners/vera/{layer,model}.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    BIAS,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    LAYER_FIELDS,
    NUMBER,
    RANK,
    SWITCH,
    FieldRule,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_KNOWN_DRAW = (0.06984508037567139, -0.602393627166748, -0.5212045907974243)
"""``uniform_(-1, 1)`` of a generator with seed 7, values 0, 1 and 4099 of 5000: from a short and a long stretch."""

PROJECTION_KEY = FieldRule(
    "understood", lambda value: is_int(value) and -(1 << 63) <= value < 1 << 63, "an integer of 64 bits"
)


def uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """PEFT's Kaiming draw: uniform within ``sqrt(3) * sqrt(2 / columns)``."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def is_known_generator() -> bool:
    """Whether seeds mean on this machine what they meant where the reader was written, to the bit."""
    draw = torch.empty(5000).uniform_(-1, 1, generator=torch.Generator().manual_seed(7))
    return (float(draw[0]), float(draw[1]), float(draw[4099])) == _KNOWN_DRAW


class Vera(PeftReader):
    _prefix: ClassVar[str] = "vera"
    _parts: ClassVar[int] = 1
    """Stretches of r rows that A and the vector of ``lambda_d`` have; the first counts."""
    peft_type = "VERA"
    title = "VeRA"
    source = "`vera_lambda_b`, `vera_lambda_d`; shared `vera_A`, `vera_B`, or their seed"
    delta = "`diag(b) B diag(d) A`"
    limits = (
        "a seed (`save_projection: false`) where the generator of this build draws other numbers (`seed_not_usable`)"
    )
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
        "r": RANK,
        "bias": BIAS,
        "save_projection": SWITCH,
        "projection_prng_key": PROJECTION_KEY,
        "d_initial": NUMBER,
        "vera_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def _is_saved(self) -> bool:
        return bool(self.config.get("save_projection", True))

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        rank = int(self.config["r"])
        widest = max(linear.in_features for linear in self.linears)
        tallest = max(linear.out_features for linear in self.linears)
        return (self._parts * rank, widest), (tallest, rank)

    def _names(self) -> tuple[str, str]:
        return f"base_model.{self._prefix}_A", f"base_model.{self._prefix}_B"

    def check(self, findings: Findings) -> None:
        if not self._is_saved() and not is_known_generator():
            allowed = "projections in the file (save_projection=True): this build draws other numbers from a seed"
            findings.add("seed_not_usable", f"{self.where}:projection_prng_key", "a seed", allowed)

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def shared_layout(self) -> Mapping[str, TensorRule]:
        if not self._is_saved():
            return {}
        return {name: TensorRule(shape) for name, shape in zip(self._names(), self._shapes(), strict=True)}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {
            f"{self._prefix}_lambda_b": TensorRule((linear.out_features,)),
            f"{self._prefix}_lambda_d": TensorRule((self._parts * int(self.config["r"]),)),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        if self._is_saved():
            self._a, self._b = (shared[name].float() for name in self._names())
            return
        shape_a, shape_b = self._shapes()
        generator = torch.Generator(device="cpu").manual_seed(self.config.get("projection_prng_key", 0))
        self._a, self._b = uniform(shape_a, generator), uniform(shape_b, generator)

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        rank = int(self.config["r"])
        a, b = self._a[:rank, : linear.in_features], self._b[: linear.out_features]
        scale_b, scale_d = parts[f"{self._prefix}_lambda_b"].float(), parts[f"{self._prefix}_lambda_d"].float()[:rank]

        def dense() -> Tensor:
            return torch.einsum("o,or,r,ri->oi", scale_b, b, scale_d, a)

        return LoraDelta(linear.name, scale_d[:, None] * a, scale_b[:, None] * b, 1.0, dense=dense)


class Pvera(Vera):
    """PVeRA (arXiv:2512.07703): A and ``pvera_lambda_d`` have 2 r rows, for means and logarithms of variances of what B
    gets; unless samples are asked for, an answer is made of the means alone: VeRA with the first r rows."""

    _prefix: ClassVar[str] = "pvera"
    _parts: ClassVar[int] = 2
    peft_type = "PVERA"
    title = "PVeRA"
    source = "`pvera_lambda_b`, `pvera_lambda_d`; shared `pvera_A`, `pvera_B`, or their seed"
    delta = "`diag(b) B diag(d) A` of the means, the first r rows of A and d"
    limits = "samples (`sample_at_inference: true`); a seed that is not usable, as of VeRA"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in Vera.fields.items() if name != "vera_dropout"},
        "pvera_dropout": FRACTION,
        "sample_at_inference": FieldRule(
            "understood",
            one_of(False),
            "false (random numbers for every token are no fixed delta)",
            "unsupported_feature",
        ),
        "generator_seed": FieldRule("descriptive", lambda value: value is None or is_int(value), "null or an integer"),
    }
