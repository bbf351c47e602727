"""From a finished run to a served adapter: parity with an engine of this process, then a door, here or elsewhere."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.cli.base_choice import base_folder
from deltaserve.cli.connection import find_server
from deltaserve.cli.local_door import admit_into
from deltaserve.config import DTypeName, ServeConfig
from deltaserve.core import BASE_BINDING, Binding, BindingPart
from deltaserve.deltas.fold import fold
from deltaserve.remote import RemoteServer
from deltaserve.runtime import Runtime
from deltaserve_store.formats import read_adapter
from deltaserve_trainer.register import register
from deltaserve_trainer.train import TrainingResult

PARITY_DTYPE: DTypeName = "float32"


def register_result(
    result: TrainingResult,
    *,
    name: str,
    model: str | None,
    server: str | None,
    api_key: str | None,
    store: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Gate, parity, door. The engine that parity runs on is made here, in float32, also when the door is a server's:
    logits are never sent over HTTP. Raises ``GateRefused``, ``ParityFailed``, ``AdapterRefused``.
    """
    remote = find_server(server, store, api_key)
    folder = None if model is None else str(base_folder(model))
    with tempfile.TemporaryDirectory(prefix="deltaserve-register-") as scratch:
        own_store = store if remote is None else Path(scratch) / "store"
        config = ServeConfig(model=folder, store=own_store, dtype=PARITY_DTYPE, demo_adapters=False, drain_seconds=0.0)
        with asyncio.Runner() as loop:
            runtime = Runtime.open(config)
            loop.run(runtime.start())
            try:
                return register_here(loop, runtime, result, name, say, remote)
            finally:
                loop.run(runtime.close())


def register_here(
    loop: asyncio.Runner,
    runtime: Runtime,
    result: TrainingResult,
    name: str,
    say: Callable[[str], None],
    remote: RemoteServer | None = None,
) -> dict[str, Any]:
    """Parity on ``runtime``'s engine, then its door, or that of ``remote``."""

    def answer(prompts: list[list[int]]) -> list[Tensor]:
        with tempfile.TemporaryDirectory(prefix="deltaserve-parity-") as scratch:
            return loop.run(engine_logits(runtime, result.adapter_folder, prompts, Path(scratch)))

    def admit(adapter: Path) -> dict[str, Any]:
        if remote is not None:
            return remote.upload(adapter, name)
        return loop.run(admit_into(runtime, adapter, name, source="trainer"))

    registration = register(result, answer=answer, admit=admit, engine_dtype=runtime.base.dtype)
    parity = registration.parity
    say(
        f"parity   {parity.num_tokens} positions, trainer against engine: logits differ by at most "
        f"{parity.max_difference:.2g}, allowed {parity.tolerance:.2g}"
    )
    say(f"door     {name} admitted, version {registration.admitted['version'][:12]}")
    return registration.admitted


async def engine_logits(
    runtime: Runtime, adapter: Path, prompts: Sequence[Sequence[int]], scratch: Path
) -> list[Tensor]:
    """Logits of every position of each prompt, float32 ``[num_tokens, vocab]``, by the engine with ``adapter``."""
    parsed = read_adapter(adapter, runtime.base.spec)
    candidate = "0" * 64  # never published: only this engine, for as long as the probes run
    path = scratch / "candidate.safetensors"
    fold(parsed, runtime.base.spec, runtime.base.dtype, runtime.base).save(path)
    runtime.engine.register_candidate(candidate, path)
    try:
        return await _probe(runtime, prompts, Binding((BindingPart(candidate),)))
    finally:
        runtime.engine.unregister_candidate(candidate)


async def base_logits(runtime: Runtime, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same without an adapter."""
    return await _probe(runtime, prompts, BASE_BINDING)


async def _probe(runtime: Runtime, prompts: Sequence[Sequence[int]], binding: Binding) -> list[Tensor]:
    answers = [await runtime.engine.probe(tuple(prompt), binding) for prompt in prompts]
    return [
        torch.frombuffer(bytearray(logits.data), dtype=torch.float32).view(logits.num_tokens, logits.vocab_size)
        for logits in answers
    ]
