"""``/v1/adapters`` and ``/v1/aliases``: what is stored, under which names, and moving the names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from deltaserve.api.adapter_view import adapter_view
from deltaserve.api.auth import MAY_ADMINISTER, MAY_UPLOAD, MAY_USE, Caller
from deltaserve.api.body import parse_json, read_body, read_json
from deltaserve.api.models import aliased
from deltaserve.api.schemas.management import AliasRequest, RollbackRequest
from deltaserve.api.services import Services, services_of
from deltaserve.api.uploads import Upload, is_settled, uploads_of, verdict_of, wait_seconds
from deltaserve.core import AdapterStatus
from deltaserve.errors import InvalidRequest, ModelNotFound
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import NameEntry, validate_name

router = APIRouter()
MAX_PAGE = 1000
DEFAULT_PAGE = 100
MAX_SMALL_BODY = 64 << 10


@router.post("/v1/adapters")
async def upload_adapter(http: Request, caller: Caller = MAY_UPLOAD) -> Response:
    """201 for a new version, 200 for bytes that the name has already, 422 with every reason, 202 when it takes long."""
    services, uploads = services_of(http), uploads_of(http)
    upload = await uploads.receive(http, services, caller)
    if await is_settled(upload, wait_seconds(http)):
        return _verdict(services, upload)
    uploads.remember(upload)
    address = f"/v1/uploads/{upload.id}"
    body = {"id": upload.id, "object": "upload", "name": upload.name, "state": "checking", "status_url": address}
    return JSONResponse(body, status_code=202, headers={"location": address, "retry-after": "2"})


@router.get("/v1/uploads/{id}")
async def show_upload(id: str, http: Request, caller: Caller = MAY_UPLOAD) -> Response:
    """How an upload that was answered with 202 goes on: 202 until it ends, then what the upload would have got."""
    upload = uploads_of(http).find(id, caller)
    if await is_settled(upload, 0):
        return _verdict(services_of(http), upload)
    body = {"id": upload.id, "object": "upload", "name": upload.name, "state": "checking"}
    return JSONResponse(body, status_code=202, headers={"retry-after": "2"})


@router.get("/v1/adapters")
async def list_adapters(http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    """By name. ``after`` is the last id of the page before."""
    services = services_of(http)
    limit, after = _page(http)
    names = services.engine.names
    wanted = [name for name in names.names(caller.tenant) if after is None or name > after]
    entries = names.adapters.get(caller.tenant, {})
    states = _states(services)
    page = [_view(services, _current(entries[name]), states) for name in wanted[:limit]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(wanted) > limit,
    }


@router.get("/v1/adapters/{name}")
async def show_adapter(name: str, http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    """``name`` may also be an alias or ``name@version``."""
    services = services_of(http)
    record = services.engine.resolve(caller.tenant, name).record
    if record is None:
        raise ModelNotFound("that is the base, not an adapter", param="name")
    return _shown(services, record)


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, http: Request, caller: Caller = MAY_ADMINISTER) -> dict[str, Any]:
    """Forgets the name and its versions; requests that run on it finish first."""
    services = services_of(http)
    await services.admission.delete(caller.tenant, validate_name(name))
    services.metrics.remove_adapter(name)
    return {"id": name, "object": "adapter", "deleted": True}


@router.get("/v1/adapters/{name}/versions")
async def list_versions(name: str, http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    """Newest first."""
    services = services_of(http)
    entry = _entry(services, caller, name)
    states = _states(services)
    records = sorted(entry.records.values(), key=lambda record: record.created_at, reverse=True)
    views = [_view(services, record, states) | {"is_current": record.version == entry.current} for record in records]
    return {"object": "list", "data": views}


@router.post("/v1/adapters/{name}/rollback")
async def rollback_adapter(name: str, http: Request, caller: Caller = MAY_UPLOAD) -> dict[str, Any]:
    """Moves the name to an earlier version: the one before the current, or the one given."""
    services = services_of(http)
    body = await read_body(http, MAX_SMALL_BODY)
    fields = RollbackRequest.model_validate(parse_json(body) if body else {})
    record = await services.admission.rollback(caller.tenant, validate_name(name), fields.version)
    return _shown(services, record)


@router.get("/v1/aliases")
async def list_aliases(http: Request, caller: Caller = MAY_USE) -> dict[str, Any]:
    services = services_of(http)
    aliases = services.engine.names.aliases.get(caller.tenant, {})
    return {"object": "list", "data": [_alias(services, caller, alias) for alias in sorted(aliases)]}


@router.put("/v1/aliases/{alias}")
async def set_alias(alias: str, http: Request, caller: Caller = MAY_UPLOAD) -> dict[str, Any]:
    """Points an alias at an adapter name, which it then follows, or at one version of it."""
    services = services_of(http)
    fields = AliasRequest.model_validate(await read_json(http, MAX_SMALL_BODY))
    await services.admission.alias(caller.tenant, validate_name(alias, param="alias"), fields.target)
    return _alias(services, caller, alias)


def _verdict(services: Services, upload: Upload) -> Response:
    """The door's answer. Raises its refusal."""
    result = verdict_of(upload)
    view = _shown(services, result.record) | {"warnings": list(result.warnings)}
    return JSONResponse(view, status_code=201 if result.created else 200)


def _shown(services: Services, record: AdapterRecord) -> dict[str, Any]:
    return _view(services, record, _states(services))


def _view(services: Services, record: AdapterRecord, states: dict[str, AdapterStatus]) -> dict[str, Any]:
    return adapter_view(record, states.get(record.version), services.engine.names.base_names[0])


def _states(services: Services) -> dict[str, AdapterStatus]:
    return {status.version: status for status in services.engine.status().adapters}


def _entry(services: Services, caller: Caller, name: str) -> NameEntry:
    entry = services.engine.names.adapters.get(caller.tenant, {}).get(name)
    if entry is None:
        raise ModelNotFound(f"no adapter is named {name[:64]!a}; see GET /v1/adapters", param="name")
    return entry


def _current(entry: NameEntry) -> AdapterRecord:
    return entry.records[entry.current]


def _alias(services: Services, caller: Caller, alias: str) -> dict[str, Any]:
    entry = services.engine.names.aliases.get(caller.tenant, {}).get(alias)
    if entry is None:
        raise ModelNotFound(f"no alias is named {alias[:64]!a}", param="alias")
    record = aliased(services.engine.names, caller.tenant, entry)
    version = None if record is None else record.version
    return {"id": alias, "object": "alias", "target": entry.target, "pinned": entry.version, "version": version}


def _page(http: Request) -> tuple[int, str | None]:
    query = http.query_params
    text = query.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_PAGE}", param="limit")
    after = query.get("after")
    return int(text), None if after is None else validate_name(after, param="after")
