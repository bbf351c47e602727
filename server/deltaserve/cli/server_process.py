"""One server process: bind, load, listen, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys

from deltaserve import __version__
from deltaserve.api.app import create_app
from deltaserve.api.keys import KeyRing
from deltaserve.api.server import make_server
from deltaserve.config import ServeConfig
from deltaserve.errors import ConfigError
from deltaserve.logs import configure_logging
from deltaserve.runtime import Runtime

BACKLOG = 2048
QUESTION = "What do cows eat?"


def run_server(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM, then drain. Returns the exit status: 0, or 1 when the engine died."""
    configure_logging()
    keys = KeyRing.load(config.api_keys) if config.api_keys else None
    with bind(config) as listener:
        return asyncio.run(serve(config, listener, keys))


def bind(config: ServeConfig) -> socket.socket:
    """The listening socket; taken before the base is loaded, so that a used port is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With its protocol named: asyncio sends small writes at once only on sockets that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror}); choose another --port."
        ) from error
    return listener


async def serve(config: ServeConfig, listener: socket.socket, keys: KeyRing | None) -> int:
    """Build the runtime, answer requests, close the runtime whatever happens."""
    runtime = await asyncio.to_thread(Runtime.open, config)
    try:
        await runtime.start()
        gc.collect()
        gc.freeze()  # the model's objects live as long as the process; a full collection need not walk them each time
        url = url_of(listener)
        runtime.store.set_url(url)
        app = create_app(
            runtime.engine,
            runtime.admission,
            runtime.store,
            runtime.tokenizer,
            runtime.metrics,
            config,
            keys,
        )
        server = make_server(app, config)
        listener.listen(BACKLOG)  # from here on a connection waits instead of being refused
        sys.stdout.write(welcome(runtime, url, needs_key=keys is not None))
        sys.stdout.flush()
        await server.serve(sockets=[listener])
        return 0 if runtime.engine.status().error is None else 1
    finally:
        logging.getLogger(__name__).info("stopping")
        await runtime.close()


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def welcome(runtime: Runtime, url: str, *, needs_key: bool) -> str:
    """What a newcomer sees: where it listens, and three lines to paste into another shell."""
    names = runtime.engine.names.names("default")
    key = " -H 'authorization: Bearer YOUR_KEY'" if needs_key else ""
    head = f"curl -s {url}/v1"
    body = "-H 'content-type: application/json' -d"
    models = [runtime.base_names[0], *names][:2]
    lines = [f"{head}/models{key}"]
    if runtime.tokenizer.chat_template is not None:
        message = f'"messages": [{{"role": "user", "content": "{QUESTION}"}}]'
        lines += [f'{head}/chat/completions{key} {body} \'{{"model": "{m}", {message}}}\'' for m in reversed(models)]
    else:
        lines += [f'{head}/completions{key} {body} \'{{"model": "{m}", "prompt": "Once"}}\'' for m in models]
    told = f"{len(names)} adapters" + (f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else "")
    return "\n".join([f"deltaserve {__version__}: {runtime.base_names[0]} and {told} on {url}", "Try:", *lines, ""])
