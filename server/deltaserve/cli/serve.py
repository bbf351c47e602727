"""``deltaserve serve``: options to a frozen config, then the server until a signal drains it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from deltaserve.config import DEFAULT_STORE, EngineConfig, ServeConfig, parse_bytes
from deltaserve.errors import ConfigError
from deltaserve.openmp import let_threads_sleep

_ONE_ADAPTER = "One adapter, conversions included, must fit the smaller of the device's and the host's."


def serve(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder; default: the embedded base.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    operators: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    cuda_graphs: Annotated[bool, typer.Option(help="Replay decode steps (CUDA with triton).")] = True,
    load_format: Annotated[str, typer.Option(help="auto, or dummy (random weights).")] = "auto",
    allow_hub: Annotated[bool, typer.Option("--allow-hub", help="--model may be a hub id.")] = False,
    served_model_name: Annotated[str | None, typer.Option(help="The base's name in requests.")] = None,
    base_names: Annotated[list[str] | None, typer.Option(help="One more name of the base (repeatable).")] = None,
    chat_template: Annotated[list[str] | None, typer.Option(help="NAME=FILE you vouch for (repeatable).")] = None,
    store: Annotated[Path, typer.Option(help="Folder of the adapters.")] = DEFAULT_STORE,
    store_quota: Annotated[str | None, typer.Option(help="Most bytes at rest, e.g. 20GB.")] = None,
    conversion_rank: Annotated[int, typer.Option(help="Rank of terms for deltas beyond rank 1024.")] = 256,
    conversion_error: Annotated[float, typer.Option(help="Share of the effect that those may miss.")] = 0.05,
    conversion_flops: Annotated[float, typer.Option(help="Operations that converting one adapter may take.")] = 2e15,
    preload: Annotated[list[str] | None, typer.Option(help="Adapter to load before ready (repeatable).")] = None,
    demo_adapters: Annotated[bool, typer.Option(help="Put the demo adapters into an empty store.")] = True,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt plus completion.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences running at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Token budget of a step.")] = 512,
    max_queue: Annotated[int, typer.Option(help="Requests waiting before 429.")] = 1024,
    max_composed: Annotated[int, typer.Option(help="Adapters one request may compose.")] = 8,
    kv_cache_bytes: Annotated[str, typer.Option(help="Memory of the KV cache.")] = "256MB",
    adapter_device_bytes: Annotated[str, typer.Option(help=f"Memory of resident adapters. {_ONE_ADAPTER}")] = "1GB",
    adapter_host_bytes: Annotated[str, typer.Option(help=f"Host cache of adapters. {_ONE_ADAPTER}")] = "2GB",
    adapter_slots: Annotated[int, typer.Option(help="Adapters resident at once, at most.")] = 1024,
    host: Annotated[str, typer.Option(help="Other than loopback needs --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="Key file (deltaserve keys add).")] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="Grace after SIGTERM.")] = 30.0,
) -> None:
    """Serve the base and its adapters over OpenAI-style HTTP."""
    config = ServeConfig(
        model=model,
        dtype=dtype,  # type: ignore[arg-type]  # checked by ServeConfig
        device=device,
        operators=operators,  # type: ignore[arg-type]  # checked by ServeConfig
        cuda_graphs=cuda_graphs,
        load_format=load_format,  # type: ignore[arg-type]  # checked by ServeConfig
        allow_hub=allow_hub,
        served_model_name=served_model_name,
        base_names=tuple(base_names or ()),
        chat_templates=MappingProxyType(dict(_template(item) for item in chat_template or ())),
        store=store,
        store_quota_bytes=parse_bytes(store_quota) if store_quota else None,
        conversion_rank=conversion_rank,
        conversion_error=conversion_error,
        conversion_flops=conversion_flops,
        preload=tuple(preload or ()),
        demo_adapters=demo_adapters,
        host=host,
        port=port,
        api_keys=api_keys,
        request_timeout_seconds=request_timeout,
        drain_seconds=drain_seconds,
        engine=EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_queue=max_queue,
            max_composed=max_composed,
            kv_cache_bytes=parse_bytes(kv_cache_bytes),
            adapter_device_bytes=parse_bytes(adapter_device_bytes),
            adapter_host_bytes=parse_bytes(adapter_host_bytes),
            adapter_slots=adapter_slots,
        ),
    )
    let_threads_sleep()
    from deltaserve.cli.server_process import run_server

    raise typer.Exit(run_server(config))


def _template(item: str) -> tuple[str, Path]:
    name, separator, file = item.partition("=")
    if not (name and separator and file):
        raise ConfigError(f"--chat-template is {item!r}; write NAME=FILE.")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--chat-template {name}: {file} is not a file.")
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--chat-template {name}: {file} is not UTF-8 text (at byte {error.start}).") from error
    return name, path
