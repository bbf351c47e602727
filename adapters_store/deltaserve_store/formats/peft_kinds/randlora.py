"""PEFT RandLoRA (Albert et al., arXiv:2502.00987): a sum of low-rank products of random bases, together of full rank.

The bases ``base_model.randlora_A [r, 1, smaller side]`` and ``base_model.randlora_B [larger side, n, r]`` belong to all
linears, cut to each; a linear trains ``randlora_lambda [r, n]`` and ``randlora_gamma [n, min(in, out)]`` with ``n =
ceil(min(in, out) / r)`` products. A is scaled to ``lambda[r, n] A[r] gamma[n]`` and stands on the narrower side of the
linear. PEFT lays the directions of A out by r, then n, and those of B by n, then r, and pairs them in these orders.
Scaling is ``randlora_alpha / r``. The ranks of the products add up to min(in, out) or more, so the delta has full rank.
PEFT saves the bases once more beside every linear; such copies must be equal.

With ``save_projection: false`` they are drawn from ``projection_prng_key``, A and then B, by one CPU generator, and
divided by their deviation. By default the draw is uniform, in bfloat16 (in float16 on the few machines without it,
which no file tells), and B one product after the other; with ``sparse`` and ``very_sparse`` it is -1, 0 and 1, from
numbers of float32. That is repeated only where this build's generator gives the numbers that it gave when this was
written. Source: peft 0.21, ``tuners/randlora/{layer,model}.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    ALPHA,
    BIAS,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    LAYER_FIELDS,
    RANK,
    SWITCH,
    FieldRule,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.peft_kinds.vera import PROJECTION_KEY, is_known_generator
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

SHARED_A, SHARED_B = "base_model.randlora_A", "base_model.randlora_B"
_KNOWN_DRAW = (0.06982421875, -0.6015625, -0.51953125)
"""As that of VeRA, in bfloat16."""


def is_known_narrow_draw() -> bool:
    """Whether seeds mean in bfloat16 what they meant where the reader was written, to the bit."""
    draw = torch.empty(5000, dtype=torch.bfloat16).uniform_(-1, 1, generator=torch.Generator().manual_seed(7))
    return (float(draw[0]), float(draw[1]), float(draw[4099])) == _KNOWN_DRAW


def uniform_bases(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """bfloat16, PEFT's Kaiming draw of one product: the last axis counts its inputs."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(shape[-1]))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def sparse_bases(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    """float32 -1, 0 and 1: one in ``sparsity`` is not 0."""
    draw = torch.rand(shape, generator=generator)
    return (draw > 1 - 1 / (2 * sparsity)).float() - (draw < 1 / (2 * sparsity)).float()


_NOTE = (
    "Bases that the file leaves out were drawn in bfloat16, as PEFT draws them where that dtype is there. An adapter "
    "that was trained on a machine without it has others and needs save_projection=True."
)


