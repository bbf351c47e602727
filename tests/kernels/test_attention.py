"""paged_attention and write_kv against a per-query float64 oracle. Unused cache positions are NaN throughout."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import paged_attention, write_kv
from deltatest.kernel_cases import PagedCase, randn

# Weights sum to one and values have size one: fp32 noise, then one rounding of the result (2^-8 bf16, 2^-11 fp16).
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-5},
    torch.float16: {"rtol": 2**-11, "atol": 2e-5},
}
Q_LENS, KV_LENS = [1, 17, 30, 1, 0, 1, 64], [1, 17, 100, 33, 5, 16, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 20), (4, 1, 128), (4, 2, 8)])
def test_prefill_and_decode_mixed(heads, kv_heads, head_dim, dtype, backend):
    case = PagedCase(Q_LENS, KV_LENS, heads, kv_heads, head_dim, dtype)
    out = paged_attention(*case.args, scale=head_dim**-0.5, backend=backend)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, case.q.shape, True)
    torch.testing.assert_close(out.double(), case.expected(head_dim**-0.5), **TOLERANCE[dtype])


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (23, torch.bfloat16)])
def test_every_group_at_the_borders_of_blocks(group, head_dim, dtype, backend):
    """Kernels take several heads of a group at once; window, softcap and sinks cut into their tiles."""
    kv_lens = [1, 15, 16, 17, 31, 32, 33, 40]
    case = PagedCase([1, 1, 1, 1, 1, 1, 1, 20], kv_lens, 2 * group, 2, head_dim, dtype)
    options = {"window": 18, "softcap": 4.0, "sinks": randn(2 * group)}
    out = paged_attention(*case.args, scale=head_dim**-0.5, backend=backend, **options)
    torch.testing.assert_close(out.double(), case.expected(head_dim**-0.5, **options), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_has_the_same_bits_in_a_group_of_any_size(dtype, cpu_backend):
    case = PagedCase([1, 1, 20], [33, 16, 50], 9, 1, 40, dtype)
    together = paged_attention(*case.args, scale=0.2, backend=cpu_backend)
    for group in range(1, 9):
        fewer = paged_attention(case.q[:, :group].contiguous(), *case.args[1:], scale=0.2, backend=cpu_backend)
        assert torch.equal(fewer, together[:, :group]), f"{group} heads"


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_window(window, backend):
    """Positions that left the window of every query may be reused: NaN there must not leak either."""
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 32)
    expected = case.expected(0.2, window=window)
    for seq, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        for pos in range(max(0, kv_len - q_len - window + 1)):
            case.k_cache[case.block_tables[seq, pos // 16], :, pos % 16] = float("nan")
            case.v_cache[case.block_tables[seq, pos // 16], :, pos % 16] = float("nan")
    out = paged_attention(*case.args, scale=0.2, window=window, backend=backend)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, backend):
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 32)
    out = paged_attention(*case.args, scale=1.0, softcap=softcap, backend=backend)
    torch.testing.assert_close(out.double(), case.expected(1.0, softcap=softcap), **TOLERANCE[torch.float32])


def test_sinks_take_weight(backend):
    case = PagedCase(Q_LENS, KV_LENS, 4, 2, 32)
    sinks = torch.tensor([-2.0, 0.0, 3.0, 50.0])
    out = paged_attention(*case.args, scale=0.2, sinks=sinks, backend=backend)
    torch.testing.assert_close(out.double(), case.expected(0.2, sinks=sinks), **TOLERANCE[torch.float32])
    assert out[:, 3].abs().max() < 1e-6


def test_large_scores_neither_overflow_nor_vanish(backend):
    case = PagedCase([1, 40], [70, 40], 2, 1, 16)
    out = paged_attention(*case.args, scale=300.0, backend=backend)
    # fp32 scores near 5000 carry errors of 5e-4, which the softmax turns into relative errors of its weights.
    torch.testing.assert_close(out.double(), case.expected(300.0), rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_has_the_same_bits_alone_in_company_and_in_any_chunk(dtype, cpu_backend):
    """The definition promises less: see the next test."""
    case = PagedCase(Q_LENS, KV_LENS, 6, 2, 40, dtype)
    kwargs = {"scale": 0.2, "window": 50, "backend": cpu_backend}
    together = paged_attention(*case.args, **kwargs)
    for seq, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        start = int(case.cu_seqlens_q[seq])
        for i in range(0, q_len, 7):
            one = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([kv_len - q_len + i + 1], dtype=torch.int32))
            row = start + i
            alone = paged_attention(
                case.q[row : row + 1], case.k_cache, case.v_cache, case.block_tables[seq : seq + 1], *one, **kwargs
            )
            assert torch.equal(alone[0], together[row]), f"sequence {seq}, query {i}"


def test_a_sequence_has_the_same_bits_alone_and_in_company(any_backend):
    case = PagedCase(Q_LENS, KV_LENS, 6, 2, 40)
    together = paged_attention(*case.args, scale=0.2, backend=any_backend)
    for seq, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        start = int(case.cu_seqlens_q[seq])
        alone = paged_attention(
            case.q[start : start + q_len],
            case.k_cache,
            case.v_cache,
            case.block_tables[seq : seq + 1],
            torch.tensor([0, q_len], dtype=torch.int32),
            torch.tensor([kv_len], dtype=torch.int32),
            scale=0.2,
            backend=any_backend,
        )
        assert torch.equal(alone, together[start : start + q_len])


def test_threads_do_not_change_bits():
    case = PagedCase([1] * 6 + [90], [300] * 6 + [200], 9, 3, 64, torch.bfloat16)
    one = paged_attention(*case.args, scale=0.125)
    torch.set_num_threads(2)
    assert torch.equal(one, paged_attention(*case.args, scale=0.125))


def test_queries_may_be_a_slice_of_a_packed_projection(backend):
    case = PagedCase([3, 1], [20, 33], 4, 2, 16)
    packed = randn(4, 200)
    case.q = packed[:, 10:74].view(4, 4, 16)
    out = paged_attention(*case.args, scale=0.25, backend=backend)
    torch.testing.assert_close(out.double(), case.expected(0.25), **TOLERANCE[torch.float32])


def test_nan_in_a_seen_position_is_not_hidden(backend):
    case = PagedCase([1], [20], 2, 1, 16)
    case.k_cache[case.block_tables[0, 0], 0, 3, 0] = float("nan")
    assert paged_attention(*case.args, scale=0.25, backend=backend).isnan().all()


def test_no_sequences_at_all(any_backend):
    case = PagedCase([], [], 4, 2, 16)
    assert paged_attention(*case.args, scale=1.0, backend=any_backend).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda q: q[:, :3]),
        (0, lambda q: q[:, :, :8]),
        (0, lambda q: q.bfloat16()),
        (0, lambda q: q[:-1]),
        (0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2)),
        (1, lambda k: k[:, :1]),
        (1, lambda k: k[:, :, :8]),
        (2, lambda v: v.half()),
        (3, lambda t: t.long()),
        (3, lambda t: t[:1]),
        (3, lambda t: t[:, :1].contiguous()),
        (3, lambda t: torch.full_like(t, 10_000)),
        (3, lambda t: torch.full_like(t, -1)),
        (4, lambda c: c + 1),
        (4, lambda c: torch.tensor([0, 5, 4], dtype=torch.int32)),
        (4, lambda c: c[:-1]),
        (5, lambda n: n.long()),
        (5, lambda n: torch.tensor([2, 33], dtype=torch.int32)),
        (5, lambda n: torch.tensor([20, 100_000], dtype=torch.int32)),
        (5, lambda n: torch.tensor([20, -5], dtype=torch.int32)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(index, change, any_backend):
    case = PagedCase([3, 1], [20, 33], 4, 2, 16)
    args = list(case.args)
    args[index] = change(args[index])
    with pytest.raises(ValueError):
        paged_attention(*args, scale=1.0, backend=any_backend)


@pytest.mark.parametrize("options", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}, {"sinks": torch.zeros(3)}])
def test_options_out_of_range_are_refused(options, any_backend):
    case = PagedCase([1], [1], 4, 2, 16)
    with pytest.raises(ValueError):
        paged_attention(*case.args, scale=1.0, backend=any_backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_puts_rows_where_told_and_nowhere_else(dtype, any_backend):
    pool = torch.full((5, 2, 2, 3, 16, 20), float("nan"), dtype=dtype)
    packed = randn(4, 200, dtype=dtype)
    k, v = packed[:, :60].view(4, 3, 20), packed[:, 100:160].view(4, 3, 20)
    index = torch.tensor([0, 79, 33, 32])
    write_kv(k, v, pool[:, 1, 0], pool[:, 1, 1], index, backend=any_backend)
    expected = torch.full((5, 2, 2, 3, 16, 20), float("nan"), dtype=dtype)
    for row, place in enumerate(index.tolist()):
        expected[place // 16, 1, 0, :, place % 16], expected[place // 16, 1, 1, :, place % 16] = k[row], v[row]
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("k_shape", "index"),
    [((2, 3, 20), [0, 80]), ((2, 3, 20), [-1, 0]), ((2, 3, 20), [0]), ((2, 2, 20), [0, 1]), ((2, 3, 16), [0, 1])],
)
def test_write_kv_refuses_what_does_not_fit(k_shape, index, any_backend):
    cache = torch.zeros(5, 3, 16, 20)
    with pytest.raises(ValueError):
        write_kv(randn(*k_shape), randn(*k_shape), cache, cache.clone(), torch.tensor(index), backend=any_backend)
    assert not cache.any()
