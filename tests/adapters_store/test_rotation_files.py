"""Files of rotations on bases that PEFT has no layers for, and the page that tells of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltatest.adapter_corpus import CONFIG, corpus_base, edit_config
from deltatest.kind_corpus import GOOD_KINDS


@pytest.mark.parametrize("kind", ["oft", "road", "boft", "beft"])
def test_linears_that_are_stored_turned_are_refused(kind: str, tmp_path: Path) -> None:
    """PEFT has none of these types for Conv1D: such a file was not made on this base."""
    base = corpus_base()
    turned = replace(base, linears={name: replace(one, transposed=True) for name, one in base.linears.items()})
    folder = GOOD_KINDS[kind](tmp_path / "adapter")
    if kind in ("oft", "boft"):
        edit_config(fan_in_fan_out=True)(folder)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, turned)
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == {("unsupported_target", f"{CONFIG}:target_modules")}
