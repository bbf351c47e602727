"""Where the peers are, from a TOML file that the user writes. Nothing here is found by searching.

    threads = 2

    [vllm]                                    # vllm-cpu and vllm-cpu-base
    python = "/opt/vllm/bin/python"
    preload = ["/opt/lib/libtcmalloc_minimal.so.4", "/opt/vllm/lib/libiomp5.so"]

    [llama]                                   # llama-server
    server = "/opt/llama.cpp/build/bin/llama-server"
    sources = "/opt/llama.cpp"                # holds the two converters
    python = "/opt/converter/bin/python"

    [peft]                                    # peft; its Python has torch, transformers, peft and aiohttp
    python = "/opt/peft/bin/python"

``dtype`` (vllm, peft; "bfloat16" if not given) and ``outtype`` (llama; "bf16") should be what each peer is fastest with
on the machine: without AVX-512, PyTorch's bfloat16 products are some fifty times slower than its float32 ones.
Every section may have ``options`` (more words of the command line) and, but for llama, ``environment``.
``[deltaserve]`` needs no entry: it runs from this Python.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.peers.deltaserve import DeltaserveServer
from loadtest.peers.llama_cpp import LlamaServer
from loadtest.peers.peer import Peer
from loadtest.peers.peft_adapter_names import PeftServer
from loadtest.peers.vllm_cpu import VllmCpuServer

KNOWN = {
    "deltaserve": ("python", "options", "environment"),
    "vllm": ("python", "preload", "dtype", "kv_cache_gib", "options", "environment"),
    "llama": ("server", "sources", "python", "outtype", "options"),
    "peft": ("python", "dtype", "max_batch", "options", "environment"),
}


def read(path: Path | None) -> dict[str, Any]:
    """The file's content. Raises ``ValueError`` for what is not TOML or names what no driver knows."""
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read as TOML: {problem}") from problem
    for section, values in found.items():
        if section == "threads":
            if not isinstance(values, int) or values < 1:
                raise ValueError(f"{path}: threads is {values!r}; it must be a whole number of at least 1")
            continue
        if section not in KNOWN or not isinstance(values, dict):
            raise ValueError(f"{path}: {section!r} is unknown; there are threads and the sections {', '.join(KNOWN)}")
        for key in values:
            if key not in KNOWN[section]:
                raise ValueError(f"{path}: [{section}] has no {key!r}; it may have {', '.join(KNOWN[section])}")
    return found


def peers(settings: Mapping[str, Any]) -> dict[str, Peer]:
    """Every driver by its name, present or not."""
    vllm = settings.get("vllm", {})
    drivers: list[Peer] = [
        DeltaserveServer(settings.get("deltaserve", {})),
        DeltaserveServer(settings.get("deltaserve", {}), has_adapters=False),
        VllmCpuServer(vllm),
        VllmCpuServer(vllm, has_adapters=False),
        LlamaServer(settings.get("llama", {})),
        PeftServer(settings.get("peft", {})),
    ]
    return {driver.name: driver for driver in drivers}
