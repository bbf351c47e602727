"""Every PEFT type by name: the readers of those that are served, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deltaserve_store.findings import refuse
from deltaserve_store.formats.peft_kinds.adalora import AdaLora
from deltaserve_store.formats.peft_kinds.beft import Beft
from deltaserve_store.formats.peft_kinds.blocks import GraLora, Miss
from deltaserve_store.formats.peft_kinds.boft import Boft
from deltaserve_store.formats.peft_kinds.c3a import C3a
from deltaserve_store.formats.peft_kinds.deft import Deft
from deltaserve_store.formats.peft_kinds.delora import DeLora
from deltaserve_store.formats.peft_kinds.fourierft import FourierFt
from deltaserve_store.formats.peft_kinds.frod import Frod
from deltaserve_store.formats.peft_kinds.glora import Glora
from deltaserve_store.formats.peft_kinds.hira import Hira
from deltaserve_store.formats.peft_kinds.hra import Hra
from deltaserve_store.formats.peft_kinds.oft import Oft
from deltaserve_store.formats.peft_kinds.products import LoHa, LoKr
from deltaserve_store.formats.peft_kinds.psoft import Psoft
from deltaserve_store.formats.peft_kinds.randlora import RandLora
from deltaserve_store.formats.peft_kinds.reader import PeftReader
from deltaserve_store.formats.peft_kinds.road import Road
from deltaserve_store.formats.peft_kinds.supertuning import SuperTuning
from deltaserve_store.formats.peft_kinds.tinylora import TinyLora
from deltaserve_store.formats.peft_kinds.unilora import UniLora
from deltaserve_store.formats.peft_kinds.vblora import VbLora
from deltaserve_store.formats.peft_kinds.vera import Pvera, Vera
from deltaserve_store.formats.peft_kinds.wavelets import WaveFt
from deltaserve_store.formats.peft_prefixes import PREFIX_KINDS
from deltaserve_store.formats.peft_vectors import VECTOR_READERS

_ALL: tuple[type[PeftReader], ...] = (
    AdaLora,
    Vera,
    LoHa,
    LoKr,
    Miss,
    GraLora,
    DeLora,
    VbLora,
    UniLora,
    TinyLora,
    Hra,
    SuperTuning,
    FourierFt,
    WaveFt,
    C3a,
    RandLora,
    Hira,
    Deft,
    Oft,
    Road,
    Boft,
    Beft,
    Pvera,
    Psoft,
    Glora,
    Frod,
)
READERS: Mapping[str, type[PeftReader]] = MappingProxyType({reader.peft_type: reader for reader in _ALL})
"""Types that are converted. ``LORA``, ``SHIRA`` and ``TRAINABLE_TOKENS`` have readers of their own: no conversion."""

SERVED_PEFT_TYPES = (
    "LORA",
    "SHIRA",
    "TRAINABLE_TOKENS",
    *sorted(VECTOR_READERS),
    *sorted(PREFIX_KINDS),
    *sorted(READERS),
)

_NOT_LINEAR = "it is not a fixed sum on a linear: its effect depends on the input"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "ADAMSS": (
            "which outputs its parts change is found by scikit-learn's k-means over the base's singular vectors when "
            "PEFT loads it, and is not in its file"
        ),
        "ADAPTION_PROMPT": _NOT_LINEAR,
        "LILY": _NOT_LINEAR,
        "OSF": "it rewrites the base's spectrum",
        "PEANUT": _NOT_LINEAR,
        "POLY": "it is routed by task ids, which a request does not carry",
        "SHADOW": "it brings a second model",
        "XLORA": "it is a router over several adapters; upload those one by one",
    }
)
"""Why a type that PEFT has is refused."""


def peft_type_of(config: Mapping[str, Any], where: str) -> str:
    """One of ``SERVED_PEFT_TYPES``; every other type is refused by its name."""
    kind = config.get("peft_type")
    served = ", ".join(SERVED_PEFT_TYPES)
    if kind is None:
        raise refuse("missing_field", f"{where}:peft_type", "nothing", f"one of {served}")
    if kind not in SERVED_PEFT_TYPES:
        why = REFUSED.get(kind, "no type that is known here") if isinstance(kind, str) else "no type"
        raise refuse("unsupported_kind", f"{where}:peft_type", kind, f"one of {served} ({why})")
    return str(kind)
