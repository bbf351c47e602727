"""The digest of the operators' code: the same for the same files, another one for any change of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import deltaserve_kernels
from deltaserve_kernels.sources import digest_of, source_digest

PACKAGE = Path(deltaserve_kernels.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "elsewhere" / "renamed", ignore=ignored))


def test_where_files_lie_and_what_was_compiled_beside_them_do_not_matter(copy: Path) -> None:
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "reference.cpython-311.pyc").write_bytes(b"compiled")
    assert digest_of(copy) == source_digest()
    assert source_digest() is source_digest()  # read once


@pytest.mark.parametrize("name", ["reference.py", "cpu/ops.cpp", "cpu/vec.inc", "triton_ops/lora_kernels.py"])
def test_a_change_of_any_operator_is_seen(copy: Path, name: str) -> None:
    with (copy / name).open("a") as source:
        source.write("\n")
    assert digest_of(copy) != source_digest()


def test_files_that_come_go_or_swap_their_contents_are_seen(copy: Path) -> None:
    seen = {source_digest()}
    (copy / "cpu" / "new.inc").write_text("")
    seen.add(digest_of(copy))
    (copy / "cpu" / "new.inc").rename(copy / "triton_ops" / "new.inc")
    seen.add(digest_of(copy))
    (copy / "terms.py").unlink()
    seen.add(digest_of(copy))
    assert len(seen) == 4
