"""Small files that ask for much are refused from their shapes, before anything is made of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import conversion_cost, read_adapter
from deltaserve_store.formats.peft_kinds.low_rank import DEFAULT_LIMITS, ConversionLimits
from deltaserve_store.formats.peft_kinds.positions import Positions
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.reason_codes import REASON_CODES
from deltaserve_store.spec import LinearSpec
from deltatest.adapter_corpus import CONFIG, GOOD, corpus_base, edit_config, edit_tensors
from deltatest.cost_corpus import COST_CORPUS, CostCase
from deltatest.kind_corpus import CONFIGS, GOOD_KINDS, V0, V0_TENSOR
from deltatest.largest import Largest

SMALL_FILE = 64 << 20


@pytest.mark.parametrize("case", COST_CORPUS, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused_before_anything_is_made(case: CostCase, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in folder.iterdir()) < SMALL_FILE, "the case shows less than it says"
    before = time.monotonic()
    with Largest() as largest, pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, case.base)
    assert time.monotonic() - before < 5.0
    assert largest.numel <= 1 << 20
    assert "conversion_too_large" in REASON_CODES
    (reason,) = raised.value.reasons
    assert (reason.code, reason.where) == ("conversion_too_large", case.where)
    assert case.found in reason.found
    assert "at most" in reason.allowed
    assert case.way_out in reason.allowed
    assert "plain LoRA" not in reason.allowed, "PEFT cannot save every kind as one"


def _terms_bytes(kind: str, folder: Path, limits: ConversionLimits) -> int:
    """What the terms that were made take, by the limits' own size of a number."""
    parsed = read_adapter(folder, corpus_base(), limits)
    weights = {name: torch.randn(x.out_features, x.in_features) for name, x in corpus_base().linears.items()}
    total = 0
    for delta in parsed.on_base(lambda name: weights[name]).deltas:
        if isinstance(delta, LoraDelta):
            total += limits.itemsize * (delta.a.numel() + delta.b.numel())
        elif isinstance(delta, SparseDelta) and kind != "supertuning":
            total += (limits.itemsize + 4) * delta.num_entries
    return total


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_told_is_what_is_made(kind: str, tmp_path: Path) -> None:
    """At the bytes that its terms take every kind gets in, and at fewer none does that has any."""
    folder = GOOD_KINDS[kind](tmp_path / "adapter")
    limits = replace(DEFAULT_LIMITS, itemsize=4)
    made = _terms_bytes(kind, folder, limits)
    if not made:
        read_adapter(folder, corpus_base(), replace(limits, max_bytes=0))
        return
    room = made if kind != "waveft" else 8 * 4 * 5 * 4  # of patches that overlap less is made
    read_adapter(folder, corpus_base(), replace(limits, max_bytes=room))
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base(), replace(limits, max_bytes=made - 1))
    (reason,) = raised.value.reasons
    assert (reason.code, reason.where) == ("conversion_too_large", CONFIG)
    assert f"{made if kind != 'waveft' else room} bytes" in reason.found
    assert f"{made - 1} bytes" in reason.allowed


@pytest.mark.parametrize("kind", ["frod", "psoft", "hira", "c3a", "loha", "fourierft", "miss"])
def test_work_is_counted_where_there_is_some(kind: str, tmp_path: Path) -> None:
    folder = GOOD_KINDS[kind](tmp_path / "adapter")
    lossy = ConversionLimits(exact_rank=2, rank=2, max_flops=1.0)
    if kind == "miss":  # its factors are as the file says, whatever the limits
        read_adapter(folder, corpus_base(), lossy)
        return
    if kind not in ("frod", "psoft"):
        read_adapter(folder, corpus_base(), ConversionLimits(max_flops=1.0))  # exact: nothing is decomposed
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base(), lossy)
    assert [reason.code for reason in raised.value.reasons] == ["conversion_too_large"]
    read_adapter(folder, corpus_base(), replace(lossy, max_flops=1e9))


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_the_work_of_a_lora_has_the_same_limit(options: dict[str, Any], tmp_path: Path) -> None:
    folder = GOOD["lora"](tmp_path / "adapter")
    edit_config(**options)(folder)
    read_adapter(folder, corpus_base(), ConversionLimits(max_flops=1e9))
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base(), ConversionLimits(max_flops=1.0))
    (reason,) = raised.value.reasons
    assert (reason.code, reason.where) == ("conversion_too_large", f"{CONFIG}:r")
    assert "path_initial_model_for_weight_conversion" in reason.allowed


