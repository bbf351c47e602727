"""The embedded base model: a small checkpoint that speaks, the data it was made from, and the demo adapters.

Importing this package is cheap: paths only, no torch.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

NAME = "tinybase"
"""The embedded base's name: in requests, and in the files of adapters trained on it."""

CHECKPOINT: Path = _HERE / "checkpoint"
"""Hugging Face checkpoint folder of the embedded base."""

DEMO_DATA: Path = _HERE / "data"
"""Fine-tuning data (`shout`, `json`, `pirate`; `.jsonl` and `.eval.jsonl`), `general.eval.jsonl`, `prompts.json`."""

DEMO_ADAPTERS: Path = _HERE / "adapters"
"""One folder per demo adapter, in the file formats that the server accepts."""
