"""llama.cpp's ``llama-server``. Base and adapters are converted to GGUF once, with llama.cpp's own scripts.

A request names its adapter by the number that ``/lora-adapters`` gives it; requests of different adapters are not
batched together by this server.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.client import Target
from loadtest.peers.peer import Command, PeerFailed, Setup, get_json, missing_path
from loadtest.small import BASE_NAME

CONVERSION = Path(__file__).with_name("gguf_conversion.py")
POSITIONS_PER_SLOT = 256


class LlamaServer:
    name = "llama-server"
    ready_path = "/health"
    serves_adapters = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.options = tuple(str(word) for word in settings.get("options", ()))
        self._server = settings.get("server")
        self._python = settings.get("python")
        self._sources = settings.get("sources")
        self._outtype = str(settings.get("outtype", "bf16"))

    def missing(self) -> str | None:
        reasons = (
            missing_path(self._server, "server"),
            missing_path(self._python, "python of the converter"),
            missing_path(self._sources, "folder of llama.cpp's sources"),
        )
        return next((reason for reason in reasons if reason), None)

    def prepare(self, setup: Setup) -> None:
        """Converts what ``work/gguf`` does not hold yet."""
        wanted = {self._base_file(setup): setup.fixture.base}
        wanted |= {self._adapter_file(setup, name): setup.adapter_folder(name) for name in setup.adapters}
        pairs = [f"{source}={file}" for file, source in wanted.items() if not file.exists()]
        if not pairs:
            return
        self._base_file(setup).parent.mkdir(parents=True, exist_ok=True)
        words = [str(self._python), str(CONVERSION), str(self._sources), str(setup.fixture.base), self._outtype, *pairs]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerFailed(f"conversion to GGUF failed:\n{done.stderr[-2000:]}")

    def command(self, setup: Setup, port: int) -> Command:
        words = [str(self._server), "--model", str(self._base_file(setup)), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--threads", str(setup.threads), "--threads-batch", str(setup.threads)]
        words += ["--parallel", str(setup.concurrency), "--ctx-size", str(setup.concurrency * POSITIONS_PER_SLOT)]
        words += ["--no-kv-unified", "--cache-ram", "0", "--lora-init-without-apply"]
        for name in setup.adapters:
            words += ["--lora", str(self._adapter_file(setup, name))]
        return Command((*words, *self.options), setup.environment)

    async def admit(self, session: aiohttp.ClientSession, url: str, setup: Setup) -> Target:
        listed = await get_json(session, f"{url}/lora-adapters")
        numbers = {Path(item["path"]).stem: int(item["id"]) for item in listed}
        lost = [name for name in setup.adapters if name not in numbers]
        if lost:
            raise PeerFailed(f"did not load {', '.join(lost[:3])} of {len(setup.adapters)} adapters")
        selectors: dict[str, Mapping[str, Any]] = {
            name: {"model": BASE_NAME, "lora": [{"id": numbers[name], "scale": 1.0}]} for name in setup.adapters
        }
        if numbers:
            # A request without the field gets every loaded adapter at once, also under --lora-init-without-apply; one
            # that names any adapter gets scale 0 for all others.
            selectors[BASE_NAME] = {"model": BASE_NAME, "lora": [{"id": 0, "scale": 0.0}]}
        fields = {"cache_prompt": False}
        return Target(
            url, BASE_NAME, setup.adapters, selectors, fields, {"version": self.version(), "weights": self._outtype}
        )

    def version(self) -> str:
        done = subprocess.run([str(self._server), "--version"], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version")]
        return lines[0].partition(":")[2].strip() if lines else "unknown"

    def _base_file(self, setup: Setup) -> Path:
        return setup.work / "gguf" / f"{BASE_NAME}-{self._outtype}.gguf"

    def _adapter_file(self, setup: Setup, name: str) -> Path:
        return setup.work / "gguf" / self._outtype / f"{name}.gguf"
