"""Import a directory tree of adapter folders, one verdict each. Interrupted imports go on where they stopped.

A folder whose bytes are already the current version of its name costs one digest and nothing else, so running the
same import again is the way to resume it.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from deltaserve.admission.folders import FolderDoor, adapter_files
from deltaserve.errors import (
    AuthenticationFailed,
    DeltaserveError,
    EngineFailed,
    InvalidRequest,
    PermissionDenied,
    Reason,
    Unavailable,
)
from deltaserve_store.digest import content_digest
from deltaserve_store.errors import StoreError
from deltaserve_store.file_names import PEFT_CONFIG, SPARSE_CONFIG
from deltaserve_store.names import NAME

_STOPS = (AuthenticationFailed, EngineFailed, PermissionDenied, Unavailable)
"""Errors that the next folder would meet as well: they end the import, to be resumed later."""


class Outcome(StrEnum):
    ADDED = "added"
    UNCHANGED = "unchanged"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one folder. ``folder`` is relative to the imported directory ("." for itself).

    ``reasons`` explain a refusal, ``message`` tells it in one line. ``left_behind`` names files that were not sent.
    """

    folder: str
    name: str
    outcome: Outcome
    version: str | None = None
    effect: float | None = None
    message: str = ""
    reasons: tuple[Reason, ...] = ()
    warnings: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    seconds: float = 0.0


def find_adapter_folders(directory: Path) -> Iterator[Path]:
    """Folders with an adapter's config, in a stable order; what lies below one (checkpoints) is not searched.

    Links to folders are not followed. Raises ``InvalidRequest`` when ``directory`` is not a folder.
    """
    if not directory.is_dir():
        raise InvalidRequest(f"{directory.name!r} is not a folder.", param="directory")
    for parent, folders, files in os.walk(directory):
        folders.sort()
        if PEFT_CONFIG in files or SPARSE_CONFIG in files:
            folders.clear()
            yield Path(parent)


def name_of(folder: Path, directory: Path, prefix: str = "") -> str:
    """Adapter name for a folder: its path below ``directory`` joined by dots, other characters turned into dashes."""
    relative = folder.relative_to(directory)
    parts = relative.parts or (directory.resolve().name,)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", prefix + ".".join(parts))
    return name.lstrip("._-")


async def import_folders(
    directory: Path,
    door: FolderDoor,
    *,
    prefix: str = "",
    digest: Callable[[Path], str] = content_digest,
) -> AsyncIterator[Verdict]:
    """Take every adapter folder below ``directory`` through the door, one at a time, refusals included.

    Raises what would stop every further folder too: a failed or unreachable engine, a rejected key.
    """
    taken: dict[str, str] = {}
    for folder in find_adapter_folders(directory):
        began = time.monotonic()
        name, relative = name_of(folder, directory, prefix), str(folder.relative_to(directory))
        if refusal := _bad_name(name, taken.get(name)):
            yield Verdict(relative, name, Outcome.REFUSED, message=refusal)
            continue
        taken[name] = relative
        verdict = await _import_one(folder, Verdict(relative, name, Outcome.REFUSED), door, digest)
        yield replace(verdict, seconds=time.monotonic() - began)


async def _import_one(folder: Path, verdict: Verdict, door: FolderDoor, digest: Callable[[Path], str]) -> Verdict:
    files, left_behind = adapter_files(folder)
    verdict = replace(verdict, left_behind=left_behind)
    try:
        current = await door.current_version(verdict.name)
        if current is not None and current == await asyncio.to_thread(_digest_or_none, digest, folder):
            return replace(verdict, outcome=Outcome.UNCHANGED, version=current)
        admitted = await door.admit(files, verdict.name)
    except _STOPS:
        raise
    except DeltaserveError as error:
        return replace(verdict, message=error.message, reasons=error.reasons)
    return replace(
        verdict,
        outcome=Outcome.ADDED if admitted.created else Outcome.UNCHANGED,
        version=admitted.version,
        effect=admitted.effect,
        warnings=admitted.warnings,
    )


def _bad_name(name: str, taken_by: str | None) -> str | None:
    if NAME.fullmatch(name) is None:
        return (
            f"the folder's path gives the name {name[:80]!r}, which is not 1 to 64 characters long; rename the folder"
        )
    if taken_by is not None:
        return f"the name {name!r} is already that of the folder {taken_by!r}; rename one of them"
    return None


def _digest_or_none(digest: Callable[[Path], str], folder: Path) -> str | None:
    """A folder that cannot be digested goes to the door, which says why."""
    try:
        return digest(folder)
    except (OSError, StoreError):
        return None
