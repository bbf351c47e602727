"""The directory of one run.

recipe.json  run.json  data.json       what was asked, of which base and data, what the data look like
metrics.jsonl                          one line a step; evaluations carry eval_loss and general_loss
checkpoints/step-N/                    resumable state, the two newest
best/  last/                           adapter folders; only files that the store accepts
loss.png  evaluation.json  parity.json
manifest.json                          SHA-256 of every file above but the checkpoints; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaserve_trainer.errors import ResumeRefused

MANIFEST_FORMAT = "deltaserve-run/1"


class RunFolder:
    """Paths and the few rules of writing: JSON is replaced atomically, metrics are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best, self.last = path / "best", path / "last"
        self.plot = path / "loss.png"
        self._metrics = path / "metrics.jsonl"

    def open(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Start or continue a run. ``identity`` (recipe, base, data digests) must equal that of the first start."""
        known = self.read("run.json")
        if known is None:
            if self.path.exists() and any(self.path.iterdir()):
                raise ResumeRefused(f"{self.path.name} holds other files; give an empty or a new run directory")
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("run.json", identity)
            return
        if not resume:
            raise ResumeRefused(f"{self.path.name} holds a run; continue it with --resume or give another directory")
        changed = [key for key in identity if known.get(key) != json.loads(json.dumps(identity[key]))]
        if changed:
            raise ResumeRefused(
                f"{', '.join(changed)} changed since the run in {self.path.name} was started; "
                "resume with the same recipe, base and data, or give another directory"
            )

    @property
    def is_finished(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def read(self, name: str) -> Any:
        """Parsed JSON file, or None when it does not exist."""
        path = self.path / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        os.replace(partial, self.path / name)

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines, in order."""
        if not self._metrics.is_file():
            return []
        lines = self._metrics.read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def keep_metrics_until(self, step: int) -> None:
        """Drop what was measured after the checkpoint of ``step``: those steps are done again."""
        kept = [row for row in self.metrics() if row["step"] <= step] if step else []
        partial = self._metrics.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        os.replace(partial, self._metrics)

    def write_manifest(self) -> None:
        files = {
            str(path.relative_to(self.path)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and self.checkpoints not in path.parents and path.name != "manifest.json"
        }
        self.write("manifest.json", {"format": MANIFEST_FORMAT, "files": files})
