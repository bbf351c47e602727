"""Kinds that only the server applies are refused by the trainer, not measured as if they were not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaserve_store.errors import AdapterInvalid
from deltaserve_trainer.base import Base, load_model
from deltaserve_trainer.methods import load_method
from deltatest.peft_adapters import make_peft_ia3
from deltatest.prefix_adapters import make_prefix
from deltatest.trainer_base import make_base


@pytest.mark.parametrize("kind", ["prefix", "prompt", "ia3"])
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    base = Base(make_base(tmp_path / "base"), "tiny/base", "ab" * 32)
    make = make_peft_ia3 if kind == "ia3" else make_prefix
    folder = make(load_model(base.folder), tmp_path / "adapter", **({} if kind == "ia3" else {"name": kind}))
    with pytest.raises(AdapterInvalid) as refused:
        load_method(load_model(base.folder), folder, base)
    (reason,) = refused.value.reasons
    assert reason.code == "unsupported_kind"
    assert kind in reason.found
