"""PEFT types that are converted when they are read: a row for each case of ``deltatest.peft_kinds``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from zlib import crc32

from deltaserve_store.formats.peft_kinds.table import READERS
from deltatest.parity.registry import Bench, Entry
from deltatest.peft_kinds import CASES, KindCase, make_kind, write_case


def _write(bench: Bench, folder: Path, *, case: str) -> Path:
    return make_kind(bench.model, folder, case, seed=crc32(case.encode()) % 1000)


def _vectors_of_glora(bench: Bench, folder: Path) -> Path:
    case = KindCase("GloraConfig", {"r": 2, "config_A_B": "vector"}, 0.2)
    return write_case(bench.model, folder, case, seed=4)


ENTRIES = (
    *(
        Entry(
            READERS[case.config.removesuffix("Config").upper()].title,
            name.partition("-")[2],
            "PEFT",
            partial(_write, case=name),
        )
        for name, case in CASES.items()
    ),
    Entry("GLoRA", "vectors", "PEFT", _vectors_of_glora),
)
