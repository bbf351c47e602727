"""Everything that is measured computes the right thing, on the host in fp32, and what does not is found out."""

from __future__ import annotations

import pytest
import torch

from deltabench import implementations, points, sparse_implementations
from deltabench.cases import AddDelta, Case, LoraCase, SparseCase
from deltabench.floors import FusedLinear, Rates
from deltabench.implementations import Implementation, NotPresent
from deltabench.journal import Budget, Journal, read
from deltabench.kernel_section import KernelSection, check, fitting
from deltabench.points import DRY, Point

HOST = torch.device("cpu")
QKV = FusedLinear("qkv", 48, (32, 16, 16))
MIXED = Point("mixed", 7, 3, (1, 8, 16), 5)
ONE = Point("one", 1, 1, (8,))
LORA = [one for one in implementations.BASELINES if one.name != "torch grouped_mm"]


@pytest.mark.parametrize("one", LORA, ids=lambda one: one.name)
@pytest.mark.parametrize("point", [MIXED, ONE], ids=lambda point: point.name)
def test_low_rank_baselines_equal_float64(one: Implementation, point: Point) -> None:
    torch.manual_seed(0)
    case = LoraCase(QKV, point, 2, torch.float32, HOST)
    error, allowed = check(case, one, one.prepare(case))
    assert error <= allowed


@pytest.mark.parametrize("one", sparse_implementations.BASELINES, ids=lambda one: one.name)
def test_sparse_baselines_equal_float64(one: Implementation) -> None:
    torch.manual_seed(0)
    case = SparseCase(QKV, Point("sparse", 7, 3, (0,), 5), 2, torch.float32, HOST, 0.1)
    error, allowed = check(case, one, one.prepare(case))
    assert error <= allowed


def test_the_oracle_of_cases_equals_one_row_at_a_time() -> None:
    case = LoraCase(QKV, MIXED, 1, torch.float32, HOST)
    y = torch.randn(7, 64)
    wanted = y.double()
    for row in range(7):
        slot = int(case.owner[row])
        for linear, start, stop in case.members[0]:
            a, b_t = case.tables.get(linear, slot) or ()
            assert a.shape[0] == MIXED.ranks[slot]
            wanted[row, start:stop] += case.x[row].double() @ a.double().t() @ b_t.double()
    torch.testing.assert_close(case.expected(y), wanted)


def test_sparse_oracle_equals_the_definition() -> None:
    from deltaserve_kernels import reference

    case = SparseCase(QKV, Point("sparse", 6, 3, (0,), 4), 2, torch.float32, HOST, 0.1)
    y = torch.randn(6, 64)
    wanted = y.clone()
    reference.sparse_linear(wanted, case.x, case.work, case.tables, case.members[0], 0.0)
    torch.testing.assert_close(case.expected(y).float(), wanted, rtol=1e-4, atol=1e-4)
    assert case.num_nonzeros == 4 * sum(round(48 * width * 0.1) for width in QKV.widths)


def test_copied_deltas_share_no_memory() -> None:
    case = SparseCase(QKV, Point("sparse", 6, 3, (0,), 6), 2, torch.float32, HOST, 0.1)
    entries = [entry for layer in case.csr for member in layer for entry in member]
    tensors = [tensor for entry in entries for tensor in (*entry[:3], *(entry.jagged.tensors if entry.jagged else ()))]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == 8 * 36


def wrong_slot(case: LoraCase) -> AddDelta:
    """Adds the next adapter's terms."""

    def run(layer: int, y: torch.Tensor) -> None:
        for (start, stop), a, b_t in zip(case.columns, case.a[layer], case.b_t[layer], strict=True):
            for adapter, rows in enumerate(case.groups):
                other = (adapter + 1) % case.point.adapters
                y[rows, start:stop] += case.x[rows] @ a[other].t() @ b_t[other]

    return run


def does_nothing(case: Case) -> AddDelta:
    return lambda layer, y: None


def breaks(case: Case) -> AddDelta:
    def run(layer: int, y: torch.Tensor) -> None:
        raise RuntimeError("no such kernel")

    return run


