"""Collaborators of the HTTP layer that answer from a script: no model, no store, no proof."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from deltaserve.core import (
    AdapterState,
    AdapterStatus,
    EngineStatus,
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SequenceDelta,
    TokenLogprob,
)
from deltaserve.engine.limits import EngineLimits
from deltaserve.errors import AdapterRefused, Conflict, DeltaserveError, ModelNotFound, Reason, Unavailable
from deltaserve.text import Tokenizer
from deltaserve_store.manifest import AdapterRecord, BaseRef
from deltaserve_store.names import AliasEntry, NameEntry, NameMap, Resolved
from deltatest.tokenizers import byte_level

BASE = "tiny"
LONG_BASE = "org/tiny base"
TONE_V1, TONE_V2, CODE_V1, SECRET = ("a1" * 32, "a2" * 32, "c0" * 32, "5e" * 32)
DEFAULT_TEXT = "hello world, how are you today? 🙂 naïve café"


def record(name: str, version: str, *, tenant: str = "default", created_at: float = 1000.0) -> AdapterRecord:
    return AdapterRecord(
        name=name,
        version=version,
        tenant=tenant,
        kinds=("lora",),
        file_format="peft-lora",
        rank=8,
        bytes=1234,
        num_parameters=600,
        created_at=created_at,
        base=BaseRef("f" * 64, "org/tiny"),
        effect=1.5,
    )


def some_names() -> NameMap:
    """``tone`` (two versions), ``code``, alias ``prod`` -> tone, and ``secret`` of the tenant ``other``."""
    tone = {v: record("tone", v, created_at=i) for i, v in enumerate((TONE_V1, TONE_V2), 1)}
    return NameMap(
        base_names=(BASE, LONG_BASE),
        adapters={
            "default": {
                "tone": NameEntry(TONE_V2, tone),
                "code": NameEntry(CODE_V1, {CODE_V1: record("code", CODE_V1)}),
            },
            "other": {"secret": NameEntry(SECRET, {SECRET: record("secret", SECRET, tenant="other")})},
        },
        aliases={"default": {"prod": AliasEntry("tone")}},
    )


@dataclass
class FakeEngine:
    """Each sequence says ``script(request, index)``, one token a step, then ends with the end token.

    ``step_seconds`` sleeps between steps; ``fail_after`` raises ``failure`` after that many tokens; ``refuse`` is
    raised by ``submit``. ``requests`` and ``aborted`` record what happened; ``num_open`` must return to 0.
    """

    tokenizer: Tokenizer = field(default_factory=byte_level)
    script: Callable[[GenerationRequest, int], Sequence[int]] | None = None
    max_model_len: int = 512
    step_seconds: float = 0.0
    tokens_per_step: int = 1
    fail_after: int | None = None
    failure: DeltaserveError | None = None
    refuse: DeltaserveError | None = None
    names: NameMap = field(default_factory=some_names)
    is_alive: bool = True
    is_draining: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    stopped: list[tuple[str, int]] = field(default_factory=list)
    num_open: int = 0
    tone_state: AdapterState = AdapterState.READY
    base_fingerprint: str = "f" * 64

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(
            max_model_len=self.max_model_len,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_queue=100,
            vocab_size=self.tokenizer.vocab_size,
        )

    def max_row_len(self, num_rows: int) -> int:
        """As of a KV cache with room for two rows of the longest length."""
        return min(self.max_model_len, 2 * self.max_model_len // num_rows)

    def resolve(self, tenant: str, model: str) -> Resolved:
        return self.names.resolve(tenant, model)

    def status(self) -> EngineStatus:
        return EngineStatus(
            is_alive=self.is_alive,
            is_draining=self.is_draining,
            num_running=self.num_open,
            num_waiting=0,
            num_blocks_used=self.num_open,
            num_blocks_total=64,
            adapters=(AdapterStatus(TONE_V2, self.tone_state, host_bytes=10, device_bytes=10),),
        )

    def submit(self, request: GenerationRequest) -> FakeStream:
        if self.refuse is not None:
            raise self.refuse
        self.limits.check(request)
        self.requests.append(request)
        return FakeStream(self, request)

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """As the engine does: nothing new, and what is open after ``drain_seconds`` ends with an error."""
        self.is_draining = True
        self.refuse = Unavailable("shutting down")
        deadline = time.monotonic() + drain_seconds
        while self.num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.fail_after, self.failure = 0, Unavailable("The server is shutting down.")

    def tokens_of(self, request: GenerationRequest, index: int) -> list[int]:
        if self.script is not None:
            return list(self.script(request, index))
        return self.tokenizer.encode(DEFAULT_TEXT, add_special_tokens=False)


class FakeStream:
    def __init__(self, engine: FakeEngine, request: GenerationRequest) -> None:
        self._engine = engine
        self._request = request
        self._is_open = True
        self._stopped: set[int] = set()
        self._generator = self._generate()
        self._sink: Callable[[RequestOutput], bool] | None = None
        engine.num_open += 1

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._is_open:
            raise StopAsyncIteration
        try:
            while True:
                output = await anext(self._generator)
                if self._sink is None or output.is_finished or not self._sink(output):
                    return output
                if not self._is_open:  # the sink has had enough
                    raise StopAsyncIteration
        except StopAsyncIteration:
            self._close()
            raise
        except DeltaserveError:
            self._close()
            raise

    def abort(self) -> None:
        if self._is_open:
            self._engine.aborted.append(self._request.request_id)
            self._close()

    async def aclose(self) -> None:
        self.abort()

    def divert(self, sink: Callable[[RequestOutput], bool]) -> None:
        self._sink = sink

    def stop(self, index: int) -> None:
        """The sequence ends at the next step, as if by a stop token."""
        self._engine.stopped.append((self._request.request_id, index))
        self._stopped.add(index)

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._engine.num_open -= 1

    async def _generate(self) -> AsyncIterator[RequestOutput]:
        engine, request = self._engine, self._request
        plans = [self._plan(index) for index in range(request.n)]
        prompt_logprobs = self._prompt_logprobs()
        told: list[SequenceDelta] = []
        for step in itertools.count():
            await asyncio.sleep(engine.step_seconds)
            if engine.fail_after is not None and step >= engine.fail_after:
                raise engine.failure or DeltaserveError("scripted failure")
            told += [self._step(plan, step) for plan in plans if step < len(plan)]
            is_finished = all(step >= len(plan) - 1 for plan in plans)
            if not request.is_streamed and not is_finished:
                continue
            deltas, told = told if request.is_streamed else [_joined(told, i) for i in range(request.n)], []
            if is_finished:
                self._close()
            yield RequestOutput(
                request.request_id,
                tuple(deltas),
                is_finished=is_finished,
                num_prompt_tokens=len(request.prompt_ids),
                num_cached_tokens=2,
                prompt_logprobs=prompt_logprobs if step == 0 or not request.is_streamed else None,
            )
            if is_finished:
                return

    def _step(self, plan: list[SequenceDelta], step: int) -> SequenceDelta:
        index = plan[0].index
        if index in self._stopped:
            del plan[step + 1 :]
            plan[step] = SequenceDelta(index, finish_reason=FinishReason.STOP)
        return plan[step]

    def _plan(self, index: int) -> list[SequenceDelta]:
        """What each step tells of one sequence; a stop token is told by ``stop_token_id`` alone."""
        request, sampling = self._request, self._request.sampling
        tokens = self._engine.tokens_of(request, index)
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
        stopped = next((i for i, token in enumerate(tokens) if token in stops), None)
        end = tokens[stopped] if stopped is not None else request.eos_token_ids[0]
        said = tokens[:stopped][: sampling.max_tokens]
        plan = []
        size = self._engine.tokens_per_step
        for start in range(0, len(said), size):
            chunk = tuple(said[start : start + size])
            logprobs = () if sampling.logprobs is None else tuple(self._logprob(t, sampling.logprobs) for t in chunk)
            plan.append(SequenceDelta(index, chunk, logprobs))
        if len(said) == sampling.max_tokens:
            if not plan:
                return [SequenceDelta(index, finish_reason=FinishReason.LENGTH)]
            plan[-1] = plan[-1]._replace(finish_reason=FinishReason.LENGTH)
        else:
            plan.append(SequenceDelta(index, finish_reason=FinishReason.STOP, stop_token_id=end))
        return plan

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        top = self._request.sampling.prompt_logprobs
        if top is None:
            return None
        return (None, *(self._logprob(token, top) for token in self._request.prompt_ids[1:]))

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        return TokenLogprob(token, -0.5, tuple(((token + i) % 256, -0.5 - i) for i in range(top)))


def _joined(told: Sequence[SequenceDelta], index: int) -> SequenceDelta:
    """Everything told of one sequence, as one delta: how the answers that nobody streams are told."""
    own = [delta for delta in told if delta.index == index]
    token_ids = tuple(itertools.chain.from_iterable(delta.token_ids for delta in own))
    logprobs = tuple(itertools.chain.from_iterable(delta.logprobs for delta in own))
    return SequenceDelta(index, token_ids, logprobs, own[-1].finish_reason, own[-1].stop_token_id)


class FakeStore:
    """Only a place for staged uploads."""

    def __init__(self, folder: Path) -> None:
        self.scratch_dir = folder
        folder.mkdir(parents=True, exist_ok=True)

    def room_bytes(self) -> int | None:
        return None


class FakeAdmission:
    """Admits any folder whose weights do not begin with ``bad``; the version is the digest of the weights."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.admitted: list[dict[str, bytes]] = []
        self.seconds = 0.0

    async def admit(
        self,
        staged_folder: Path,
        *,
        name: str,
        tenant: str = "default",
        expected_version: str | None = None,
        accept_base: bool = False,
        accept_no_effect: bool = False,
        source: str = "upload",
    ) -> SimpleNamespace:
        await asyncio.sleep(self.seconds)
        files = {path.name: path.read_bytes() for path in staged_folder.iterdir()}
        weights = files.get("adapter_model.safetensors", b"")
        if weights.startswith(b"bad"):
            reasons = [Reason("missing_tensor", f"layer.{i}", "nothing", "a tensor") for i in range(2)]
            raise AdapterRefused("adapter refused: missing_tensor", reasons=reasons)
        entry = self.engine.names.adapters.get(tenant, {}).get(name)
        if expected_version is not None and (entry is None or entry.current != expected_version):
            raise Conflict("not the current version", param="expected_version")
        version = hashlib.sha256(weights).hexdigest()
        created = entry is None or entry.current != version
        self.admitted.append(files)
        made = record(name, version, tenant=tenant)
        if accept_base:
            made = dataclasses.replace(made, waivers=("base",))
        self._put(tenant, name, NameEntry(version, {**(entry.records if entry else {}), version: made}))
        return SimpleNamespace(record=made, created=created, evidence=None, warnings=())

    async def rollback(self, tenant: str, name: str, version: str | None = None) -> AdapterRecord:
        entry = self._entry(tenant, name)
        versions = sorted(entry.records, key=lambda v: entry.records[v].created_at)
        earlier = versions[max(0, versions.index(entry.current) - 1)]
        chosen = next((v for v in versions if version and v.startswith(version)), earlier)
        self._put(tenant, name, NameEntry(chosen, entry.records))
        return entry.records[chosen]

    async def alias(self, tenant: str, alias: str, target: str) -> None:
        name, _, version = target.partition("@")
        self._entry(tenant, name)
        aliases = {**self.engine.names.aliases.get(tenant, {}), alias: AliasEntry(name, version or None)}
        self.engine.names = dataclasses.replace(
            self.engine.names, aliases={**self.engine.names.aliases, tenant: aliases}
        )

    async def delete(self, tenant: str, name: str) -> None:
        self._entry(tenant, name)
        self._put(tenant, name, None)

    def _entry(self, tenant: str, name: str) -> NameEntry:
        entry = self.engine.names.adapters.get(tenant, {}).get(name)
        if entry is None:
            raise ModelNotFound("no such adapter", param="name")
        return entry

    def _put(self, tenant: str, name: str, entry: NameEntry | None) -> None:
        own = {key: value for key, value in self.engine.names.adapters.get(tenant, {}).items() if key != name}
        if entry is not None:
            own[name] = entry
        self.engine.names = dataclasses.replace(self.engine.names, adapters={**self.engine.names.adapters, tenant: own})
