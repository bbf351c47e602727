"""Base weights: what is read back is what was loaded, whatever layout multiplies it; groups answer every member."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from deltaserve.model import context, weight
from deltaserve.model.kv_cache import KVCache, KVLayout
from deltaserve.model.linear import BaseLinear
from deltaserve.model.packing import find_linears, pack
from deltaserve.model.weight import BaseWeight
from deltaserve_kernels import LoraTables, build_work_list

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_reordered", [True, False])
def test_weight_multiplies_and_reads_back(
    dtype: torch.dtype, is_reordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_reordered:
        monkeypatch.setattr(weight, "_prepack", lambda _: None)
    matrix = torch.randn(37, 50, dtype=dtype)
    held = BaseWeight(matrix)
    assert held.shape == (37, 50)
    assert torch.equal(held.plain(), matrix)
    bias = torch.randn(37, dtype=dtype)
    for count in (1, 3, 33):
        rows = torch.randn(count, 50, dtype=dtype)
        tolerance = {torch.float32: 1e-4}.get(dtype, 2e-1)
        assert torch.allclose(held.matmul(rows, bias), F.linear(rows, matrix, bias), atol=tolerance)
        assert torch.allclose(held.matmul(rows, None), F.linear(rows, matrix), atol=tolerance)
        for added in (bias, None):
            stream = 3 * torch.randn(count, 37, dtype=dtype)
            wanted = stream + F.linear(rows, matrix, added)
            assert held.matmul(rows, added, stream) is stream
            assert torch.allclose(stream, wanted, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_reordered", [True, False])
def test_one_product_without_and_with_a_residual_has_the_bits_of_two(
    dtype: torch.dtype, is_reordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_reordered:
        monkeypatch.setattr(weight, "_prepack", lambda _: None)
    held, tables, members = BaseWeight(torch.randn(48, 50, dtype=dtype)), LoraTables(1, 1), ((0, 0, 48),)
    tables.set(0, 0, torch.randn(4, 50, dtype=dtype), torch.randn(4, 48, dtype=dtype))
    rows, stream = torch.randn(7, 50, dtype=dtype), 3 * torch.randn(7, 48, dtype=dtype)
    work = build_work_list([((0, 1.0, 1.0),), ()] * 3 + [()])
    for bias in (torch.randn(48, dtype=dtype), None):
        alone, added = stream.clone(), stream.clone()
        wanted = held.matmul(rows, bias), held.matmul(rows, bias, alone)
        found = held.matmul_both(rows, bias, work, None, members, 0.5, added)
        assert found[1] is added
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        alone, added = stream.clone(), stream.clone()
        given = (rows, bias, work, tables, members, 0.5)
        wanted = held.matmul_lora(*given), held.matmul_lora(*given, alone)
        found = held.matmul_both(*given, added)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_tied_weight_stays_shared() -> None:
    matrix = torch.randn(8, 16)
    assert BaseWeight(matrix, keep=True).plain().data_ptr() == matrix.data_ptr()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 5), nn.Linear(16, 7, bias=False)
        self.c = Conv1D(9, 16)


def step_context() -> context.ForwardContext:
    empty = torch.empty(0, dtype=torch.int32)
    cache = KVCache(KVLayout(1, 1, 8, torch.float32), 1, "cpu")
    return context.ForwardContext(empty.long(), empty, empty, empty, empty.long(), cache)


def packed_layer() -> tuple[Layer, dict[str, BaseLinear], nn.ModuleDict]:
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer()])
    model = nn.ModuleDict({"layers": layers})
    names = tuple(find_linears("layers", layers))
    assert names == ("layers.0.a", "layers.0.b", "layers.0.c")
    original = Layer()
    original.load_state_dict(layers[0].state_dict())
    return original, pack(model, "layers", 1, [names]), model


def test_a_group_answers_each_member_once_and_recomputes_for_another_input() -> None:
    original, linears, _ = packed_layer()
    x, other = torch.randn(2, 3, 16), torch.randn(1, 4, 16)
    ctx = step_context()
    with torch.no_grad(), context.use(ctx):
        for rows in (x, other):
            for name in ("b", "a", "c"):
                found = linears[f"layers.0.{name}"](rows)
                assert torch.allclose(found, getattr(original, name)(rows), atol=1e-5)
        assert not ctx.pending
        linears["layers.0.a"](x)
        assert set(ctx.pending) == {1, 2}
        # A stale result of another input must not be handed out.
        assert torch.allclose(linears["layers.0.b"](other), original.b(other), atol=1e-5)


def test_members_keep_their_own_weights_bias_and_layout() -> None:
    original, linears, model = packed_layer()
    a, b, c = (linears[f"layers.0.{name}"] for name in "abc")
    assert model["layers"][0].c is c
    assert (a.transposed, b.transposed, c.transposed) == (False, False, True)
    assert torch.equal(a.weight, original.a.weight)
    assert torch.equal(c.rows(2, 4), original.c.weight.t()[2:4])
    assert torch.equal(a.bias, original.a.bias)
    assert b.bias is None
    x = torch.randn(3, 16)
    assert torch.allclose(c.matmul(x), original.c(x), atol=1e-5)
