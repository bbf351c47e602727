"""deltaserve's engine driven in its own process: no HTTP, no text, no client. One run, one JSON line.

    python -m loadtest.offline_engine --fixture FIXTURE --store STORE --plan plan.json

The engine's public face (``AsyncEngine.submit``) is fed the plan's streams, each sending its next request when it has
its answer; what comes back are token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from deltaserve.config import ServeConfig
from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.runtime import Runtime
from deltaserve_store.names import DEFAULT_TENANT
from loadtest.small import BASE_NAME, Fixture

Plan = list[list[dict[str, Any]]]


async def follow(runtime: Runtime, requests: list[dict[str, Any]], prefix: str) -> int:
    """One stream; returns its completion tokens."""
    count = 0
    for number, request in enumerate(requests):
        version = runtime.engine.resolve(DEFAULT_TENANT, request["model"]).version
        binding = Binding(() if version is None else (BindingPart(version),))
        sampling = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
        asked = GenerationRequest(f"{prefix}-{number}", tuple(request["prompt"]), sampling, binding)
        async for output in runtime.engine.submit(asked):
            count += sum(len(delta.token_ids) for delta in output.deltas)
    return count


async def drive(runtime: Runtime, plan: Plan, prefix: str) -> tuple[int, float]:
    start = time.monotonic()
    counts = await asyncio.gather(*(follow(runtime, own, f"{prefix}-{i}") for i, own in enumerate(plan)))
    return sum(counts), time.monotonic() - start


async def run(fixture: Fixture, store: Path, plans: dict[str, Plan]) -> dict[str, Any]:
    config = ServeConfig(model=str(fixture.base), served_model_name=BASE_NAME, store=store, demo_adapters=False)
    runtime = await asyncio.to_thread(Runtime.open, config)
    try:
        await runtime.start()
        await drive(runtime, plans["warm_up"], "warm")
        tokens, seconds = await drive(runtime, plans["timed"], "timed")
    finally:
        await runtime.close()
    return {"completion_tokens": tokens, "wall_seconds": seconds, "tokens_per_second": tokens / seconds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.offline_engine", description=__doc__.splitlines()[0])
    parser.add_argument("--fixture", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument(
        "--plan", type=Path, required=True, help="JSON: warm_up and timed, lists of streams of requests"
    )
    given = parser.parse_args()
    plans = json.loads(given.plan.read_text())
    sys.stdout.write(json.dumps(asyncio.run(run(Fixture.read(given.fixture), given.store, plans))) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
