"""The application, built from its collaborators."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

import deltaserve
from deltaserve.api import adapters, chat, completions, models, status
from deltaserve.api.auth import Guard
from deltaserve.api.errors import install_error_handlers
from deltaserve.api.keys import KeyRing
from deltaserve.api.request_context import RequestContext
from deltaserve.api.services import Door, GenerationEngine, Services
from deltaserve.api.uploads import Uploads
from deltaserve.config import ServeConfig
from deltaserve.metrics import Metrics
from deltaserve.text import Tokenizer


def create_app(
    engine: GenerationEngine,
    admission: Door,
    store: Any,
    tokenizer: Tokenizer,
    metrics: Metrics,
    config: ServeConfig,
    keys: KeyRing | None = None,
) -> FastAPI:
    """Starting and stopping the collaborators is the caller's business. Without ``keys`` only loopback is served."""
    app = FastAPI(
        title="deltaserve",
        version=deltaserve.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would be built from the Host header
    )
    app.state.services = Services(engine, admission, store, tokenizer, metrics, config, keys)
    app.state.uploads = Uploads()
    metrics.watch(engine.status)
    # Routes are tried in this order; the busiest come first.
    for router in (
        completions.router,
        chat.router,
        status.public,
        status.router,
        models.router,
        adapters.router,
    ):
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(
        RequestContext, metrics=metrics
    )  # the outermost: a refusal by Guard has an id and a log line too
    return app
