"""The door: every adapter, whatever way it came, is checked, matched, folded, proven and only then committed.

    staged folder -> check -> base -> fold -> prove -> commit -> names published
                       |        |       |       |         |
                       +--------+-------+-------+---------+--> refused with reasons: nothing has changed

One admission at a time; blocking work runs on one worker thread, so the event loop and the step loop go on. Whoever
stops half way (refusal, error, cancellation, a killed process) leaves the old state; once committed, the new one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from deltaserve.admission.added_tokens import with_token_list
from deltaserve.admission.base_match import BASE_WAIVER, match_base
from deltaserve.admission.conversion import DEFAULT_ERROR_SHARE
from deltaserve.admission.derived import ProvenFiles
from deltaserve.admission.evidence import Evidence
from deltaserve.admission.failures import typed_failures
from deltaserve.admission.fit import (
    TokenizerConflicts,
    check_added_tokens,
    check_chat_template,
    check_room,
    no_tokenizer,
)
from deltaserve.admission.proof import Judgement, NonFiniteOutput, ProbeEngine, Prover, judge
from deltaserve.admission.work_thread import WorkThread
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FOLDED_FILE_NAME
from deltaserve.errors import AdapterRefused, AdapterUnavailable, Conflict, QueueFull, Reason
from deltaserve.model.base import BaseModel
from deltaserve_store.digest import content_digest, stored_file_names
from deltaserve_store.durable import remove_tree
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_kinds.low_rank import DEFAULT_LIMITS, ConversionLimits
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import DEFAULT_TENANT, NameMap, validate_name
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.store import AdapterStore, CommitResult

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class DoorEngine(ProbeEngine, Protocol):
    """The part of ``AsyncEngine`` that admission needs."""

    @property
    def names(self) -> NameMap: ...

    def publish(self, names: NameMap) -> None: ...

    def register_candidate(self, version: str, folded_path: Path) -> None: ...

    def unregister_candidate(self, version: str) -> None: ...


@dataclass(frozen=True, slots=True)
class AdmissionResult:
    """``created`` is False when these bytes were already the name's current version."""

    record: AdapterRecord
    created: bool
    evidence: Evidence
    warnings: tuple[str, ...] = ()


