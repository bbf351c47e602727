"""The engine without HTTP and text, for ``offline.py``: one JSON line in, one JSON line out, until input ends.

Its public face (``AsyncEngine.submit``) is fed a plan's streams, each sending its next request when it has its answer;
what comes back are token ids.
"""

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
from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.runtime import Runtime
from deltaserve_store.names import DEFAULT_TENANT
from loadtest.lean_client import Plan, Request


async def follow(runtime: Runtime, name: str, requests: list[Request]) -> int:
    """One stream; returns its completion tokens."""
    count = 0
    for number, request in enumerate(requests):
        version = runtime.engine.resolve(DEFAULT_TENANT, request["model"]).version
        binding = Binding(() if version is None else (BindingPart(version),))
        sampling = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
        asked = GenerationRequest(f"{name}-{number}", tuple(request["prompt"]), sampling, binding)
        async for output in runtime.engine.submit(asked):
            count += sum(len(delta.token_ids) for delta in output.deltas)
    return count


async def drive(runtime: Runtime, name: str, plan: Plan) -> dict[str, Any]:
    began = time.monotonic()
    counts = await asyncio.gather(*(follow(runtime, f"{name}-{i}", list(own)) for i, own in enumerate(plan)))
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
            tell(await drive(runtime, str(number), json.loads(line)))
            number += 1
    finally:
        await runtime.close()


def tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.offline_worker", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; default: the embedded base")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    given = parser.parse_args()
    config = ServeConfig(
        model=given.model,
        served_model_name=given.served_model_name,
        store=given.store,
        demo_adapters=False,
        engine=EngineConfig(max_num_seqs=given.max_num_seqs),
    )
    asyncio.run(serve(config))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
