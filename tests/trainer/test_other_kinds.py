"""Kinds that only the server applies are refused by the trainer, not scored as if they were not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaserve_trainer.base import Base, load_model
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.methods import load_method
from deltatest.prefix_adapters import make_prefix
from deltatest.trainer_base import make_base


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    base = Base(make_base(tmp_path / "base"), "tiny/base", "ab" * 32)
    folder = make_prefix(load_model(base.folder), tmp_path / "adapter", name=kind)
    with pytest.raises(MergeRefused, match="the adapter has prefix"):
        load_method(load_model(base.folder), folder, base)
