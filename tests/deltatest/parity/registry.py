"""What an entry of the parity table is, and where the entries are found."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaserve.core import AdapterState
from deltatest.peft_adapters import peft_logits

BASE_NAME = "tests/tiny-base"
TOLERANCE = 1e-4
"""Of the root mean square of the logits, at least 1: what float32 sums in another order may differ."""
_PAUSE_SECONDS = 0.01


@dataclass(frozen=True)
class Bench:
    """What a file is made for: the model as transformers loads it (float32, never changed), and its spec."""

    model: Any
    spec: Any


Oracle = Callable[[Any, Path, Sequence[int]], Tensor]
"""``(model, folder, ids)`` -> float32 logits ``[T, vocab]`` of the model with the adapter, without the server."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    ``kind`` is the kind's name in the table of docs/adapter-kinds.md, ``variant`` tells its rows apart. ``write(bench,
    folder)`` makes the files, ``writer`` says whose code did. ``oracle`` defaults to PEFT itself with the same files,
    ``judge`` says so. ``has_strength`` off: the kind has no strengths between 0 and 1, so strength 0 is not asked.
    ``warm_ids`` begin the probe's tokens (trained tokens). ``invocation``: tokens put in the middle, from which on the
    adapter acts. ``num_token_ids``: of an adapter that adds tokens, the base's and its own.
    """

    kind: str
    variant: str
    writer: str
    write: Callable[[Bench, Path], Path]
    oracle: Oracle = peft_logits
    judge: str = "PEFT"
    has_strength: bool = True
    warm_ids: tuple[int, ...] = ()
    invocation: tuple[int, ...] = ()
    num_token_ids: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """For the upload: ``accept_base`` and the like."""

    @property
    def name(self) -> str:
        """An adapter name."""
        return re.sub("[^A-Za-z0-9]+", "-", f"{self.kind} {self.variant}".lower()).strip("-")


NOT_MEASURED: dict[str, str] = {}
"""Kinds that are served and have no row, by their name in docs/adapter-kinds.md, with the reason."""


def entries() -> tuple[Entry, ...]:
    """Of all modules of ``deltatest.parity.kinds``, in the order of their names."""
    from deltatest.parity import kinds

    found: list[Entry] = []
    for module in sorted(pkgutil.iter_modules(kinds.__path__), key=lambda info: info.name):
        found += importlib.import_module(f"{kinds.__name__}.{module.name}").ENTRIES
    return tuple(found)


async def evict(engine: Any, version: str) -> None:
    """From both memory tiers; returns when it is only stored."""
    await engine.unload(version)
    for _ in range(1000):
        if any(
            adapter.version == version and adapter.state is AdapterState.STORED for adapter in engine.status().adapters
        ):
            return
        await asyncio.sleep(_PAUSE_SECONDS)
    raise AssertionError(f"version {version} stays in memory")
