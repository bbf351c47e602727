"""What opening a store does after whatever ended the last process: folders and rows are brought into agreement."""

from __future__ import annotations

from deltaserve_store.catalog import Catalog
from deltaserve_store.database import Database
from deltaserve_store.version_folders import VersionFolders


def reconcile(folders: VersionFolders, database: Database, catalog: Catalog) -> tuple[str, ...]:
    """Sweeps unfinished work, moves folders without a row to quarantine, marks versions whose files are missing or cut
    short as failed (and mended ones as stored). Returns a line for each thing done; empty after a clean end.
    """
    report: list[str] = []
    if count := folders.sweep_scratch():
        report.append(f"swept {count} unfinished uploads")
    known = catalog.versions()
    for name in list(folders.names_on_disk()):
        if name not in known:
            folders.quarantine(folders.root / "versions" / name)
            report.append(f"quarantined {name[:64]!a}: no name was ever given to it")
    with database.transaction() as connection:
        for version, (state, _) in known.items():
            # A quick look cannot tell that a damaged file was mended; what failed before is read back.
            faults = folders.verify(version) if state == "failed" else folders.faults(version)
            if faults:
                reason = f"{faults[0].code}: {faults[0].where}"
                catalog.mark(connection, version, "failed", reason)
                report.append(f"version {version[:12]} cannot be served: {reason}")
            elif state == "failed":
                catalog.mark(connection, version, "stored", None)
    folders.sweep_derived(known)
    return tuple(report)
