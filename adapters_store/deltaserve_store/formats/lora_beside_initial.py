"""PEFT LoRA with the factors that training started from, in ``initial_model.safetensors``.

PiSSA (also with random numbers), OLoRA, CorDA and LoRA-GA take ``scaling * B_0 A_0`` out of the base before training,
so that on the base itself the delta is ``scaling * (B A - B_0 A_0)``, of rank 2 r: ``[B, -B_0] [A; A_0]``. The initial
factors are the tensor file of the adapter as PEFT saves it before the first step, with the names of the trained one.
Nothing of the base is needed, and nothing is left open. LoftQ is refused all the same: it trains beside a quantised
base, and what quantising lost is in neither file. Source: peft 0.21, ``tuners/lora/{layer,model}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.file_names import INITIAL_TENSORS
from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import MAX_RANK
from deltaserve_store.formats.tensor_checks import check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import LoraDelta

_CHANGES_BASE = re.compile(r"pissa(_niter_[0-9]{1,6})?|olora|corda|lora_ga")
_ALLOWED = (
    "pissa, pissa_niter_N, olora, corda, lora_ga, or true where it stands for one of them: only these take their "
    f"initial factors out of the base, and {INITIAL_TENSORS} has no meaning beside others"
)
_LOFTQ = f"{_ALLOWED}; what LoftQ's quantising took from the base is in neither file"


def beside_initial(config: Mapping[str, Any], where: str, findings: Findings) -> dict[str, Any]:
    """The config as that of a plain LoRA; what the initial factors cannot be joined with is added to ``findings``."""
    method = config.get("init_lora_weights", True)
    if method == "loftq":
        findings.add("unsupported_feature", f"{where}:init_lora_weights", method, _LOFTQ)
    elif method is not True and not (isinstance(method, str) and _CHANGES_BASE.fullmatch(method)):
        findings.add("invalid_value", f"{where}:init_lora_weights", method, _ALLOWED)
    if config.get("use_dora"):
        findings.add("unsupported_feature", f"{where}:use_dora", True, f"false beside {INITIAL_TENSORS}")
    plain = {**config, "init_lora_weights": True}
    for field in ("corda_config", "lora_ga_config"):
        if isinstance(config.get(field), dict):  # how the initial factors were found
            plain[field] = None
    return plain


def in_initial(found: Findings, findings: Findings) -> None:
    """Findings about the initial file, told apart from those about the trained one."""
    for reason in found.reasons:
        findings.add(reason.code, f"{INITIAL_TENSORS}:{reason.where}", reason.found, reason.allowed)


def less_initial(delta: LoraDelta, names: tuple[str, str], initial: TensorFile, findings: Findings) -> LoraDelta:
    """``delta`` as the trained file has it, on the base itself; ``names`` are those of A and B."""
    before_a, before_b = (_read(name, initial, findings) for name in names)
    if 2 * delta.rank > MAX_RANK:
        allowed = f"at most {MAX_RANK // 2} beside {INITIAL_TENSORS}: the delta has twice the rank"
        findings.add("rank_out_of_range", delta.module, f"rank {delta.rank}", allowed)
    after_a, after_b, scaling = delta.a, delta.b, delta.scaling

    def dense() -> Tensor:
        """Both products, then their difference, in float64."""
        return (scaling * (after_b.double() @ after_a.double() - before_b.double() @ before_a.double())).float()

    a = torch.cat([after_a.float(), before_a.float()])
    b = torch.cat([after_b.float(), -before_b.float()], dim=1)
    return LoraDelta(delta.module, a, b, scaling, dense=dense)


def _read(name: str, initial: TensorFile, findings: Findings) -> Tensor:
    values = initial.read(name)
    check_values(f"{INITIAL_TENSORS}:{name}", values, findings)
    return values
