"""Paged attention: decode split over the positions of a sequence, prefill by tiles of queries, and the KV write.

A tile is TILE_QUERIES queries of TILE_HEADS heads that share a kv head. Which form a query takes is told by its own
sequence's number of queries (one: decode), and how a sequence is split by its own length: no row's result depends on
what shares the step. Tiles stay below 64 rows, where products are warp-level: the weights come from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import dot_wide

PAGE = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)

# See lora_programs.VARYING. Strides are specialised: they are what a model's cache is made of.
VARYING = ["block_tables", "table_stride", "cu_seqlens_q", "kv_lens", "num_seqs", "scale", "softcap", "window"]


@triton.jit
def reach(first_pos, last_pos, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Positions [low, high) that queries at first_pos..last_pos see, and where their first block of keys begins."""
    low = first_pos * 0
    if HAS_WINDOW:
        low = tl.maximum(first_pos - window + 1, 0)
    return low, last_pos + 1, low // BLOCK_N * BLOCK_N


@triton.jit
def segment_length(begin, high, SEGMENTS: tl.constexpr, MIN_SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions a segment of a decode row takes: at most SEGMENTS segments, whole blocks, not too short."""
    return tl.maximum(tl.cdiv(tl.cdiv(high - begin, SEGMENTS), BLOCK_N) * BLOCK_N, MIN_SEGMENT)


@triton.jit
def attend_tile(
    q_tile, m, total, acc, position, k_cache, v_cache, table, kv_head,
    k_page, k_head, k_slot, v_page, v_head, v_slot, begin, end, low, high, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Running softmax (maximum ``m`` in units of log2, sum ``total``, values ``acc``) over positions [begin, end)."""
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # What no query of the tile sees is not read: it may be stale, even NaN, and 0 * NaN would leak.
        known = (n >= low) & (n < high) & (n < end)
        page = tl.load(table + n // PAGE, mask=known, other=0).to(tl.int64)
        mask = known[:, None] & (d < D)[None, :]
        k_rows = k_cache + page * k_page + kv_head * k_head + (n % PAGE) * k_slot
        keys = tl.load(k_rows[:, None] + d[None, :], mask=mask, other=0.0)
        v_rows = v_cache + page * v_page + kv_head * v_head + (n % PAGE) * v_slot
        values = tl.load(v_rows[:, None] + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q_tile, tl.trans(keys), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(z) = 2 / (1 + exp(-2 z)) - 1, right at both infinities.
            scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * LOG2E / softcap))) - 1.0)
        seen = known[None, :] & (n[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A query that has seen nothing yet: keep -inf - -inf out.
        reference = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(m - reference)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if PRECISE:
            acc = dot_wide(weights, values, acc)
        else:
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        m = m_new
    return m, total, acc


@triton.jit(do_not_specialize=VARYING)
def prefill(
    out, q, k_cache, v_cache, block_tables, table_stride, cu_seqlens_q, kv_lens, sinks, num_seqs,
    out_row, q_row, q_head, k_page, k_head, k_slot, v_page, v_head, v_slot, scale, softcap, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_HEADS: tl.constexpr, TILE_QUERIES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (T // TILE_QUERIES + sequences, kv heads, head tiles): enough tiles for any cut of T rows into sequences.

    Sequence s owns tiles from ``cu_seqlens_q[s] // TILE_QUERIES + s`` on; those past its queries leave at once.
    """
    pid = tl.program_id(0)
    seq = pid * 0
    above = num_seqs
    while above - seq > 1:
        middle = (seq + above) // 2
        if tl.load(cu_seqlens_q + middle) // TILE_QUERIES + middle <= pid:
            seq = middle
        else:
            above = middle
    start = tl.load(cu_seqlens_q + seq)
    q_len = tl.load(cu_seqlens_q + seq + 1) - start
    first = (pid - start // TILE_QUERIES - seq) * TILE_QUERIES
    if (q_len > 1) & (first < q_len):
        kv_head = tl.program_id(1)
        m_index = tl.arange(0, TILE_QUERIES * TILE_HEADS)
        query = first + m_index // TILE_HEADS
        in_group = tl.program_id(2) * TILE_HEADS + m_index % TILE_HEADS
        live = (query < q_len) & (in_group < GROUP)
        head = kv_head * GROUP + in_group
        position = tl.load(kv_lens + seq) - q_len + query
        d = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < D)[None, :]
        row = (start + query).to(tl.int64)
        q_tile = tl.load(q + row[:, None] * q_row + head[:, None] * q_head + d[None, :], mask=mask, other=0.0)
        m = tl.full((TILE_QUERIES * TILE_HEADS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((TILE_QUERIES * TILE_HEADS,), dtype=tl.float32)
        if HAS_SINKS:
            m = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
            total += 1.0
        first_pos = tl.load(kv_lens + seq) - q_len + first
        last_pos = tl.load(kv_lens + seq) - q_len + tl.minimum(first + TILE_QUERIES, q_len) - 1
        low, high, begin = reach(first_pos, last_pos, window, BLOCK_N, HAS_WINDOW)
        m, total, acc = attend_tile(
            q_tile, m, total, tl.zeros((TILE_QUERIES * TILE_HEADS, BLOCK_D), dtype=tl.float32), position,
            k_cache, v_cache, block_tables + seq.to(tl.int64) * table_stride, kv_head,
            k_page, k_head, k_slot, v_page, v_head, v_slot, begin, high, low, high, scale, softcap, window,
            D, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, False,
        )  # fmt: skip
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(
            out + row[:, None] * out_row + (head * D)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask
        )


@triton.jit(do_not_specialize=VARYING)
def decode(
    part_acc, part_max, part_sum, q, k_cache, v_cache, block_tables, table_stride, cu_seqlens_q, kv_lens,
    q_row, q_head, k_page, k_head, k_slot, v_page, v_head, v_slot, scale, softcap, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_HEADS: tl.constexpr, SEGMENTS: tl.constexpr, MIN_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, kv heads * head tiles, segments). Unfinished softmaxes of sequences with one query.

    part_acc fp32 [S, heads, SEGMENTS, BLOCK_D]; part_max, part_sum fp32 [S, heads, SEGMENTS].
    """
    wait_then_allow(EARLY)
    seq = tl.program_id(0)
    start = tl.load(cu_seqlens_q + seq)
    last_pos = tl.load(kv_lens + seq) - 1
    low, high, begin = reach(last_pos, last_pos, window, BLOCK_N, HAS_WINDOW)
    length = segment_length(begin, high, SEGMENTS, MIN_SEGMENT, BLOCK_N)
    begin += tl.program_id(2) * length
    if (tl.load(cu_seqlens_q + seq + 1) - start == 1) & (begin < high):
        kv_head = tl.program_id(1) % KV_HEADS
        in_group = tl.program_id(1) // KV_HEADS * TILE_HEADS + tl.arange(0, TILE_HEADS)
        live = in_group < GROUP
        head = kv_head * GROUP + in_group
        d = tl.arange(0, BLOCK_D)
        q_tile = tl.load(
            q + start.to(tl.int64) * q_row + head[:, None] * q_head + d[None, :],
            mask=live[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        m, total, acc = attend_tile(
            q_tile, tl.full((TILE_HEADS,), float("-inf"), dtype=tl.float32), tl.zeros((TILE_HEADS,), dtype=tl.float32),
            tl.zeros((TILE_HEADS, BLOCK_D), dtype=tl.float32), last_pos + in_group * 0,
            k_cache, v_cache, block_tables + seq.to(tl.int64) * table_stride, kv_head,
            k_page, k_head, k_slot, v_page, v_head, v_slot, begin, tl.minimum(begin + length, high), low, high,
            scale, softcap, window,
            D, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
        cell = (seq.to(tl.int64) * KV_HEADS * GROUP + head) * SEGMENTS + tl.program_id(2)
        tl.store(part_acc + cell[:, None] * BLOCK_D + d[None, :], acc, mask=live[:, None])
        tl.store(part_max + cell, m, mask=live)
        tl.store(part_sum + cell, total, mask=live)


@triton.jit(do_not_specialize=VARYING)
def combine(
    out, part_acc, part_max, part_sum, cu_seqlens_q, kv_lens, sinks, out_row, window,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, MIN_SEGMENT: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, heads): the segments of a decode row into its output, in one fixed order."""
    wait_then_allow(EARLY)
    seq = tl.program_id(0)
    start = tl.load(cu_seqlens_q + seq)
    if tl.load(cu_seqlens_q + seq + 1) - start == 1:
        head = tl.program_id(1)
        last_pos = tl.load(kv_lens + seq) - 1
        _, high, begin = reach(last_pos, last_pos, window, BLOCK_N, HAS_WINDOW)
        length = segment_length(begin, high, SEGMENTS, MIN_SEGMENT, BLOCK_N)
        segment = tl.arange(0, SEGMENTS)
        written = segment * length < high - begin
        cell = (seq.to(tl.int64) * HEADS + head) * SEGMENTS + segment
        d = tl.arange(0, BLOCK_D)
        m = tl.load(part_max + cell, mask=written, other=float("-inf"))
        total = tl.load(part_sum + cell, mask=written, other=0.0)
        acc = tl.load(part_acc + cell[:, None] * BLOCK_D + d[None, :], mask=written[:, None], other=0.0)
        largest = tl.max(m, 0)
        if HAS_SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
            largest = tl.maximum(largest, sink)
        decay = tl.exp2(m - largest)
        whole = tl.sum(total * decay, 0)
        if HAS_SINKS:
            whole += tl.exp2(sink - largest)
        result = tl.sum(acc * decay[:, None], 0) / whole
        tl.store(out + start.to(tl.int64) * out_row + head * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["kv_index"])
def store_kv(
    k, v, k_cache, v_cache, kv_index, k_row, k_row_head, v_row, v_row_head,
    k_page, k_head, k_slot, v_page, v_head, v_slot,
    KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (T): one token's keys and values into its page."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(kv_index + row)
    page = index // PAGE
    slot = index % PAGE
    head = tl.arange(0, TILE_HEADS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < D)
    keys = tl.load(k + row * k_row + head * k_row_head + d, mask=mask)
    values = tl.load(v + row * v_row + head * v_row_head + d, mask=mask)
    tl.store(k_cache + page * k_page + head * k_head + slot * k_slot + d, keys, mask=mask)
    tl.store(v_cache + page * v_page + head * v_head + slot * v_slot + d, values, mask=mask)
