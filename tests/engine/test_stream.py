"""A stream whose outputs may go past its reader: nothing is lost, doubled or told out of order."""

from __future__ import annotations

import asyncio
import random

import pytest

from deltaserve.core import RequestOutput, SequenceDelta
from deltaserve.engine.async_engine import AsyncEngine
from deltaserve.engine.messages import Delivery
from deltaserve.engine.stream import RequestStream
from deltaserve.errors import EngineFailed
from deltatest.engine_fakes import make_rig, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def output(token: int, *, is_finished: bool = False) -> RequestOutput:
    return RequestOutput("a", (SequenceDelta(0, (token,)),), is_finished)


def token_of(item: RequestOutput) -> int:
    return item.deltas[0].token_ids[0]


def stream() -> RequestStream:
    return RequestStream("a", abort=lambda: None, stop=lambda index: None)


async def test_what_comes_while_the_reader_waits_goes_to_the_sink_and_the_end_to_the_reader() -> None:
    made, sunk = stream(), []
    made.push(output(0))  # before: nobody waits
    made.divert(lambda item: sunk.append(token_of(item)) or True)
    made.push(output(1))  # still nobody waits
    read: list[int] = []

    async def reader() -> None:
        async for item in made:
            read.append(token_of(item))

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    assert read == [0, 1]
    for token in (2, 3):
        made.push(output(token))
    assert (read, sunk) == ([0, 1], [2, 3])
    made.push(output(4, is_finished=True))
    await task
    assert (read, sunk) == ([0, 1, 4], [2, 3])


@pytest.mark.parametrize("seed", range(20))
async def test_order_holds_whoever_takes_what(seed: int) -> None:
    """The reader dawdles and the sink refuses at random; together they see every output once, in order."""
    drawn, made, seen = random.Random(seed), stream(), []

    def sink(item: RequestOutput) -> bool:
        if drawn.random() < 0.3:
            return False
        seen.append(token_of(item))
        return True

    async def reader() -> None:
        async for item in made:
            for _ in range(drawn.randrange(3)):  # between taking an output and writing it, as a slow client makes it
                await asyncio.sleep(0)
            seen.append(token_of(item))

    made.divert(sink)
    task = asyncio.create_task(reader())
    for token in range(200):
        if drawn.random() < 0.5:
            await asyncio.sleep(0)
        made.push(output(token, is_finished=token == 199))
    await task
    assert seen == list(range(200))


async def test_what_the_sink_raises_is_raised_to_its_reader_alone() -> None:
    made = stream()

    def sink(item: RequestOutput) -> bool:
        raise ZeroDivisionError

    made.divert(sink)
    waiting = asyncio.ensure_future(anext(made))
    await asyncio.sleep(0)
    made.push(output(1))  # does not raise: the step's other streams come after it
    with pytest.raises(ZeroDivisionError):
        await waiting


async def test_failures_go_to_the_reader_and_an_abort_ends_both() -> None:
    for end in ("failure", "abort"):
        made, sunk = stream(), []
        made.divert(lambda item, sunk=sunk: sunk.append(item) or True)
        waiting = asyncio.ensure_future(anext(made))
        await asyncio.sleep(0)
        made.push(EngineFailed("dead")) if end == "failure" else made.abort()
        with pytest.raises(EngineFailed if end == "failure" else StopAsyncIteration):
            await waiting
        made.push(output(1))
        assert sunk == []


async def test_a_step_wakes_the_loop_once_and_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams a step has something for."""
    rig = make_rig(max_num_seqs=16)
    engine = AsyncEngine(rig.engine)
    deliveries: list[Delivery] = []
    calls = 0
    loop = asyncio.get_running_loop()
    call, receive = loop.call_soon_threadsafe, engine._receive

    def counting(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return call(*arguments, **options)  # type: ignore[arg-type]

    def receiving(delivery: Delivery) -> None:
        deliveries.append(delivery)
        receive(delivery)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    monkeypatch.setattr(engine, "_receive", receiving)
    sunk: list[str] = []
    woken: list[str] = []

    async def follow(name: str) -> None:
        own = engine.submit(request(name, [1, 2, 3], max_tokens=12))
        own.divert(lambda item: sunk.append(item.request_id) or True)
        async for item in own:
            woken.append(item.request_id)

    await engine.start()
    calls = 0
    try:
        await asyncio.gather(*(follow(f"r{i}") for i in range(10)))
        assert calls == len(deliveries) <= rig.runner.num_steps + 1
        assert max(len(delivery.outputs) for delivery in deliveries) == 10
        assert len(sunk) + len(woken) == 10 * 12
        assert len(woken) < 10 * 4  # the last of each, and what came before it waited
    finally:
        await engine.stop()
