"""transformers' ``generate`` with PEFT's ``adapter_names``, over HTTP, in PEFT's own Python; imports nothing of ours.

Static batches: requests that wait are taken together (up to ``--max-batch``, within a short window), generated to the
end, and streamed step by step. That is what PEFT offers; it has no batching of its own that lets requests join.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from aiohttp import web

WINDOW_SECONDS = 0.02
BASE = "__base__"


@dataclass(eq=False)
class Waiting:
    """One request; ``tokens`` receives token ids as they come, None at the end, or the failure."""

    prompt: list[int]
    adapter: str
    max_tokens: int
    tokens: asyncio.Queue = field(default_factory=asyncio.Queue)


class StepStreamer(transformers.generation.streamers.BaseStreamer):
    """Hands each step's ids to the event loop; ``generate`` calls it from its thread, first with the prompts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, batch: Sequence[Waiting]) -> None:
        self._loop, self._batch, self._step = loop, batch, -1

    def put(self, value: torch.Tensor) -> None:
        self._step += 1
        if self._step:
            self._loop.call_soon_threadsafe(self._deliver, value.tolist(), self._step)

    def end(self) -> None:
        """The caller tells the streams that they have ended."""

    def _deliver(self, ids: list[int], step: int) -> None:
        for request, token in zip(self._batch, ids, strict=True):
            if step <= request.max_tokens:
                request.tokens.put_nowait(token)


class Batcher:
    def __init__(self, model: Any, pad: int, max_batch: int) -> None:
        self._model, self._pad, self._max_batch = model, pad, max_batch
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            deadline = loop.time() + WINDOW_SECONDS
            while len(batch) < self._max_batch and (left := deadline - loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self.queue.get(), left))
                except TimeoutError:
                    break
            end: Any = None
            try:
                await asyncio.to_thread(self._generate, batch, StepStreamer(loop, batch))
            except Exception as failure:  # told to every client of the batch; the next batch may be fine
                end = failure
            for request in batch:
                request.tokens.put_nowait(end)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Waiting], streamer: StepStreamer) -> None:
        width = max(len(request.prompt) for request in batch)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        names = [request.adapter for request in batch]
        named = {"adapter_names": names} if isinstance(self._model, peft.PeftModel) else {}
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(request.max_tokens for request in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self._pad,
            streamer=streamer,
            **named,
        )


def load(folder: str, adapters: dict[str, str], dtype: str) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for name, path in adapters.items():
        if isinstance(model, peft.PeftModel):
            model.load_adapter(path, adapter_name=name)
        else:
            model = peft.PeftModel.from_pretrained(model, path, adapter_name=name)
    return model.eval()


def application(batcher: Batcher, tokenizer: Any, base: str, adapters: Sequence[str]) -> web.Application:
    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        model, prompt = body["model"], body["prompt"]
        if model != base and model not in adapters:
            return web.json_response({"error": {"message": f"no model {model!r}"}}, status=404)
        ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt)
        waiting = Waiting(ids, BASE if model == base else model, body["max_tokens"])
        batcher.queue.put_nowait(waiting)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        count = 0
        while (token := await waiting.tokens.get()) is not None:
            if isinstance(token, Exception):
                await send(response, {"error": {"message": repr(token)}})
                return response
            count += 1
            await send(response, {"choices": [{"index": 0, "text": tokenizer.decode([token])}]})
        usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
        await send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def send(response: web.StreamResponse, event: dict) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def health(_: web.Request) -> web.Response:
        return web.json_response({})

    async def version(_: web.Request) -> web.Response:
        found = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
        return web.json_response(found)

    async def start(app: web.Application) -> None:
        app["batcher"] = asyncio.create_task(batcher.serve())

    app = web.Application()
    app.on_startup.append(start)
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/health", health)
    app.router.add_get("/version", version)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--max-batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    adapters = dict(item.split("=", 1) for item in given.adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    batcher = Batcher(load(given.model, adapters, given.dtype), tokenizer.pad_token_id or 0, given.max_batch)
    app = application(batcher, tokenizer, given.name, tuple(adapters))
    web.run_app(app, host="127.0.0.1", port=given.port, print=None)


if __name__ == "__main__":
    main()