def is_absent(case: Case) -> AddDelta:
    raise NotPresent("no such file")


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_section_tells_right_wrong_failed_and_absent_apart(kind, tmp_path, monkeypatch) -> None:
    good = implementations.BASELINES[1] if kind == "lora" else sparse_implementations.BASELINES[0]
    bad = wrong_slot if kind == "lora" else does_nothing
    ours = (
        Implementation("bad", "ours", bad),
        Implementation("broken", "ours", breaks),
        Implementation("absent", "vendor", is_absent),
    )
    module = implementations if kind == "lora" else sparse_implementations
    monkeypatch.setattr(module, "OURS", ours)
    monkeypatch.setattr(module, "BASELINES", (good,))
    journal = Journal(tmp_path / "journal")
    section = KernelSection(DRY, HOST, torch.float32, Rates(1e10, 1e10), journal, Budget(60), ["o"])
    monkeypatch.setattr(section, "_once", lambda *_: None)
    getattr(section, kind)()
    found = {e["implementation"]: e for e in read(journal.path) if e["kind"] == kind and e["origin"] != "vendor"}
    assert {name: entry["status"] for name, entry in found.items()} == {
        "bad": "wrong",
        "broken": "failed",
        good.name: "ok",
    }
    assert "no such kernel" in found["broken"]["reason"]
    assert "added_us" not in found["bad"]
    ok = found[good.name]
    assert ok["added_us"] == pytest.approx(ok["total_us"] - ok["base_us"])
    assert ok["over_floor"] == pytest.approx(ok["added_us"] / ok["floor_us"])


def test_a_section_without_time_names_what_it_left_out(tmp_path) -> None:
    journal = Journal(tmp_path / "journal")
    section = KernelSection(DRY, HOST, torch.float32, Rates(1e10, 1e10), journal, Budget(0))
    section.lora()
    section.sparse()
    entries = read(journal.path)
    assert entries
    assert {entry["status"] for entry in entries} == {"skipped"}
    named = {(entry["point"], entry["group"]) for entry in entries if entry["kind"] == "lora"}
    assert named == {(point.name, group.name) for point in DRY.lora for group in DRY.shape.groups}


def test_what_is_done_is_not_done_again(tmp_path) -> None:
    path = tmp_path / "journal"
    section = KernelSection(DRY, HOST, torch.float32, Rates(1e10, 1e10), Journal(path), Budget(0), ["o"])
    section.sparse()
    before = len(read(path))
    again = KernelSection(DRY, HOST, torch.float32, Rates(1e10, 1e10), Journal(path), Budget(60), ["o"])
    again.sparse()
    assert len(read(path)) == before


def test_forms_are_measured_where_they_belong() -> None:
    known = (*implementations.OURS, *implementations.BASELINES)
    decode = {one.name for one in fitting(known, points.DECODE_POINTS[0])}
    prefill = {one.name for one in fitting(known, points.PREFILL_POINT)}
    assert {"two launches", "one launch", "all slots GEMM", "merge and GEMM"} <= decode
    assert "prefill form" not in decode
    assert {"prefill form", "torch grouped_mm", "adapter loop"} <= prefill
    assert not prefill & {"two launches", "one launch", "all slots GEMM"}


def test_the_full_plan_has_every_point_of_the_goals() -> None:
    names = {point.name for point in points.FULL.lora}
    assert names >= {"(1,1,16)", "(16,16,16)", "(64,64,16)", "(64,64,64)", "(256,32,16)", "(256,256,16)"}
    assert names >= {points.MIXED.name, points.EQUAL_BYTES.name, points.FEW_ACTIVE.name, points.PREFILL_POINT.name}
    steps = {point.name for point in points.FULL.step}
    assert steps == {"(1,1,16)", "(16,16,16)", "(64,64,16)", "(64,64,64)", "(256,32,16)"}
    assert {point.name for point in points.FULL.sparse} >= {"(64,64,0)", "(256,256,0)"}
    assert points.FULL.density == 0.005
    assert points.FULL.rounds >= 20
    total = sum(points.MIXED.all_ranks)
    assert total == sum(points.EQUAL_BYTES.all_ranks)
    assert (points.FEW_ACTIVE.adapters, points.FEW_ACTIVE.num_slots) == (8, 64)
