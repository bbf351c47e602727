"""PEFT's mixed batches (``adapter_names``) behind the smallest HTTP face that streams: ``peft_server.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.client import Target
from loadtest.peers.peer import Command, Setup, get_json, missing_path
from loadtest.small import BASE_NAME

SERVER = Path(__file__).with_name("peft_server.py")


class PeftServer:
    name = "peft"
    ready_path = "/health"
    serves_adapters = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.options = ("--dtype", str(settings.get("dtype", "bfloat16")), *map(str, settings.get("options", ())))
        self._python = settings.get("python")
        self._max_batch = settings.get("max_batch")
        self._environment = {key: str(value) for key, value in settings.get("environment", {}).items()}

    def missing(self) -> str | None:
        return missing_path(self._python, "python")

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the fixture's files as they are."""

    def command(self, setup: Setup, port: int) -> Command:
        words = [str(self._python), str(SERVER), "--model", str(setup.fixture.base), "--name", BASE_NAME]
        words += ["--port", str(port), "--threads", str(setup.threads)]
        words += ["--max-batch", str(self._max_batch or setup.concurrency)]
        for name in setup.adapters:
            words += ["--adapter", f"{name}={setup.adapter_folder(name)}"]
        return Command((*words, *self.options), {**setup.environment, **self._environment})

    async def admit(self, session: aiohttp.ClientSession, url: str, setup: Setup) -> Target:
        return Target(url, BASE_NAME, setup.adapters, version=await get_json(session, f"{url}/version"))
