"""A door around a tiny base, a real store and the serial engine: what admission tests are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaserve.admission.conversion import DEFAULT_ERROR_SHARE
from deltaserve.admission.derived import ProvenFiles
from deltaserve.admission.door import Admission, AdmissionResult
from deltaserve.model.base import BaseModel
from deltaserve_store.formats.peft_kinds.low_rank import DEFAULT_LIMITS, ConversionLimits
from deltaserve_store.staging import Staging
from deltaserve_store.store import AdapterStore
from deltatest.probe_engine import SerialEngine

BASE_NAME = "tests/tiny-base"


@dataclass
class Rig:
    base: BaseModel
    store: AdapterStore
    engine: SerialEngine
    proven: ProvenFiles
    admission: Admission

    async def admit(self, folder: Path, name: str = "a", **options: Any) -> AdmissionResult:
        """Stage the files of ``folder`` and take them through the door, as an upload would."""
        with Staging(self.store).open() as staged:
            for file in sorted(folder.iterdir()):
                staged.write(file.name, [file.read_bytes()])
            return await self.admission.admit(staged.folder, name=name, **options)

    def is_clean(self) -> bool:
        """Nothing of any admission is left behind."""
        return not list(self.store.scratch_dir.iterdir()) and not self.engine.candidates

    def close(self) -> None:
        self.admission.close()
        self.store.close()


def open_rig(
    base: BaseModel,
    path: Path,
    *,
    operators: str = "test-1",
    base_names: tuple[str, ...] = (BASE_NAME,),
    chat_templates: tuple[str, ...] = (),
    max_waiting: int = 32,
    conversion_limits: ConversionLimits = DEFAULT_LIMITS,
    conversion_error: float = DEFAULT_ERROR_SHARE,
    **store_options: Any,
) -> Rig:
    store = AdapterStore.open(path, base_names=("tiny",), **store_options)
    engine = SerialEngine(base, store.snapshot())
    proven = ProvenFiles(
        store,
        base_fingerprint=base.spec.fingerprint,
        dtype=base.dtype,
        device=base.device.type,
        operators=operators,
    )
    admission = Admission(
        base,
        store,
        engine,
        proven,
        base_names=base_names,
        chat_templates=chat_templates,
        max_waiting=max_waiting,
        conversion_limits=conversion_limits,
        conversion_error=conversion_error,
    )
    return Rig(base, store, engine, proven, admission)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    torch.set_num_threads(1)
    return asyncio.run(work)
