"""Puts one server together from a frozen config: base, store, engine, door. No HTTP here.

    config -> base -> engine thread -> store (locked) -> door -> names published -> ready

The collaborators are passed in, never looked up, so tests build the same runtime around a tiny base.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from deltaserve import __version__, tinybase
from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.adapters.host_cache import HostCache
from deltaserve.adapters.loader import FoldedLoader
from deltaserve.adapters.residency import AdapterResidency
from deltaserve.admission.derived import ProvenFiles
from deltaserve.admission.door import Admission
from deltaserve.admission.folders import LocalDoor, adapter_files
from deltaserve.config import BLOCK_SIZE, ServeConfig
from deltaserve.engine.async_engine import AsyncEngine
from deltaserve.engine.block_manager import BlockManager
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.engine.engine import Engine
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.scheduler import Scheduler
from deltaserve.errors import ConfigError
from deltaserve.metrics import Metrics
from deltaserve.model import checkpoint
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import KVCache
from deltaserve.text import Tokenizer
from deltaserve_kernels import BackendUnavailable, select, source_digest, use_backend
from deltaserve_store.formats.peft_kinds.low_rank import ConversionLimits
from deltaserve_store.names import DEFAULT_TENANT
from deltaserve_store.store import AdapterStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything behind the HTTP surface. ``start`` before use; ``close`` drains and gives back the store."""

    config: ServeConfig
    base: BaseModel
    base_names: tuple[str, ...]
    tokenizer: Tokenizer
    store: AdapterStore
    engine: AsyncEngine
    admission: Admission
    metrics: Metrics

    @classmethod
    def open(cls, config: ServeConfig) -> Runtime:
        """Load the base and take the store; blocking. Raises ``ConfigError``, ``UnsupportedBase``, ``StoreLocked``."""
        store = AdapterStore.open(config.store, quota_bytes=config.store_quota_bytes)
        try:
            return cls._build(config, store)
        except BaseException:
            store.close()
            raise

    @classmethod
    def _build(cls, config: ServeConfig, store: AdapterStore) -> Runtime:
        choose_operators(config)
        folder, names = base_folder(config), base_names(config)
        base = _apart(
            load_base,
            folder,
            dtype=resolve_dtype(config, folder),
            device=config.device,
            load_format=config.load_format,
            allow_hub=config.allow_hub,
            extra_names=names,
        )
        templates = {name: path.read_text("utf-8") for name, path in config.chat_templates.items()}
        tokenizer = Tokenizer.from_folder(folder, templates=templates)
        metrics = Metrics(version=__version__)
        proven = ProvenFiles(
            store,
            base_fingerprint=base.spec.fingerprint,
            dtype=base.dtype,
            device=base.device.type,
            operators=operators_key(base.device),
        )
        engine = build_engine(config, base, proven, metrics)
        store.set_base_names(names)
        admission = Admission(
            base,
            store,
            engine,
            proven,
            base_names=(*names, *base.spec.names),
            chat_templates=tuple(templates),
            conversion_limits=ConversionLimits(
                rank=config.conversion_rank,
                max_bytes=min(config.engine.adapter_device_bytes, config.engine.adapter_host_bytes),
                itemsize=base.dtype.itemsize,
                max_flops=config.conversion_flops,
            ),
            conversion_error=config.conversion_error,
            tokenizer_conflicts=tokenizer.conflicts,
        )
        engine.on_prepare = admission.prepare
        return cls(config, base, names, tokenizer, store, engine, admission, metrics)

    async def start(self) -> None:
        """Start the engine thread, publish the store's names, bring in demo and preloaded adapters."""
        await self.engine.start()
        await self.admission.publish()
        if self.config.model is None and self.config.demo_adapters:
            await self._bring_demo_adapters()
        for name in self.config.preload:
            version = self.engine.resolve(DEFAULT_TENANT, name).version
            if version is None:
                raise ConfigError(f"--preload {name}: that is the base; give adapter names.")
            await self.engine.preload(version)

    async def close(self) -> None:
        """Let running requests finish within ``drain_seconds``, end the rest with an error, give back the store."""
        await self.engine.stop(self.config.drain_seconds)
        self.admission.close()
        self.store.close()

    async def _bring_demo_adapters(self) -> None:
        """Into an empty store only, so that a demo adapter somebody removed stays removed."""
        if any(self.engine.names.adapters.values()) or not tinybase.DEMO_ADAPTERS.is_dir():
            return
        door = LocalDoor(self.admission, self.store, source="demo")
        for folder in sorted(path for path in tinybase.DEMO_ADAPTERS.iterdir() if path.is_dir()):
            files, _ = adapter_files(folder)
            await door.admit(files, folder.name)
            logger.info("demo adapter admitted", extra={"fields": {"adapter": folder.name}})


