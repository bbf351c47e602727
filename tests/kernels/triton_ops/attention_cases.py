"""Paged attention and write_kv in Triton's interpreter; see test_interpreter.py. Unused cache positions are NaN."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import KernelError, paged_attention, write_kv
from deltaserve_kernels.triton_ops import attention, attention_kernels, guard
from deltatest.kernel_cases import PagedCase, randn

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 1e-5},
    # Prefill's weights are rounded to 16 bits before they meet the values: 2^-11 of values up to 3.
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
}
# Decode rows of one segment, of several, of more than fit evenly; prefill from the start and in chunks; no queries.
Q_LENS, KV_LENS = [1, 1, 17, 20, 1, 0, 3, 1], [1, 130, 17, 45, 33, 5, 3, 64]
FORM = attention.AttentionForm(segments=4, min_segment=32)


def run(case: PagedCase, **kwargs) -> torch.Tensor:
    return attention.paged_attention(*case.args, form=FORM, **kwargs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (9, 3, 64, torch.float32),
        (2, 2, 20, torch.float32),
        (20, 1, 16, torch.float32),
        (9, 3, 16, torch.float16),
        (4, 2, 8, torch.float16),
    ],
)
def test_prefill_and_decode_mixed(heads, kv_heads, head_dim, dtype):
    """Groups of 3, 1, 20 (two tiles of heads), 3 and 2 heads."""
    case = PagedCase(Q_LENS, KV_LENS, heads, kv_heads, head_dim, dtype)
    out = run(case, scale=head_dim**-0.5)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, case.q.shape, True)
    torch.testing.assert_close(out.double(), case.expected(head_dim**-0.5), **TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 5, 40])
def test_window(window):
    """What left the window of every query is NaN: pages may have been given away."""
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 16)
    expected = case.expected(0.2, window=window)
    for seq, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        for pos in range(max(0, kv_len - q_len - window + 1)):
            case.k_cache[case.block_tables[seq, pos // 16], :, pos % 16] = float("nan")
            case.v_cache[case.block_tables[seq, pos // 16], :, pos % 16] = float("nan")
    torch.testing.assert_close(run(case, scale=0.2, window=window).double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 16)
    out = run(case, scale=1.0, softcap=softcap)
    torch.testing.assert_close(out.double(), case.expected(1.0, softcap=softcap), **TOLERANCE[torch.float32])


def test_softcap_of_huge_scores_is_finite():
    case = PagedCase([1, 4], [40, 4], 2, 1, 16)
    out = run(case, scale=300.0, softcap=2.0)
    torch.testing.assert_close(out.double(), case.expected(300.0, softcap=2.0), rtol=0.0, atol=1e-4)


def test_sinks_take_weight():
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 16)
    sinks = torch.tensor([-2.0, 0.0, 3.0, 50.0])
    out = run(case, scale=0.2, sinks=sinks)
    torch.testing.assert_close(out.double(), case.expected(0.2, sinks=sinks), **TOLERANCE[torch.float32])
    assert out[:, 3].abs().max() < 1e-6


def test_large_scores_neither_overflow_nor_vanish():
    case = PagedCase([1, 20], [70, 20], 2, 1, 16)
    # fp32 scores near 5000 carry errors of 5e-4, which the softmax turns into relative errors of its weights.
    torch.testing.assert_close(run(case, scale=300.0).double(), case.expected(300.0), rtol=0.0, atol=5e-3)


def test_a_sequence_has_the_same_bits_alone_and_in_company():
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 16)
    together = run(case, scale=0.2, window=50)
    for seq in (1, 3):
        start, stop = case.cu_seqlens_q[seq : seq + 2].tolist()
        alone = attention.paged_attention(
            case.q[start:stop], case.k_cache, case.v_cache, case.block_tables[seq : seq + 1],
            torch.tensor([0, stop - start], dtype=torch.int32), case.kv_lens_tensor[seq : seq + 1],
            scale=0.2, window=50, form=FORM,
        )  # fmt: skip
        assert torch.equal(alone, together[start:stop])


def test_no_rows_and_a_strided_query():
    case = PagedCase([0, 0], [5, 0], 2, 1, 16)
    assert run(case, scale=1.0).shape == (0, 2, 16)
    case = PagedCase([1, 5], [20, 5], 4, 2, 16)
    wide = torch.full((6, 7, 32), float("nan"))
    wide[:, 1:5, 8:24] = case.q
    expected = case.expected(0.2)
    case.q = wide[:, 1:5, 8:24]
    torch.testing.assert_close(run(case, scale=0.2).double(), expected, **TOLERANCE[torch.float32])


def test_the_operator_reaches_the_kernels_by_name():
    case = PagedCase([1, 5], [20, 5], 4, 2, 16)
    out = paged_attention(*case.args, scale=0.2, backend="triton")
    torch.testing.assert_close(out.double(), case.expected(0.2), **TOLERANCE[torch.float32])
    with pytest.raises(KernelError, match="window 0"):
        paged_attention(*case.args, scale=0.2, window=0, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "kv_heads", "head_dim"), [(0, 2, 8), (1, 3, 20), (63, 1, 64)])
def test_write_kv_stores_those_positions_and_no_other(num_rows, kv_heads, head_dim, dtype):
    pool = torch.full((6, 2, 2, kv_heads, 16, head_dim), float("nan"), dtype=dtype)
    expected = pool.clone()
    qkv = randn(num_rows, 3, kv_heads, head_dim, dtype=dtype)
    k, v = qkv[:, 1], qkv[:, 2]
    index = torch.randperm(6 * 16, generator=torch.Generator().manual_seed(5))[:num_rows]
    write_kv(k, v, pool[:, 0, 1], pool[:, 1, 0], index, backend="triton")
    expected[index // 16, 0, 1, :, index % 16] = k
    expected[index // 16, 1, 0, :, index % 16] = v
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(pool.view(bits), expected.view(bits))


def test_one_query_each_spares_a_launch_and_nothing_else(monkeypatch):
    case = PagedCase([1] * 4, [1, 130, 33, 64], 4, 2, 16)
    expected = run(case, scale=0.2, window=50)
    monkeypatch.setattr(attention_kernels, "prefill", None)
    assert torch.equal(run(case, scale=0.2, window=50, one_query=True), expected)
    assert torch.equal(
        paged_attention(*case.args, scale=0.2, one_query=True, backend="reference"),
        paged_attention(*case.args, scale=0.2, backend="reference"),
    )


def test_wide_tables_may_hold_anything_past_a_sequences_blocks(monkeypatch):
    """A captured step's tables are as wide as the longest sequence may become, and keep what was there before."""
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    case = PagedCase([1, 1, 3], [1, 130, 33], 4, 2, 16)
    expected = run(case, scale=0.2)
    wide = torch.full((3, 64), 10**8, dtype=torch.int32)
    for seq, length in enumerate(case.kv_lens):
        count = -(-length // 16)
        wide[seq, :count] = case.block_tables[seq, :count]
    case.block_tables = wide
    assert torch.equal(run(case, scale=0.2), expected)
