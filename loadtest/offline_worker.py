"""The engine without HTTP and text, for ``http_cost.py``: one JSON line in, one JSON line out, until input ends."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from deltaserve.config import EngineConfig, ServeConfig
from deltaserve.core import GenerationRequest, SamplingParams
from deltaserve.engine.async_engine import AsyncEngine
from deltaserve.runtime import Runtime


async def follow(engine: AsyncEngine, name: str, prompts: list[list[int]], sampling: SamplingParams) -> int:
    """One stream, each request after the answer to the last; returns its completion tokens."""
    count = 0
    for number, prompt in enumerate(prompts):
        async for output in engine.submit(GenerationRequest(f"{name}-{number}", tuple(prompt), sampling)):
            count += sum(len(delta.token_ids) for delta in output.deltas)
    return count


async def drive(engine: AsyncEngine, name: str, plan: list[list[list[int]]], max_tokens: int) -> dict[str, Any]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    began = time.monotonic()
    counts = await asyncio.gather(*(follow(engine, f"{name}-{i}", own, sampling) for i, own in enumerate(plan)))
    return {"tokens": sum(counts), "seconds": time.monotonic() - began}


async def serve(config: ServeConfig) -> None:
    runtime = await asyncio.to_thread(Runtime.open, config)
    try:
        await runtime.start()
        gc.collect()
        gc.freeze()  # as the server does
        tell({"vocab_size": runtime.base.vocab_size})
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            tell(await drive(runtime.engine, str(number), asked["plan"], asked["max_tokens"]))
            number += 1
    finally:
        await runtime.close()


def tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.offline_worker", description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    given = parser.parse_args()
    engine = EngineConfig(max_num_seqs=given.max_num_seqs)
    asyncio.run(serve(ServeConfig(model=given.model, store=given.store, demo_adapters=False, engine=engine)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
