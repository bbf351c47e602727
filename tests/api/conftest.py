"""Fixtures of the HTTP tests: a scripted engine behind the real application, in process and on a socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from deltaserve.api.app import create_app
from deltaserve.config import ServeConfig
from deltaserve.metrics import Metrics
from deltatest.fake_engine import FakeAdmission, FakeEngine, FakeStore
from deltatest.live_server import LiveServer, serve


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return ServeConfig(store=tmp_path / "store", port=0, drain_seconds=1, receive_timeout_seconds=20)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def admission(engine: FakeEngine) -> FakeAdmission:
    return FakeAdmission(engine)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="test")


@pytest.fixture
def app(engine: FakeEngine, admission: FakeAdmission, metrics: Metrics, config: ServeConfig, tmp_path: Path) -> FastAPI:
    return create_app(engine, admission, FakeStore(tmp_path / "scratch"), engine.tokenizer, metrics, config)


@pytest.fixture
def http(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True)


@pytest.fixture
def live(app: FastAPI, config: ServeConfig) -> Iterator[LiveServer]:
    with serve(app, config) as server:
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client
