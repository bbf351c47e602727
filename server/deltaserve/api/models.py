"""``/v1/models``: the base, its adapters and aliases, as OpenAI clients list them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from deltaserve.api.auth import MAY_ADMINISTER, MAY_USE, Caller
from deltaserve.api.services import services_of
from deltaserve.core import AdapterState, EngineStatus
from deltaserve.errors import InvalidRequest
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import AliasEntry, NameMap, Resolved

router = APIRouter()
OWNER = "deltaserve"


@router.get("/v1/models")
async def list_models(http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    services = services_of(http)
    names = services.engine.names
    limit = services.engine.limits.max_model_len
    models = [_base(name, limit) for name in names.base_names[:1]]
    hidden = incompatible_versions(services.engine.status())
    records = [record for record in names.current(caller.tenant) if record.version not in hidden]
    models += [_adapter(record.name, record, names, limit) for record in records]
    for alias, entry in sorted(names.aliases.get(caller.tenant, {}).items()):
        record = aliased(names, caller.tenant, entry)
        if record is not None and record.version not in hidden:
            models.append(_adapter(alias, record, names, limit))
    return {"object": "list", "data": models}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    services = services_of(http)
    resolved = services.engine.resolve(caller.tenant, model)
    return _model(model, resolved, services.engine.names, services.engine.limits.max_model_len)


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, http: Request, caller: Caller = MAY_ADMINISTER) -> dict[str, Any]:
    """Deletes an adapter by its name; requests that run on it finish first."""
    services = services_of(http)
    resolved = services.engine.resolve(caller.tenant, model)
    if resolved.version is None or resolved.name != model:
        raise InvalidRequest("only an adapter can be deleted, by its own name", param="model")
    await services.admission.delete(caller.tenant, model)
    services.metrics.remove_adapter(model)
    return {"id": model, "object": "model", "deleted": True}


def incompatible_versions(status: EngineStatus) -> frozenset[str]:
    """Adapters of another base: stored and listed under /v1/adapters, but no model of this server."""
    return frozenset(adapter.version for adapter in status.adapters if adapter.state == AdapterState.INCOMPATIBLE)


def aliased(names: NameMap, tenant: str, alias: AliasEntry) -> AdapterRecord | None:
    """The record that an alias means now; None when its adapter or version is gone."""
    entry = names.adapters.get(tenant, {}).get(alias.target)
    return None if entry is None else entry.records.get(alias.version or entry.current)


def _model(model: str, resolved: Resolved, names: NameMap, limit: int) -> dict[str, Any]:
    return _base(model, limit) if resolved.record is None else _adapter(model, resolved.record, names, limit)


def _base(name: str, limit: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": OWNER,
        "root": name,
        "parent": None,
        "max_model_len": limit,
    }


def _adapter(model: str, record: AdapterRecord, names: NameMap, limit: int) -> dict[str, Any]:
    """``root`` is the adapter's own name, also where ``model`` is an alias or a pinned version. What the adapter puts
    before a prompt is not there for prompt and answer."""
    return {
        "id": model,
        "object": "model",
        "created": int(record.created_at),
        "owned_by": OWNER,
        "root": record.name,
        "parent": names.base_names[0],
        "max_model_len": limit - record.num_prefix_tokens,
        "version": record.version,
    }
