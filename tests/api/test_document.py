"""``docs/api.md`` names what the code has: routes and scopes, fields, error codes, metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from deltaserve.api.schemas.chat import ChatRequest
from deltaserve.api.schemas.completion import CompletionRequest
from deltaserve.api.schemas.open_fields import NO_OPS, REFUSED
from deltaserve.core import EngineStatus
from deltaserve.metrics import Metrics

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
WORDS = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)))


def test_every_route_is_documented_and_every_documented_route_exists(app: FastAPI) -> None:
    documented = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /[^`]*)`", TEXT.split("## Keys")[0]))
    pending, found = list(app.router.routes), set()
    while pending:
        route = pending.pop()
        if isinstance(route, APIRoute):
            found |= {f"{method} {route.path.replace(':path', '')}" for method in route.methods}
        else:
            pending += getattr(getattr(route, "original_router", None) or getattr(route, "app", None), "routes", [])
    assert documented == found


@pytest.mark.parametrize("schema", [CompletionRequest, ChatRequest])
def test_every_field_is_documented(schema: type) -> None:
    assert set(schema.model_fields) - WORDS == set()  # type: ignore[attr-defined]


def test_no_ops_and_refused_fields_are_documented() -> None:
    assert (NO_OPS | set(REFUSED)) - WORDS == set()
    listed = TEXT.split("Refused by name unless null")[1].split("Any other field")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(REFUSED)


def test_every_metric_is_documented() -> None:
    metrics = Metrics()
    idle = EngineStatus(True, False, 0, 0, 0, 0)
    metrics.watch(lambda: idle)
    names = {
        family.name.removeprefix("deltaserve_") + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(metrics.render().decode())
        if not family.name.endswith("_created")
    }
    section = set(re.findall(r"`(\w+)`", TEXT.split("## Metrics")[1]))
    assert names - section == set()


def test_every_error_code_is_documented() -> None:
    """Codes are the strings given as ``code=`` in the HTTP layer and the class attribute of our errors."""
    import deltaserve.errors as errors

    sources = (Path(errors.__file__).parent / "api").rglob("*.py")
    codes = {code for path in sources for code in re.findall(r'code="(\w+)"', path.read_text())}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised_at_start = {"unsupported_base", "invalid_config"}
    codes |= {str(vars(cls)["code"]) for cls in classes if isinstance(vars(cls).get("code"), str)} - raised_at_start
    assert codes - WORDS - {"not_found"} == set()
