"""Frozen settings of a server, complete and checked once. Nothing outside this module decides a default."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from deltaserve.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
BLOCK_SIZE = 16
"""Token positions in a KV block."""

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[DTypeName, ...] = ("auto", "float32", "bfloat16", "float16")

OperatorsName = Literal["auto", "reference", "cpu", "triton"]
OPERATORS_NAMES: tuple[OperatorsName, ...] = ("auto", "reference", "cpu", "triton")


DEFAULT_STORE = Path(".deltaserve") / "store"
"""Where adapters live unless ``--store`` says otherwise: a folder of the working directory."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. ``kv_cache_bytes`` buys KV blocks; the byte limits of adapters are LRU budgets.

    ``max_model_len``: tokens of prompt plus completion of one sequence. ``max_num_seqs``: sequences running at once.
    ``max_num_batched_tokens``: the token budget of a step. ``max_queue``: requests waiting before 429.
    ``max_composed``: adapters that one request may compose, never more than ``adapter_slots``.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_bytes: int = 256 * MIB
    max_queue: int = 1024
    max_composed: int = 8
    adapter_slots: int = 1024
    adapter_device_bytes: int = 1 * GIB
    adapter_host_bytes: int = 2 * GIB
    loader_threads: int = 1

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_bytes",
            "max_queue",
            "max_composed",
            "adapter_slots",
            "adapter_device_bytes",
            "adapter_host_bytes",
            "loader_threads",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len is {self.max_model_len}; it must be at least 2.")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything ``deltaserve serve`` can be told. ``model`` None means the embedded base.

    ``dtype`` auto is the checkpoint's own dtype, float32 for the embedded base (small enough to be served exactly).
    ``base_names`` are further names under which adapters may know the base. ``chat_templates`` maps operator-chosen
    names to template files. ``preload`` lists adapter names made resident before the server reports ready.
    ``operators``: which implementation runs adapters and attention; auto is the fastest one proven on the device.
    ``cuda_graphs``: replay decode steps, where the device and the operators can (CUDA, triton). ``conversion_rank``: of
    the best terms for deltas of a rank above 1024; ``conversion_error``: what those may change, a share of the effect;
    ``conversion_flops``: what the decompositions of one adapter may take.
    """

    model: str | None = None
    store: Path = DEFAULT_STORE
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: DTypeName = "auto"
    device: str = "cpu"
    operators: OperatorsName = "auto"
    cuda_graphs: bool = True
    load_format: Literal["auto", "dummy"] = "auto"
    allow_hub: bool = False
    served_model_name: str | None = None
    base_names: tuple[str, ...] = ()
    chat_templates: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    preload: tuple[str, ...] = ()
    demo_adapters: bool = True
    api_keys: Path | None = None
    conversion_rank: int = 256
    conversion_error: float = 0.05
    conversion_flops: float = 2e15
    store_quota_bytes: int | None = None
    max_upload_bytes: int = 2 * GIB
    max_body_bytes: int = 2 * MIB
    receive_timeout_seconds: float = 20.0
    request_timeout_seconds: float = 600.0
    drain_seconds: float = 30.0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPE_NAMES)}.")
        if self.operators not in OPERATORS_NAMES:
            raise ConfigError(f"--operators is {self.operators!r}; it must be one of {', '.join(OPERATORS_NAMES)}.")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"--load-format is {self.load_format!r}; it must be auto or dummy.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be between 0 and 65535.")
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise ConfigError(f"--device is {self.device!r}; it must be cpu or cuda (cuda:N).")
        if self.api_keys is None and not self.is_loopback:
            raise ConfigError(
                f"--host {self.host} is reachable from other machines and no API keys are set. Make a key file with "
                "`deltaserve keys add --file keys.json --scopes use,upload,admin` and pass --api-keys keys.json, "
                "or bind to 127.0.0.1."
            )
        for name in ("receive_timeout_seconds", "request_timeout_seconds", "max_upload_bytes", "max_body_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                flag = _flag(name.removesuffix("_seconds"))
                raise ConfigError(f"{flag} is {getattr(self, name)}; it must be a number greater than 0.")
        if not 0 <= self.drain_seconds < math.inf:
            raise ConfigError(f"--drain-seconds is {self.drain_seconds}; it must be a number of at least 0.")
        if not 1 <= self.conversion_rank <= 1024:
            raise ConfigError(f"--conversion-rank is {self.conversion_rank}; it must be between 1 and 1024.")
        if not 0 <= self.conversion_error <= 1:
            raise ConfigError(f"--conversion-error is {self.conversion_error}; it must be between 0 and 1.")
        if not 0 < self.conversion_flops < math.inf:
            raise ConfigError(f"--conversion-flops is {self.conversion_flops}; it must be a number greater than 0.")
        if self.store_quota_bytes is not None and self.store_quota_bytes < 1:
            raise ConfigError(f"--store-quota is {self.store_quota_bytes}; it must be at least 1 byte.")

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_bytes(text: str) -> int:
    """``"256MB"``, ``"2GiB"``, ``"1048576"`` -> bytes. KB, MB, GB and KiB, MiB, GiB all mean powers of 1024.

    Raises ``ConfigError`` for anything else.
    """
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = cleaned[-1:] if cleaned[-1:] in units and cleaned[-1:] else ""
    number = cleaned.removesuffix(unit).strip() if unit else cleaned
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{text!r} is not a size; write for example 512MB, 2GB or a number of bytes.")
    return int(value * units[unit])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
