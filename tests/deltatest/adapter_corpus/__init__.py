"""Damaged, mis-named and hostile adapters, each with the reason codes and places its refusal must carry.

A case starts from a good adapter of a tiny base and does one bad thing to it. Everything is made with the standard
library and safetensors; no case needs PEFT, a model or the network.
"""

from __future__ import annotations

from deltatest.adapter_corpus.files import FILES, HEADER, JSON, PICKLE
from deltatest.adapter_corpus.good import (
    CONFIG,
    FINGERPRINT,
    GOOD,
    PREFIX,
    Q0,
    Q0_A,
    Q0_B,
    TENSORS,
    corpus_base,
    write_good_lora,
    write_good_shira,
    write_good_sparse,
)
from deltatest.adapter_corpus.lora import FIELDS, KINDS, LORA
from deltatest.adapter_corpus.sparse import OWN_SPARSE, SHIRA, SPARSE, SPARSE_JSON
from deltatest.adapter_corpus.spoil import (
    BadAdapter,
    edit_bytes,
    edit_config,
    edit_header,
    edit_tensors,
    set_value,
    write_file,
)

__all__ = [
    "CONFIG",
    "CORPUS",
    "FINGERPRINT",
    "GOOD",
    "PICKLE",
    "PREFIX",
    "Q0",
    "Q0_A",
    "Q0_B",
    "SPARSE",
    "SPARSE_JSON",
    "TENSORS",
    "BadAdapter",
    "corpus_base",
    "edit_bytes",
    "edit_config",
    "edit_header",
    "edit_tensors",
    "set_value",
    "write_file",
    "write_good_lora",
    "write_good_shira",
    "write_good_sparse",
]

CORPUS: tuple[BadAdapter, ...] = FILES + JSON + HEADER + KINDS + FIELDS + LORA + SHIRA + OWN_SPARSE
