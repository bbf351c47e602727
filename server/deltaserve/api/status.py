"""Health, metrics, version, tokenising."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import deltaserve
from deltaserve.api.answer import encode_text, tokenizer_of
from deltaserve.api.auth import MAY_ADMINISTER, MAY_USE, Caller
from deltaserve.api.body import read_json
from deltaserve.api.schemas.management import DetokenizeRequest, TokenizeRequest
from deltaserve.api.services import Services, services_of
from deltaserve.api.target import resolve_target
from deltaserve.metrics import CONTENT_TYPE, Metrics
from deltaserve.text import Tokenizer
from deltaserve_store.names import NameMap

public = APIRouter()
router = APIRouter()


@public.get("/health")
@public.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@public.get("/health/ready")
async def ready(http: Request) -> Response:
    """200 while requests are taken; 503 while draining or once the step loop has died."""
    status = services_of(http).engine.status()
    if status.is_alive and not status.is_draining:
        return JSONResponse({"status": "ready"})
    reason = "draining" if status.is_alive else "engine_failed"
    return JSONResponse({"status": reason}, status_code=503, headers={"retry-after": "2"})


@router.get("/metrics")
async def read_metrics(http: Request, caller: Caller = MAY_ADMINISTER) -> Response:
    """Prometheus text. Names of adapters of every tenant appear, hence the scope."""
    services = services_of(http)
    describe_adapters(services.metrics, services.engine.names)
    return Response(services.metrics.render(), headers={"content-type": CONTENT_TYPE})


def describe_adapters(metrics: Metrics, names: NameMap) -> None:
    """Brings ``adapter_info`` up to date; adapters without series of their own are left out, deleted ones removed."""
    records = [record for tenant in names.adapters for record in names.current(tenant)]
    for gone in metrics.adapter_names - {record.name for record in records}:
        metrics.remove_adapter(gone)
    for record in records:
        if len(records) <= metrics.max_adapters or record.name in metrics.adapter_names:
            kind = "+".join(record.kinds)
            metrics.set_adapter(
                record.name, version=record.version, kind=kind, rank=record.rank, num_bytes=record.bytes
            )


@router.get("/version")
async def read_version(http: Request, caller: Caller = MAY_USE) -> dict[str, str]:
    """Which program, and which base: adapters made with our own formats carry the fingerprint."""
    engine = services_of(http).engine
    return {
        "version": deltaserve.__version__,
        "base": engine.names.base_names[0],
        "base_fingerprint": engine.base_fingerprint,
    }


@router.post("/tokenize")
async def tokenize(http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    services = services_of(http)
    fields = TokenizeRequest.model_validate(await read_json(http, services.config.max_body_bytes))
    ids, tokenizer = await _ids(services, caller, fields)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": services.engine.limits.max_model_len}
    if fields.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(lambda: [tokenizer.token_text(i) for i in ids])
    return answer


async def _ids(services: Services, caller: Caller, fields: TokenizeRequest) -> tuple[list[int], Tokenizer]:
    template, tokenizer = None, services.tokenizer
    if fields.model is not None:
        target = resolve_target(services.engine, caller, fields.model)
        template, tokenizer = target.chat_template, await tokenizer_of(services, target)
    if fields.prompt is not None:
        ids = await encode_text(tokenizer, fields.prompt, add_special_tokens=fields.add_special_tokens)
        return ids, tokenizer
    messages = [message.for_template() for message in fields.messages or ()]
    ids = await asyncio.to_thread(tokenizer.render_chat, messages, template, fields.add_generation_prompt)
    return ids, tokenizer


@router.post("/detokenize")
async def detokenize(http: Request, caller: Caller = MAY_USE) -> dict[str, str]:
    services = services_of(http)
    tokenizer, num_token_ids = services.tokenizer, 0
    fields = DetokenizeRequest.model_validate(await read_json(http, services.config.max_body_bytes))
    if fields.model is not None:
        target = resolve_target(services.engine, caller, fields.model)
        tokenizer, num_token_ids = await tokenizer_of(services, target), target.binding.num_token_ids
    services.engine.limits.check_ids(fields.tokens, "tokens", num_token_ids)
    text = await asyncio.to_thread(tokenizer.decode, fields.tokens, fields.skip_special_tokens)
    return {"prompt": text}