def build_engine(config: ServeConfig, base: BaseModel, proven: ProvenFiles, metrics: Metrics) -> AsyncEngine:
    """The engine around a loaded base. Raises ``ConfigError`` when the KV cache cannot hold one longest sequence."""
    limits = config.engine
    num_blocks = limits.kv_cache_bytes // base.kv_layout.block_bytes
    positions = num_blocks * BLOCK_SIZE
    if limits.max_model_len is not None and limits.max_model_len > base.max_context:
        raise ConfigError(
            f"--max-model-len is {limits.max_model_len}, but the base was made for at most {base.max_context} tokens."
        )
    max_model_len = limits.max_model_len or min(base.max_context, positions)
    if positions < 2 * BLOCK_SIZE:
        raise ConfigError(
            f"--kv-cache-bytes {limits.kv_cache_bytes} holds {num_blocks} blocks of {BLOCK_SIZE} positions; at least 2 "
            f"are needed, {2 * base.kv_layout.block_bytes} bytes."
        )
    if limits.max_model_len is None and max_model_len < base.max_context:
        logger.warning(
            "the KV cache is smaller than the base's context; sequences are limited to it",
            extra={"fields": {"max_model_len": max_model_len, "max_context": base.max_context}},
        )
    # What the operators read is all that is held, and booked: Triton's read no CSR.
    tables = DeltaTables.of(base, limits.adapter_slots, has_csr=select(base.device) != "triton")
    pool = DevicePool(tables, num_slots=limits.adapter_slots, max_bytes=limits.adapter_device_bytes, device=base.device)
    loader = FoldedLoader(base.spec, base.dtype, proven.locate)
    residency = AdapterResidency(
        pool,
        HostCache(limits.adapter_host_bytes),
        loader,
        num_load_threads=limits.loader_threads,
        observer=metrics,
    )
    engine_limits = EngineLimits(
        max_model_len=max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_queue=limits.max_queue,
        vocab_size=base.vocab_size,
        max_parts=min(limits.max_composed, limits.adapter_slots),
    )
    blocks = BlockManager(num_blocks, base.spec.fingerprint)
    has_graphs = can_capture(config, base.device)
    kv = KVCache(base.kv_layout, num_blocks, base.device, has_scratch=has_graphs)
    graphs = None
    if has_graphs:
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        graphs = DecodeGraphs(base, kv, tables, max_seqs=limits.max_num_seqs, max_blocks=max_blocks)
    runner = ModelRunner(base, kv, tables, graphs=graphs)
    began = time.monotonic()
    _apart(runner.warm_up, max_tokens=limits.max_num_batched_tokens)
    if graphs is not None:
        fields = {"graphs": graphs.num_graphs, "seconds": round(time.monotonic() - began, 1)}
        logger.info("decode steps captured", extra={"fields": fields})
    kv_regime = base.kv_regime if base.has_kv_regimes else None
    scheduler = Scheduler(blocks, residency, engine_limits, kv_regime=kv_regime, prefixes=tables.prefixes)
    engine = Engine(runner, residency, blocks, scheduler, Sampler(base.vocab_size), engine_limits)
    return AsyncEngine(engine, loader=loader, metrics=metrics)


def can_capture(config: ServeConfig, device: torch.device) -> bool:
    """Whether decode steps become CUDA graphs: only the Triton operators never look into a tensor."""
    return config.cuda_graphs and device.type == "cuda" and select(device) == "triton"


def operators_key(device: torch.device) -> str:
    """Names the operators that run on the device and their very code, for the key of proofs: what one code was proven
    with says nothing of another, also between two releases."""
    return f"{select(device)}-{__version__}-{source_digest()[:16]}"


def choose_operators(config: ServeConfig) -> None:
    """Set the process's operators. Raises ``ConfigError`` when those asked for cannot run on the device."""
    if config.operators == "auto":
        return
    try:
        select(config.device, config.operators)
        use_backend(config.operators)
    except BackendUnavailable as error:
        raise ConfigError(f"--operators {config.operators}: {error}") from error


def _apart(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Run on a thread that ends afterwards, and with it its OpenMP team.

    libgomp counts the threads of all teams: once there are more than cores, every team stops spinning at its barriers
    and sleeps, which costs the engine's small products a third of their speed.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="deltaserve-load") as thread:
        return thread.submit(function, *args, **kwargs).result()


def base_folder(config: ServeConfig) -> Path:
    """Where the base lies: the embedded checkpoint, or what ``--model`` names. Raises ``UnsupportedBase``."""
    return tinybase.CHECKPOINT if config.model is None else checkpoint.locate(config.model, allow_hub=config.allow_hub)


def base_names(config: ServeConfig) -> tuple[str, ...]:
    """Names that requests may use for the base, the served one first; adapters may call it by further ones."""
    if config.model is None:
        own = tinybase.NAME
    else:  # a hub id is the name that adapters know the base by; of a folder it is the last part
        own = Path(config.model).resolve().name if Path(config.model).is_dir() else config.model
    return tuple(dict.fromkeys((config.served_model_name or own, own, *config.base_names)))


def resolve_dtype(config: ServeConfig, folder: Path) -> torch.dtype:
    """``auto``: float32 for the embedded base (small enough to be served exactly), else the checkpoint's own dtype."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if config.model is None:
        return torch.float32
    raw = checkpoint.read_raw_config(folder)
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.float32)