@pytest.mark.parametrize("kind", ["hira", "frod", "c3a", "randlora", "glora", "loha", "fourierft"])
def test_a_term_that_is_cut_gets_smaller_by_the_rank_of_the_server(kind: str, tmp_path: Path) -> None:
    """The rank of the file decides nothing there, and where the term is exact that of the server does not."""
    folder = GOOD_KINDS[kind](tmp_path / "adapter")

    def refused(limits: ConversionLimits) -> tuple[int, str]:
        """The bytes found, and what is allowed."""
        with pytest.raises(AdapterInvalid) as raised:
            read_adapter(folder, corpus_base(), limits)
        (reason,) = raised.value.reasons
        assert reason.code == "conversion_too_large"
        return int(reason.found.split()[2]), reason.allowed

    cut = ConversionLimits(exact_rank=2, rank=2, max_bytes=1)
    needed, allowed = refused(cut)
    assert "a smaller --conversion-rank" in allowed
    assert "train a smaller rank" not in allowed
    smaller, _ = refused(replace(cut, rank=1))
    assert smaller < needed
    read_adapter(folder, corpus_base(), replace(cut, rank=1, max_bytes=smaller))
    whole, allowed = refused(ConversionLimits(max_bytes=1))
    assert refused(ConversionLimits(rank=1, max_bytes=1))[0] == whole
    assert "--conversion-rank" not in allowed
    assert "train a smaller rank or fewer coefficients" in allowed
    assert "--adapter-host-bytes" in allowed


def test_counts_grow_with_what_they_count() -> None:
    linear = LinearSpec("x", 4_096, 4_096)
    assert DEFAULT_LIMITS.flops(linear, 1024) == 0.0
    small, large = (replace(DEFAULT_LIMITS, rank=rank).flops(linear, 4_096) for rank in (16, 512))
    assert 0 < small < large < conversion_cost.svd_flops(4_096, 4_096)
    every_linear = 32 * (4 * conversion_cost.svd_flops(4_096, 4_096) + 3 * conversion_cost.svd_flops(11_008, 4_096))
    assert every_linear < conversion_cost.MAX_FLOPS, "PiSSA of a base of 7 billion weights is served"
    wide = 64 * (2 * conversion_cost.svd_flops(5_120, 5_120) + 2 * conversion_cost.svd_flops(1_024, 5_120))
    wide += 64 * 3 * conversion_cost.svd_flops(27_648, 5_120)
    assert 0.8 * conversion_cost.MAX_FLOPS < wide < conversion_cost.MAX_FLOPS, "a base of 32 billion weights"


def test_linears_of_one_size_share_a_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of coefficients for each linear made as many permutations of the whole matrix."""
    folder = GOOD_KINDS["fourierft"](tmp_path / "adapter")
    edit_config(n_frequency_pattern={V0: 2})(folder)
    edit_tensors({f"{V0_TENSOR}.fourierft_spectrum": torch.ones(2)})(folder)
    drawn: list[int] = []
    draw: Any = torch.randperm

    def counting(size: int, **options: Any) -> Any:
        drawn.append(size)
        return draw(size, **options)

    monkeypatch.setattr(torch, "randperm", counting)
    read_adapter(folder, corpus_base())
    assert sorted(drawn) == [8 * 16, 16 * 16, 5000], "one for each size, and the generator's own test"


def test_positions_are_those_of_a_permutation_of_each_linears_own() -> None:
    linears = (LinearSpec("a", 8, 6), LinearSpec("b", 6, 8), LinearSpec("c", 8, 6), LinearSpec("d", 4, 4))
    counts = {"a": 5, "b": 40, "c": 11, "d": 16}
    positions = Positions(7, linears, counts)
    for linear in linears:
        size = linear.out_features * linear.in_features
        wanted = torch.randperm(size, generator=torch.Generator().manual_seed(7))[: counts[linear.name]]
        rows, cols = positions.of(linear, counts[linear.name])
        assert torch.equal(rows * linear.in_features + cols, wanted)
