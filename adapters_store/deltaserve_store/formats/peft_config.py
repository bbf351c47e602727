"""``adapter_config.json`` of PEFT, read strictly: which linears it targets, and what LoRA's and SHiRA's fields mean."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import PatternTable, TargetRules, is_head
from deltaserve_store.formats.peft_fields import LORA_FIELDS, SHIRA_FIELDS, check_fields
from deltaserve_store.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """The fields of a ``LoraConfig`` that change the maths."""

    rank: int
    alpha: float
    use_rslora: bool
    ranks: PatternTable
    alphas: PatternTable
    targets: TargetRules
    fan_in_fan_out: bool
    base_name: str | None

    def rank_of(self, module: str) -> int:
        return int(self.ranks.value_for(module, self.rank))

    def scaling_of(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA, with the module's own rank and alpha."""
        rank, alpha = self.rank_of(module), self.alphas.value_for(module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class PeftShiraConfig:
    """The fields of a ``ShiraConfig`` that change the maths; its scaling is always 1."""

    rank: int
    targets: TargetRules
    base_name: str | None


def parse_lora_config(
    config: Mapping[str, Any], base: BaseSpec, where: str, findings: Findings
) -> PeftLoraConfig | None:
    """None when ``findings`` got a reason that leaves the meaning open. Targets may be embedding and head, too."""
    check_fields(config, LORA_FIELDS, where, findings)
    targets = targets_of(config, where, findings, others=tuple(base.vocabulary))
    if findings:
        return None
    lora = PeftLoraConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        use_rslora=config.get("use_rslora", False),
        ranks=PatternTable(config.get("rank_pattern") or {}),
        alphas=PatternTable(config.get("alpha_pattern") or {}),
        targets=targets,
        fan_in_fan_out=config.get("fan_in_fan_out", False),
        base_name=config.get("base_model_name_or_path") or None,
    )
    matrices = [name for name in base.vocabulary if lora.targets.matches(name)]
    modules = lora.targets.select(base)
    if base.head is not None and base.head.name in matrices and not lora.fan_in_fan_out:
        return lora  # the head, wrapped last, has put the flag to false whatever the linears are
    if modules or not matrices:
        check_orientation(modules, lora.fan_in_fan_out, base, where, findings)
    return lora


def parse_shira_config(
    config: Mapping[str, Any], base: BaseSpec, where: str, findings: Findings
) -> PeftShiraConfig | None:
    """None when ``findings`` got a reason that leaves the meaning open."""
    check_fields(config, SHIRA_FIELDS, where, findings)
    targets = targets_of(config, where, findings)
    if findings:
        return None
    shira = PeftShiraConfig(rank=config["r"], targets=targets, base_name=config.get("base_model_name_or_path") or None)
    check_orientation(shira.targets.select(base), config.get("fan_in_fan_out", False), base, where, findings)
    return shira


def targets_of(config: Mapping[str, Any], where: str, findings: Findings, others: Collection[str] = ()) -> TargetRules:
    """Which linears are targeted. Reads only values that ``check_fields`` accepted; of others it says nothing more.

    ``others``: paths of embedding and head where they may be targets.
    """
    modules = config.get("target_modules")
    named = frozenset(item for item in modules if isinstance(item, str)) if isinstance(modules, list) else None
    for module in sorted(named or ()):
        if is_head(module) and not any(f".{other}".endswith(f".{module}") for other in others):
            findings.add("unsupported_target", f"{where}:target_modules", module, "linears of the decoder layers")
    layers = config.get("layers_to_transform")
    patterns = config.get("layers_pattern")
    if patterns and layers is None:
        findings.add("invalid_value", f"{where}:layers_pattern", patterns, "null unless layers_to_transform is given")
    if named is None and (layers is not None or patterns):
        findings.add("invalid_value", f"{where}:layers_to_transform", layers, "null with all-linear")
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(patterns, str):
        patterns = [patterns]
    excluded = config.get("exclude_modules")
    if findings:
        return TargetRules(named)
    return TargetRules(
        modules=named,
        excluded=frozenset(excluded or ()),
        layers=frozenset(layers) if layers else None,
        layers_patterns=tuple(patterns or ()),
    )


def check_orientation(
    modules: tuple[str, ...], fan_in_fan_out: bool, base: BaseSpec, where: str, findings: Findings
) -> None:
    """PEFT corrects the flag while it wraps the modules, so a saved file that disagrees was not made on this base."""
    if not modules:
        findings.add("target_not_found", f"{where}:target_modules", "no match", "names of linears of the base")
    for module in modules:
        if base.linears[module].transposed != fan_in_fan_out:
            findings.add(
                "fan_in_fan_out_mismatch",
                f"{where}:fan_in_fan_out",
                fan_in_fan_out,
                f"{not fan_in_fan_out}, as {module} of the base is stored",
            )
            return
