"""Damaged adapters of the converted PEFT types, for the base of ``adapter_corpus``. No case needs PEFT.

A good file is filled from the reader's own list of tensors (that this is PEFT's list, the parity tests show). Every
type gets the same damage to every one of its tensors, and what can only go wrong with that type.
"""

from __future__ import annotations

from deltatest.adapter_corpus import BadAdapter
from deltatest.kind_corpus.damage import damage
from deltatest.kind_corpus.factors import ADALORA, BLOCKS, PRODUCTS, VERA
from deltatest.kind_corpus.good import CONFIGS, GOOD_KINDS, TARGETED, V0, V0_TENSOR, write_good_kind
from deltatest.kind_corpus.of_base import OF_BASE
from deltatest.kind_corpus.spectra import SPECTRA
from deltatest.kind_corpus.spread import SPREAD

__all__ = ["CONFIGS", "GOOD_KINDS", "KIND_CORPUS", "TARGETED", "V0", "V0_TENSOR", "write_good_kind"]

KIND_CORPUS: tuple[BadAdapter, ...] = (
    *(case for kind in CONFIGS for case in damage(kind)),
    *ADALORA,
    *VERA,
    *PRODUCTS,
    *BLOCKS,
    *SPREAD,
    *SPECTRA,
    *OF_BASE,
)
