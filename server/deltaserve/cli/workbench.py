"""Where adapters are made without training: sources from the store or from folders, an engine to score with, the door.

The engine is made here, also when the door is a server's: weights and logits are never asked for over HTTP.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaserve.admission.base_match import match_base
from deltaserve.admission.folders import adapter_files
from deltaserve.cli.base_choice import base_folder
from deltaserve.cli.connection import find_server
from deltaserve.cli.local_door import admit_into
from deltaserve.cli.registration import base_logits, engine_logits
from deltaserve.config import DTypeName, ServeConfig
from deltaserve.errors import InvalidRequest, NotFound
from deltaserve.remote import RemoteServer
from deltaserve.runtime import Runtime
from deltaserve_store import errors as store_errors
from deltaserve_store.digest import content_digest, stored_file_names
from deltaserve_store.formats import read_adapter
from deltaserve_store.names import DEFAULT_TENANT
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.store import AdapterStore
from deltaserve_trainer.encoding import EncodedExample
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.merging.update import Update, update_of
from deltaserve_trainer.scoring import loss_of

MAX_ROW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to start from: its files in a folder of their own, and what to call it in provenance.

    ``admitted_for``: fingerprint of the base whose door it passed; None for a folder.
    """

    name: str
    folder: Path
    version: str
    admitted_for: str | None = None

    @property
    def told(self) -> str:
        return f"{self.name}@{self.version[:12]}"


class Weights:
    """The served base's numbers as the trainer's packages read them."""

    def __init__(self, runtime: Runtime) -> None:
        self._base = runtime.base

    def weight(self, linear: str) -> Tensor:
        found = self._base.linear(linear)
        return found.rows(0, found.out_features).cpu()

    def bias(self, linear: str) -> Tensor | None:
        bias = self._base.linear(linear).bias
        return None if bias is None else bias.float().cpu()

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._base.norm(name)
        return weight.float().cpu(), None if bias is None else bias.float().cpu()


class Workbench:
    """An open runtime, a scratch folder, and the door to where the result shall be served."""

    def __init__(self, runtime: Runtime, loop: asyncio.Runner, scratch: Path, remote: RemoteServer | None) -> None:
        self.runtime = runtime
        self.scratch = scratch
        self.weights = Weights(runtime)
        self._loop = loop
        self._remote = remote

    @property
    def max_row_tokens(self) -> int:
        """Rows that are scored are cut here."""
        return min(MAX_ROW_TOKENS, self.runtime.engine.limits.max_model_len)

    def read(self, source: Source, *, accept_base: bool = False) -> ParsedAdapter:
        """Checked as at the door; raises ``AdapterInvalid`` and ``BaseMismatch``."""
        spec = self.runtime.base.spec
        if source.admitted_for not in (None, spec.fingerprint):
            raise InvalidRequest(f"{source.name} was admitted for another base; give that one with --model.")
        adapter = read_adapter(source.folder, spec)
        names = (*self.runtime.base_names, *spec.names)
        match_base(adapter, spec, names, accept_base=accept_base or source.admitted_for is not None)
        if adapter.added_tokens:
            raise InvalidRequest(
                f"{source.name} adds {len(adapter.added_tokens)} tokens to the base's, which have no place in what is "
                "made of it; these commands take adapters of the base's own tokens."
            )
        return adapter

    def update(self, source: Source, adapter: ParsedAdapter) -> Update:
        """What the adapter adds, as a sum of terms; raises ``MergeRefused``, which names the adapter."""
        try:
            return update_of(adapter, self.runtime.base.spec, self.weights)
        except MergeRefused as error:
            raise MergeRefused(f"{source.name}: {error}") from error

    def logits(self, adapter: Path | None, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The engine's logits of every position with the adapter in a folder (None: of the base), float32
        [num_tokens, vocab]."""
        if adapter is None:
            return self._loop.run(base_logits(self.runtime, prompts))
        with tempfile.TemporaryDirectory(dir=self.scratch) as place:
            rows = [list(prompt) for prompt in prompts]
            return self._loop.run(engine_logits(self.runtime, adapter, rows, Path(place)))

    def loss(self, adapter: Path | None, rows: Sequence[EncodedExample]) -> float:
        """Mean nats per trained token, by the engine."""
        return loss_of(self.logits(adapter, [row.input_ids for row in rows]), rows)

    def admit(self, folder: Path, name: str, *, source: str) -> dict[str, Any]:
        """Through the door, like any adapter; raises ``AdapterRefused`` with every reason."""
        if self._remote is not None:
            return self._remote.upload(adapter_files(folder)[0], name)
        return self._loop.run(admit_into(self.runtime, folder, name, source=source))


@contextmanager
def workbench(
    store: Path,
    model: str | None,
    server: str | None,
    api_key: str | None,
    scratch: Path,
    *,
    dtype: DTypeName = "auto",
) -> Iterator[Workbench]:
    """Opens the runtime: on the store where no server holds it, else on an empty one that is thrown away."""
    remote = find_server(server, store, api_key)
    folder = None if model is None else str(base_folder(model))
    own_store = store if remote is None else scratch / "store"
    config = ServeConfig(model=folder, store=own_store, dtype=dtype, demo_adapters=False, drain_seconds=0.0)
    with asyncio.Runner() as loop:
        runtime = Runtime.open(config)
        loop.run(runtime.start())
        try:
            if remote is not None:
                check_door(remote, runtime.base.spec.fingerprint)
            yield Workbench(runtime, loop, scratch, remote)
        finally:
            loop.run(runtime.close())


def check_door(remote: RemoteServer, fingerprint: str) -> None:
    """Raises ``InvalidRequest`` where the server would refuse what is made for this base, before anything is made."""
    served = remote.version()
    if served["base_fingerprint"] != fingerprint:
        raise InvalidRequest(
            f"The server that the result would go to serves another base: {served['base']}, fingerprint "
            f"{served['base_fingerprint'][:12]}, where that of the result is {fingerprint[:12]}. Give a --store of its "
            "own, or a --server of that base.",
            param="server",
        )


def find_sources(names: Sequence[str], store: Path, scratch: Path) -> list[Source]:
    """Folders as they are, and names (``name``, ``name@version``, aliases) of the local store, also while a server
    holds it. Raises ``NotFound``, or what the store raises."""
    found = []
    for index, name in enumerate(names):
        copy = scratch / f"source-{index}"
        copy.mkdir()
        if Path(name).is_dir():
            for file in adapter_files(Path(name))[0]:
                shutil.copyfile(file, copy / file.name)
            found.append(Source(Path(name).resolve().name, copy, content_digest(copy)))
            continue
        try:
            with AdapterStore.open(store, lock=False) as opened:
                record = opened.get(DEFAULT_TENANT, name)
                stored = opened.version_dir(record.version)
                for file_name in stored_file_names(stored):
                    shutil.copyfile(stored / file_name, copy / file_name)
        except store_errors.NotFound as missing:
            told = missing.message
            if missing.param == "model":  # its words are for who asks a server
                told = f"the store {store} has no adapter {name[:160]!r}; deltaserve adapters list shows what it has"
            raise NotFound(f"{told}. {name!r} is no folder either.", param="adapters") from missing
        found.append(Source(record.name, copy, record.version, record.base.fingerprint))
    return found
