"""The real runtime around a tiny base, in this process: store, engine thread and door, wired as the server wires them.

Only HTTP and text are left out, so a base needs no tokenizer; adapters that add tokens to one are refused, unless
``tokenizer_conflicts`` of ``open_runtime`` takes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltaserve.admission.derived import ProvenFiles
from deltaserve.admission.door import Admission, AdmissionResult
from deltaserve.admission.fit import TokenizerConflicts, no_tokenizer
from deltaserve.admission.folders import LocalDoor, adapter_files
from deltaserve.config import MIB, EngineConfig, ServeConfig
from deltaserve.core import BASE_BINDING, Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.engine.async_engine import AsyncEngine
from deltaserve.metrics import Metrics
from deltaserve.model.base import BaseModel, load_base
from deltaserve.runtime import build_engine
from deltaserve_store.names import DEFAULT_TENANT
from deltaserve_store.staging import Staging
from deltaserve_store.store import AdapterStore

BASE_NAME = "tests/tiny-base"
SMALL = EngineConfig(
    max_model_len=256,
    max_num_seqs=16,
    max_num_batched_tokens=128,
    kv_cache_bytes=4 * MIB,
    adapter_slots=8,
    adapter_device_bytes=16 * MIB,
    adapter_host_bytes=16 * MIB,
)


@dataclass
class Completion:
    """A finished generation: token ids of the one sequence, and the version that was resolved for it."""

    token_ids: list[int] = field(default_factory=list)
    version: str | None = None


@dataclass
class TinyRuntime:
    base: BaseModel
    store: AdapterStore
    engine: AsyncEngine
    proven: ProvenFiles
    admission: Admission
    num_requests: int = 0

    async def admit(self, folder: Path, name: str, **options: Any) -> AdmissionResult:
        """Take a folder through the door as an upload would."""
        with Staging(self.store).open() as staged:
            for file in adapter_files(folder)[0]:
                staged.write(file.name, [file.read_bytes()])
            return await self.admission.admit(staged.folder, name=name, **options)

    def door(self, **options: Any) -> LocalDoor:
        return LocalDoor(self.admission, self.store, **options)

    async def generate(
        self, model: str, prompt_ids: Sequence[int], max_tokens: int = 16, *, tenant: str = DEFAULT_TENANT
    ) -> Completion:
        """Greedy completion by ``model`` (any spelling that resolves), end-of-sequence ignored."""
        version = self.engine.resolve(tenant, model).version
        self.num_requests += 1
        request = GenerationRequest(
            request_id=f"test-{self.num_requests}",
            prompt_ids=tuple(prompt_ids),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            binding=BASE_BINDING if version is None else Binding((BindingPart(version),)),
            tenant=tenant,
        )
        completion = Completion(version=version)
        async for output in self.engine.submit(request):
            for delta in output.deltas:
                completion.token_ids += delta.token_ids
        return completion


@asynccontextmanager
async def open_runtime(
    base: BaseModel | Path,
    store_path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    limits: EngineConfig = SMALL,
    base_names: tuple[str, ...] = (BASE_NAME,),
    chat_templates: tuple[str, ...] = (),
    operators: str = "test-1",
    tokenizer_conflicts: TokenizerConflicts = no_tokenizer,
    check_each_step: bool = False,
    **store_options: Any,
) -> AsyncIterator[TinyRuntime]:
    """Start everything; on leaving, check that the books of engine and staging balance, and stop everything."""
    torch.set_num_threads(1)
    if isinstance(base, Path):
        base = load_base(base, dtype=dtype, cache_dir=store_path.parent / "digests")
    store = AdapterStore.open(store_path, base_names=base.spec.names[:1], **store_options)
    proven = ProvenFiles(
        store,
        base_fingerprint=base.spec.fingerprint,
        dtype=base.dtype,
        device=base.device.type,
        operators=operators,
    )
    engine = build_engine(ServeConfig(engine=limits), base, proven, Metrics())
    admission = Admission(
        base,
        store,
        engine,
        proven,
        base_names=base_names,
        chat_templates=chat_templates,
        tokenizer_conflicts=tokenizer_conflicts,
    )
    engine.on_prepare = admission.prepare
    await engine.start()
    engine._thread._check_each_step = check_each_step
    runtime = TinyRuntime(base, store, engine, proven, admission)
    try:
        await admission.publish()
        yield runtime
        await engine.stop(10.0)
        engine._engine.check_integrity()
        left = sorted(path.name for path in store.scratch_dir.iterdir())
        assert not left, f"staging still holds {left}"
    finally:
        await engine.stop(0.0)
        admission.close()
        store.close()
