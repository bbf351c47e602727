"""Variants of PEFT LoRA that a field of the config switches on, and whose answers are those of a low-rank term.

KaSA (arXiv:2412.06071, ``kasa_config``): ``scaling * B diag(d) A`` with ``<module>.lora_diag`` [r], beside a base
without its r smallest singular components, which are taken from the base anew, as PEFT does. BD-LoRA (``use_bdlora``):
A or B is block-diagonal in ``nblocks`` blocks and saved as their rows, one block below the other: ``[r, in / nblocks]``
or ``[out, r / nblocks]``; which of them goes by parts of the module's path. VeLoRA and MonteCLoRA change training
alone; what they keep for it (``lora_velora_embed``, ``lora_monteclora_sampler.*``) has no part in an answer. Source:
peft 0.21, ``tuners/lora/{config,variants}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_config import PeftLoraConfig
from deltaserve_store.formats.peft_fields import FieldRule, check_fields, is_int
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, PEFT_PREFIX, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import BaseSpec

_OF_TRAINING = ("lora_velora_embed", "lora_monteclora_sampler.")
_SIDES = ("target_modules_bd_a", "target_modules_bd_b")


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) and item for item in value))


def _are_blocks(value: Any) -> bool:
    if value is None or value is False:
        return True
    return (
        isinstance(value, dict)
        and set(value) <= {*_SIDES, "nblocks", "match_strict"}
        and all(_are_names(value.get(side)) for side in _SIDES)
        and is_int(value.get("nblocks"))
        and 1 <= value["nblocks"] <= 1024
    )


_TRAINING = FieldRule("descriptive", _is_object, "null or an object: it changes training alone")
FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "kasa_config": FieldRule("understood", _is_object, "null or an object; null with DoRA"),
        "use_bdlora": FieldRule(
            "understood", _are_blocks, "null, false or an object with nblocks and lists of names; null with DoRA"
        ),
        "velora_config": _TRAINING,
        "monteclora_config": _TRAINING,
    }
)


def split_config(config: Mapping[str, Any], where: str, findings: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config with the fields of ``FIELDS`` switched off, and those fields, checked and with their defaults."""
    own: dict[str, Any] = dict.fromkeys(FIELDS)
    given = {field: value for field, value in config.items() if field in FIELDS}
    before = len(findings.reasons)
    check_fields(given, FIELDS, where, findings)
    wanted = own if len(findings.reasons) > before else own | given
    switched = [field for field in ("kasa_config", "use_bdlora") if wanted[field] not in (None, False)]
    if switched and config.get("use_dora"):
        findings.add("unsupported_feature", f"{where}:use_dora", True, f"false with {switched[0]}")
    if wanted["kasa_config"] is not None and config.get("fan_in_fan_out"):
        findings.add("unsupported_feature", f"{where}:kasa_config", "an object", "null where the base has Conv1D")
    if len(switched) == 2:
        findings.add("invalid_value", f"{where}:use_bdlora", "an object", "null with kasa_config")
    return {field: own.get(field, value) if field in FIELDS else value for field, value in config.items()}, wanted


class LoraVariants:
    """What the targeted ``modules`` of a file have by their variant; ``is_plain`` where nothing changes their term."""

    def __init__(
        self,
        options: Mapping[str, Any],
        lora: PeftLoraConfig,
        modules: tuple[str, ...],
        base: BaseSpec,
        where: str,
        findings: Findings,
    ) -> None:
        self._lora, self._base = lora, base
        self.has_diagonal = options["kasa_config"] is not None
        self._blocks: dict[str, tuple[str, int]] = {}
        if told := options["use_bdlora"]:
            for module in modules:
                self._choose(module, told, f"{where}:use_bdlora", findings)
        self.field = "kasa_config" if self.has_diagonal else "use_bdlora"
        self.is_plain = not self.has_diagonal and not self._blocks
        self.diagonals = {m: f"{PEFT_PREFIX}{m}.lora_diag" for m in modules} if self.has_diagonal else {}
        self._of_training = tuple(
            f"{PEFT_PREFIX}{module}.{part}"
            for field, part in zip(("velora_config", "monteclora_config"), _OF_TRAINING, strict=True)
            if options[field] is not None
            for module in modules
        )

    def _choose(self, module: str, told: Mapping[str, Any], place: str, findings: Findings) -> None:
        sides = [side for side in _SIDES if any(name in module for name in told.get(side) or ())]
        if len(sides) == 2 or (not sides and told.get("match_strict", True)):
            found = "both sides" if sides else "no side"
            findings.add("invalid_value", place, f"{module} by {found}", "one side of every targeted linear")
        for side in sides[:1]:
            linear, rank, count = self._base.linears[module], self._lora.rank_of(module), told["nblocks"]
            width = linear.in_features if side == _SIDES[0] else linear.out_features
            if rank % count or width % count:
                findings.add("invalid_value", place, count, f"a divisor of {rank} and {width}, the sizes of {module}")
            self._blocks[module] = side[-1], count

    def shapes(self, module: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B in the file."""
        linear, rank = self._base.linears[module], self._lora.rank_of(module)
        side, count = self._blocks.get(module, ("", 1))
        return (
            (rank, linear.in_features // count if side == "a" else linear.in_features),
            (linear.out_features, rank // count if side == "b" else rank),
        )

    def num_parameters(self, module: str) -> int:
        (rows_a, columns_a), (rows_b, columns_b) = self.shapes(module)
        return rows_a * columns_a + rows_b * columns_b + (self._lora.rank_of(module) if self.has_diagonal else 0)

    def names_in(self, tensors: TensorFile) -> set[str]:
        """Tensors that are accounted for beside A and B."""
        return {*self.diagonals.values()} | {n for n in tensors.header.tensors if n.startswith(self._of_training)}

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        for module, name in self.diagonals.items():
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"[{self._lora.rank_of(module)}] by kasa_config")
                continue
            check_dtype(info, FLOAT_DTYPES, findings)
            check_shape(info, (self._lora.rank_of(module),), "by the rank", findings)

    def whole(self, delta: LoraDelta, tensors: TensorFile, findings: Findings) -> LoraDelta:
        """``delta`` as the file has it, as A and B of a plain LoRA."""
        if name := self.diagonals.get(delta.module):
            diagonal = tensors.read(name)
            check_values(name, diagonal, findings)
            return replace(delta, b=delta.b.float() * diagonal.float())
        side, count = self._blocks.get(delta.module, ("", 1))
        if not side:
            return delta
        stored = delta.a if side == "a" else delta.b
        whole = torch.block_diag(*stored.chunk(count))
        a, b = (whole, delta.b) if side == "a" else (delta.a, whole)
        return LoraDelta(delta.module, a, b, delta.scaling, dense=_by_blocks(delta, side, count))


def _by_blocks(delta: LoraDelta, side: str, count: int) -> Callable[[], Tensor]:
    """The delta by pieces of its columns, or of its rows, each with its own stretch of the rank."""

    def dense() -> Tensor:
        a, b = delta.a.float(), delta.b.float()
        if side == "a":
            pieces = [left @ right for left, right in zip(b.chunk(count, dim=1), a.chunk(count), strict=True)]
            return delta.scaling * torch.cat(pieces, dim=1)
        return delta.scaling * torch.cat(
            [left @ a_part for left, a_part in zip(b.chunk(count), a.chunk(count), strict=True)]
        )

    return dense