class RandLora(PeftReader):
    peft_type = "RANDLORA"
    title = "RandLoRA"
    source = "`randlora_lambda`, `randlora_gamma`; shared `randlora_A`, `randlora_B`, or their seed"
    delta = "`alpha / r · Σ B_n diag(λ_n) A diag(γ_n)`"
    term = "low rank, rank min(in, out)"
    limits = (
        "a seed that is not usable, as of VeRA; bases of zeros (`very_sparse`, drawn for a small linear); an error "
        "above the limit, where the rank exceeds the bound"
    )
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
        "r": RANK,
        "randlora_alpha": ALPHA,
        "save_projection": SWITCH,
        "projection_prng_key": PROJECTION_KEY,
        "sparse": SWITCH,
        "very_sparse": SWITCH,
        "randlora_dropout": FRACTION,
        "bias": BIAS,
        "init_weights": FLAG,
    }

    def _num_bases(self, smaller_side: int) -> int:
        return -(-smaller_side // int(self.config["r"]))

    def bound(self, linear: LinearSpec) -> int:
        return linear.narrow

    def _is_saved(self) -> bool:
        return bool(self.config.get("save_projection", True))

    def _sparsity(self) -> float | None:
        if self.config.get("very_sparse"):
            return math.sqrt(self._shapes()[0][2])
        return 3 if self.config.get("sparse") else None

    def told(self) -> tuple[str, ...]:
        return () if self._is_saved() or self._sparsity() is not None else (_NOTE,)

    def check(self, findings: Findings) -> None:
        if self._is_saved() or (is_known_generator() if self._sparsity() is not None else is_known_narrow_draw()):
            return
        allowed = "bases in the file (save_projection=True): this build draws other numbers from a seed"
        findings.add("seed_not_usable", f"{self.where}:projection_prng_key", "a seed", allowed)

    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        rank = int(self.config["r"])
        sides = [
            max(linear.out_features for linear in self.linears),
            max(linear.in_features for linear in self.linears),
        ]
        return (rank, 1, min(sides)), (max(sides), self._num_bases(min(sides)), rank)

    def shared_layout(self) -> Mapping[str, TensorRule]:
        if not self._is_saved():
            return {}
        return {name: TensorRule(shape) for name, shape in zip((SHARED_A, SHARED_B), self._shapes(), strict=True)}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        narrow = linear.narrow
        bases = self._num_bases(narrow)
        rules = {
            "randlora_lambda": TensorRule((int(self.config["r"]), bases)),
            "randlora_gamma": TensorRule((bases, narrow)),
        }
        if self._is_saved():
            for name, shape in zip(("randlora_A", "randlora_B"), self._shapes(), strict=True):
                rules[name] = TensorRule(shape, optional=True)
        return rules

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        a, b = (shared[SHARED_A], shared[SHARED_B]) if self._is_saved() else self._drawn()
        if not self._is_saved() and not (a.isfinite().all() and b.isfinite().all()):
            allowed = "a draw with numbers other than 0 in it"
            findings.add("seed_not_usable", f"{self.where}:projection_prng_key", "bases of zeros", allowed)
        self._bases = {"randlora_A": a.float(), "randlora_B": b.float()}

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """The bases that PEFT would draw, in its dtype."""
        shape_a, shape_b = self._shapes()
        generator = torch.Generator(device="cpu").manual_seed(self.config.get("projection_prng_key", 0))
        sparsity = self._sparsity()
        if sparsity is not None:
            a, b = (sparse_bases(shape, sparsity, generator) for shape in (shape_a, shape_b))
        else:
            a, one = uniform_bases(shape_a, generator), (shape_b[0], 1, shape_b[2])
            b = torch.cat([uniform_bases(one, generator) for _ in range(shape_b[1])], dim=1)
        return a / a.std(), b / b.std()

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        scales, gains = parts["randlora_lambda"].float(), parts["randlora_gamma"].float()
        rank, bases = scales.shape
        narrow, wide = sorted((linear.out_features, linear.in_features))
        a, b = self._bases["randlora_A"][:, 0, :narrow], self._bases["randlora_B"][:wide, :bases]
        for name, basis in self._bases.items():
            if name in parts and not torch.equal(parts[name].float(), basis):
                where = f"{PEFT_PREFIX}{linear.name}.{name}"
                findings.add("invalid_value", where, "other values than the shared ones", f"those of base_model.{name}")
        scaling = float(self.config["randlora_alpha"]) / rank

        def dense() -> Tensor:
            """Direction i of A is (i // n, i % n), direction i of B (i % r, i // r)."""
            index = torch.arange(rank * bases)
            scaled = scales[index // bases, index % bases, None] * a[index // bases] * gains[index % bases]
            return _turned(b[:, index // rank, index % rank] @ scaled, linear) * scaling

        flat = (scales[:, :, None] * a[:, None, :] * gains).reshape(-1, narrow)
        delta = _turned((b.reshape(wide, -1).double() @ flat.double()).float(), linear) * scaling
        return converted(linear, delta, self.conversion, dense)


def _turned(product: Tensor, linear: LinearSpec) -> Tensor:
    """``[wide, narrow]`` -> ``[out, in]``; a square product is laid out as it is."""
    return product if linear.in_features <= linear.out_features else product.t().contiguous()