class Admission:
    """``base_names``: the names by which files may call the served base. ``chat_templates``: the operator's registry.

    ``proven`` has the key that evidence is kept under. ``max_waiting`` uploads may wait for the one being admitted;
    more get ``QueueFull``. ``conversion_limits`` and ``conversion_error`` (a share of the effect): how deltas of high
    rank may be served. ``tokenizer_conflicts`` tells why tokens cannot be added to the base's.
    """

    def __init__(
        self,
        base: BaseModel,
        store: AdapterStore,
        engine: DoorEngine,
        proven: ProvenFiles,
        *,
        base_names: Collection[str],
        chat_templates: Collection[str] = (),
        max_waiting: int = 32,
        conversion_limits: ConversionLimits = DEFAULT_LIMITS,
        conversion_error: float = DEFAULT_ERROR_SHARE,
        tokenizer_conflicts: TokenizerConflicts = no_tokenizer,
    ) -> None:
        self._base = base
        self._store = store
        self._engine = engine
        self._proven = proven
        self._base_names = frozenset(base_names)
        self._chat_templates = frozenset(chat_templates)
        self._tokenizer_conflicts = tokenizer_conflicts
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._turn = asyncio.Lock()
        self._publishing = asyncio.Lock()
        self._worker = WorkThread()
        self._conversion_limits = conversion_limits
        self._prover = Prover(base, engine, proven.key, self._worker.run, conversion_error)

    async def admit(
        self,
        staged_folder: Path,
        *,
        name: str,
        tenant: str = DEFAULT_TENANT,
        expected_version: str | None = None,
        accept_base: bool = False,
        accept_no_effect: bool = False,
        source: str = "upload",
    ) -> AdmissionResult:
        """Admit the files of ``staged_folder`` as the new version of ``name``; the name moves to it.

        The folder stays the caller's to discard. Raises ``AdapterRefused`` (422) with every reason, ``Conflict`` (409)
        when ``expected_version`` is not the current one or the name is taken, ``StorageFull`` (507), ``QueueFull``
        (429), ``InvalidRequest`` (400) for a malformed name, or what the engine raises when it is not available.
        """
        with typed_failures():
            validate_name(name)
            async with self._one_at_a_time(), self._scratch() as scratch:
                self._check_expected(tenant, name, expected_version)
                adapter = await self._worker.run(lambda: self._read(staged_folder))
                staged_folder = await self._worker.run(lambda: with_token_list(staged_folder, adapter, scratch))
                version = await self._worker.run(lambda: content_digest(staged_folder))
                known = self._current(tenant, name)
                is_same = known is not None and known.version == version and self._is_for_this_base(known)
                waived = known.waivers if known is not None and is_same else ()
                accept_base, accept_no_effect = accept_base or BASE_WAIVER in waived, accept_no_effect or is_same
                waivers = match_base(adapter, self._base.spec, self._base_names, accept_base=accept_base)
                self._check_fit(adapter)
                evidence = await self._worker.run(lambda: self._proven.evidence(version))
                # Whoever uploads the same bytes again may be mending what the disk has lost.
                if known is not None and is_same and evidence is not None and await self._is_whole(version):
                    return AdmissionResult(known, False, evidence, judge(evidence, accept_no_effect=True).warnings)
                async with self._folded_candidate(version, adapter) as folded:
                    evidence = evidence or await self._prove(version, adapter)
                    judgement = self._judge(evidence, accept_no_effect)

                    def commit() -> CommitResult:
                        result = self._store.commit(
                            staged_folder,
                            adapter,
                            name=name,
                            tenant=tenant,
                            base_fingerprint=self._base.spec.fingerprint,
                            evidence=evidence.to_dict(),
                            evidence_key=str(evidence.key),
                            waivers=(*waivers, *judgement.waivers),
                            expected_version=expected_version,
                            source=source,
                        )
                        self._keep(version, folded)
                        return result

                    result = await self._change_names(commit)
        return AdmissionResult(result.record, result.created, evidence, (*adapter.notes, *judgement.warnings))

    async def prepare(self, version: str) -> None:
        """Fold and prove a stored version for this server, before the engine serves it; quick when that is done.

        The engine's hook for versions whose folded file or evidence is missing or damaged: a new dtype, device,
        operator version or base. Raises ``deltaserve_store.errors.BaseMismatch`` for a version of another base,
        ``AdapterRefused`` for one that does not pass here.
        """
        async with self._turn:
            if await self._worker.run(lambda: self._proven.is_ready(version, self._base.spec, self._base.dtype)):
                return
            waivers = self._waivers(version)
            adapter = await self._worker.run(lambda: self._read_stored(version))
            match_base(adapter, self._base.spec, self._base_names, accept_base=BASE_WAIVER in waivers)
            self._check_fit(adapter)
            async with self._folded_candidate(version, adapter) as folded:
                evidence = await self._prove(version, adapter)
                self._judge(evidence, accept_no_effect=True)
                with typed_failures():
                    await self._worker.finish(lambda: self._proven.keep(version, folded, evidence))

    async def rollback(self, tenant: str, name: str, version: str | None = None) -> AdapterRecord:
        """Move a name to an earlier version: the one given (digest or prefix), else the one before the current."""
        return await self._change(lambda: self._store.rollback(tenant, name, version))

    async def alias(self, tenant: str, alias: str, target: str) -> None:
        """Point an alias at an adapter name or one of its versions. Requests already running keep what they have."""
        await self._change(lambda: self._store.alias(tenant, alias, target))

    async def delete(self, tenant: str, name: str) -> None:
        """Forget a name and its versions; sequences that use one finish first."""
        await self._change(lambda: self._store.delete(tenant, name))

    async def publish(self) -> None:
        """Give the engine the store's names as they are now: at start, and after changes made to the store itself."""
        await self._change(lambda: None)

    def close(self) -> None:
        """Stop the worker thread; an admission under way fails."""
        self._worker.close()

    # ---------------------------------------------------------------- steps

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncIterator[None]:
        if self._num_waiting >= self._max_waiting:
            raise QueueFull(
                f"{self._num_waiting} uploads are waiting already; try again later.", retry_after_seconds=5.0
            )
        self._num_waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._num_waiting -= 1

    def _check_expected(self, tenant: str, name: str, expected_version: str | None) -> None:
        """Early, so that a lost race does not cost a proof; the commit checks again."""
        record = self._current(tenant, name)
        current = record.version if record is not None else "none"
        if expected_version is not None and not current.startswith(expected_version):
            message = (
                f"{name!r} is at version {current}, not at the expected {expected_version[:80]!r}; look and retry."
            )
            raise Conflict(message, param="expected_version")

    def _current(self, tenant: str, name: str) -> AdapterRecord | None:
        entry = self._engine.names.adapters.get(tenant, {}).get(name)
        return entry.records[entry.current] if entry else None

    def _waivers(self, version: str) -> frozenset[str]:
        """What was waived for a version on this very base, under whatever name of whatever tenant."""
        records = (
            entry.records[version]
            for entries in self._engine.names.adapters.values()
            for entry in entries.values()
            if version in entry.records
        )
        return frozenset(waiver for record in records if self._is_for_this_base(record) for waiver in record.waivers)

    def _is_for_this_base(self, record: AdapterRecord) -> bool:
        return record.base.fingerprint == self._base.spec.fingerprint

    async def _is_whole(self, version: str) -> bool:
        return not await self._worker.run(lambda: self._store.verify(version))

    def _read_stored(self, version: str) -> ParsedAdapter:
        """The version's own files, linked into a scratch folder: its manifest is no file of an adapter."""
        stored = self._store.version_dir(version)
        with tempfile.TemporaryDirectory(prefix="read-", dir=self._store.scratch_dir) as scratch:
            for name in stored_file_names(stored):
                os.link(stored / name, Path(scratch) / name)
            if content_digest(Path(scratch)) != version:
                raise AdapterUnavailable(f"The stored files of version {version[:12]} are damaged; upload them again.")
            return self._read(Path(scratch))

    def _read(self, folder: Path) -> ParsedAdapter:
        """Checked, and with the base's weights where the adapter multiplies them."""
        return read_adapter(folder, self._base.spec, self._conversion_limits).on_base(self._weight_of)

    @asynccontextmanager
    async def _scratch(self) -> AsyncIterator[Path]:
        with tempfile.TemporaryDirectory(prefix="admit-", dir=self._store.scratch_dir) as scratch:
            yield Path(scratch)

    def _weight_of(self, linear: str) -> Tensor:
        found = self._base.linear(linear)
        return found.rows(0, found.out_features).cpu()

    def _check_fit(self, adapter: ParsedAdapter) -> None:
        check_chat_template(adapter, self._chat_templates)
        check_room(adapter, self._engine.limits.max_model_len)
        check_added_tokens(adapter, self._tokenizer_conflicts)

    @asynccontextmanager
    async def _folded_candidate(self, version: str, adapter: ParsedAdapter) -> AsyncIterator[Path]:
        """Fold into a scratch folder and show it to the engine, for as long as the block runs."""
        scratch = Path(self._store.scratch_dir) / f"fold-{secrets.token_hex(16)}"
        path = scratch / FOLDED_FILE_NAME

        def write() -> None:
            scratch.mkdir(mode=0o700)
            fold(adapter, self._base.spec, self._base.dtype, self._base).save(path)

        try:
            with typed_failures():
                await self._worker.run(write)
            self._engine.register_candidate(version, path)
            try:
                yield path
            finally:
                self._engine.unregister_candidate(version)
        finally:
            # On the same thread as the writing: a cancelled caller must not remove what is still being written.
            await self._worker.finish(lambda: remove_tree(scratch))

    async def _prove(self, version: str, adapter: ParsedAdapter) -> Evidence:
        try:
            return await self._prover.measure(version, adapter)
        except NonFiniteOutput as error:
            reason = Reason("non_finite_output", error.where, "NaN or infinity", "finite logits")
            raise AdapterRefused(f"The proof failed: {error.where} are not finite.", reasons=[reason]) from error

    def _judge(self, evidence: Evidence, accept_no_effect: bool) -> Judgement:
        judgement = judge(evidence, accept_no_effect=accept_no_effect)
        if judgement.reasons:
            first = judgement.reasons[0]
            message = f"The proof failed ({first.code}): {first.found}; allowed: {first.allowed}."
            raise AdapterRefused(message, reasons=judgement.reasons)
        return judgement

    def _keep(self, version: str, folded: Path) -> None:
        """After the commit a failure here costs only time: the version is folded and proven again at its first load."""
        try:
            self._proven.place(version, folded)
        except Exception:
            logger.warning("folded file not kept; it is made again at the first load", extra={"version": version})

    async def _change(self, function: Callable[[], Result]) -> Result:
        with typed_failures():
            return await self._change_names(function)

    async def _change_names(self, function: Callable[[], Result]) -> Result:
        """Change the store and publish the names it then has. A cancelled caller waits for both: all or nothing."""
        async with self._publishing:

            def change() -> tuple[Result, NameMap]:
                return function(), self._store.snapshot()

            (result, names), cancelled = await self._worker.run_to_end(change)
            self._engine.publish(names)
        if cancelled:
            raise asyncio.CancelledError
        return result
