"""The Triton operators on a GPU: bf16, real widths, programs that run at once. The interpreter shows none of this.

One launch against two, many times over and in a captured graph: a race between producers and consumers shows here.
"""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch

# DELTASERVE_TEST_DEVICE=cpu with TRITON_INTERPRET=1 tries these tests themselves, small, without a GPU.
if "DELTASERVE_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    pytest.skip("no CUDA device; test_interpreter and test_aot cover the host", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and it compiles the kernels", allow_module_level=True)

from deltaserve_kernels import (
    ACTIVATIONS,
    ApartFamily,
    BlockTables,
    LoraTables,
    NormTables,
    RotationFactor,
    RotationTables,
    SparseTables,
    VectorTables,
    WeightView,
    WorkList,
    apart_rows_reference,
    build_work_list,
    reference,
    rotations,
    term_reference,
)
from deltaserve_kernels import pointwise as by_definition
from deltaserve_kernels.triton_ops import attention, blocks, dense, lora, modules, pointwise, rotary, sparse, vectors
from deltaserve_kernels.triton_ops import rotations as by_triton
from deltatest.apart_cases import full, module, packed
from deltatest.kernel_cases import PagedCase, Parts, csr, randn
from deltatest.mask_cases import mask, weight_of

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("DELTASERVE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
IN_FEATURES, WIDTHS = (4096, (4096, 1024, 1024)) if ON_GPU else (96, (64, 32, 16))
MEMBERS = [(i, sum(WIDTHS[:i]), sum(WIDTHS[: i + 1])) for i in range(len(WIDTHS))]
RANKS = [1, 8, 16, 17, 33, 64]
FORMS = {"by_row": lora.DECODE, "products": lora.PRODUCTS, "one_launch": lora.ONE_LAUNCH, "prefill": lora.PREFILL}


@dataclass(frozen=True)
class Step:
    x: torch.Tensor
    y: torch.Tensor
    work: WorkList


def step_of(num_rows: int, seed: int, slots: int = len(RANKS)) -> Step:
    draw = random.Random(seed)
    bindings: list[Parts] = [
        tuple((draw.randrange(slots), draw.choice([1.0, -0.5]), 2.0) for _ in range(draw.choice([0, 1, 1, 1, 2])))
        for _ in range(num_rows)
    ]
    x = randn(num_rows, IN_FEATURES, dtype=DTYPE, seed=seed).to(DEVICE)
    y = randn(num_rows, sum(WIDTHS), dtype=DTYPE, seed=seed + 1).to(DEVICE)
    return Step(x, y, build_work_list(bindings, DEVICE))


@pytest.fixture(scope="module")
def low_rank() -> LoraTables:
    """Shared: a test that changes tables makes its own."""
    return low_rank_tables()


def low_rank_tables() -> LoraTables:
    tables = LoraTables(len(WIDTHS), len(RANKS) + 1, DEVICE)
    for slot, rank in enumerate(RANKS):
        for linear, width in enumerate(WIDTHS):
            a = randn(rank, IN_FEATURES, dtype=DTYPE, seed=100 * slot + linear, scale=IN_FEATURES**-0.5)
            b_t = randn(rank, width, dtype=DTYPE, seed=100 * slot + linear + 50, scale=rank**-0.5)
            tables.set(linear, slot, a.to(DEVICE), b_t.to(DEVICE))
    return tables


@pytest.fixture(scope="module")
def scattered() -> SparseTables:
    tables = SparseTables(len(WIDTHS), 3, DEVICE)
    for slot in range(2):
        for linear, width in enumerate(WIDTHS):
            generator = torch.Generator().manual_seed(10 * slot + linear)
            mask = torch.rand(width, IN_FEATURES, generator=generator) < 0.005 * (slot + 1)
            values = torch.randn(int(mask.sum()), generator=generator).to(DTYPE)
            tables.set(linear, slot, *(tensor.to(DEVICE) for tensor in csr(mask, values)))
    return tables


def close(got: torch.Tensor, expected: torch.Tensor, atol: float, allowed: torch.Tensor | None = None) -> None:
    """One rounding of the result on either side: 2^-8 of it each in bf16. ``allowed``: further, element by element."""
    if allowed is not None:
        # What lies inside the bound counts as equal, and the rest is told as ever.
        inside = (got.float() - expected.float()).abs() <= allowed + 2**-7 * expected.float().abs() + atol
        got = torch.where(inside, expected, got)
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=atol)


def folded_error(step: Step, tables: LoraTables, depth: float, vectors: VectorTables | None = None) -> torch.Tensor:
    """What a form that rounds shrunk rows may be wrong by, fp32 [T, N]: the rounding that ``LoraForm.fold`` documents.

    Each ``h_r = scale * (A x)_r`` becomes ``h_r (1 + d_r)``, |d_r| at most the unit roundoff u (2^-8 in bf16). So
    ``sum over r of b_r h_r`` moves by at most ``u * sum of |b_r| |h_r|``, over all parts, and an output scale s takes
    that with it: ``|s| u sum |b_r h_r|``. Products of large numbers that cancel leave small results and large errors,
    and so do shifts, which is why no multiple of the result bounds it.
    """
    unit = torch.finfo(DTYPE).eps / 2
    bound = torch.zeros(step.y.shape, device=DEVICE)
    for rows, parts in reference.items_of(step.work):
        for linear, start, stop in MEMBERS:
            moved, factor = torch.zeros(len(rows), stop - start, device=DEVICE), torch.ones((), device=DEVICE)
            for slot, first, last in parts:
                scale = first + (last - first) * depth
                low_rank, vector = tables.get(linear, slot), None if vectors is None else vectors.get(linear, slot)
                if low_rank is not None:
                    a, b_t = low_rank
                    moved += (step.x[rows].float() @ a.float().t() * scale).abs() @ b_t.float().abs()
                if vector is not None and vector[0].numel():
                    factor = factor * (1 + scale * (vector[0] - 1))
            bound[rows, start:stop] = unit * moved * factor.abs()
    return bound


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_rows", [1, 16, 63, 300 if ON_GPU else 20])
def test_lora_equals_the_definition(num_rows: int, form: lora.LoraForm, low_rank: LoraTables) -> None:
    step = step_of(num_rows, num_rows)
    expected, out = step.y.clone(), step.y.clone()
    reference.lora_linear(expected, step.x, step.work, low_rank, MEMBERS, 0.3)
    lora.lora_linear(out, step.x, step.work, low_rank, MEMBERS, 0.3, form)
    close(out, expected, 2e-3, folded_error(step, low_rank, 0.3) if form.fold else None)


SPARSE_FORMS = {
    "decode": sparse.DECODE,
    "gathered": sparse.SparseForm(staged=False),
    "prompts": sparse.PROMPTS,
}


@pytest.mark.parametrize("form", SPARSE_FORMS.values(), ids=SPARSE_FORMS)
@pytest.mark.parametrize("num_rows", [1, 17, 63])
def test_sparse_equals_the_definition(num_rows: int, form: sparse.SparseForm, scattered: SparseTables) -> None:
    step = step_of(num_rows, num_rows, slots=3)
    expected, out = step.y.clone(), step.y.clone()
    reference.sparse_linear(expected, step.x, step.work, scattered, MEMBERS, 0.3)
    sparse.sparse_linear(out, step.x, step.work, scattered, MEMBERS, 0.3, form)
    close(out, expected, 2e-3)


@pytest.mark.parametrize("kind", ["low rank", "sparse"])
def test_a_decode_row_has_the_same_bits_alone_and_among_rows_of_its_adapter(
    kind: str, low_rank: LoraTables, scattered: SparseTables
) -> None:
    step = step_of(40, 3, slots=3)
    together = step.y.clone()
    run, tables, form = (
        (lora.lora_linear, low_rank, lora.DECODE)
        if kind == "low rank"
        else (sparse.sparse_linear, scattered, sparse.DECODE)
    )
    run(together, step.x, step.work, tables, MEMBERS, 0.3, form)
    for item in range(step.work.num_items):
        begin, end = step.work.item_rows[item : item + 2].tolist()
        parts = slice(*step.work.item_parts[item : item + 2].tolist())
        slots, scales = step.work.part_slot[parts].tolist(), step.work.part_scale[parts].tolist()
        for row in step.work.rows[begin:end].tolist()[:3]:
            alone = step.y[row : row + 1].clone()
            binding = tuple((slot, *scale) for slot, scale in zip(slots, scales, strict=True))
            run(alone, step.x[row : row + 1], build_work_list([binding], DEVICE), tables, MEMBERS, 0.3, form)
            assert torch.equal(alone[0], together[row]), (item, row)


def test_where_sparse_reads_x_from_does_not_change_a_bit(scattered: SparseTables) -> None:
    step = step_of(40, 7, slots=2)
    expected, out = step.y.clone(), step.y.clone()
    sparse.sparse_linear(expected, step.x, step.work, scattered, MEMBERS, 0.3, sparse.DECODE)
    sparse.sparse_linear(out, step.x, step.work, scattered, MEMBERS, 0.3, SPARSE_FORMS["gathered"])
    assert torch.equal(out, expected)


def test_one_launch_equals_two_to_the_bit_under_stress(low_rank: LoraTables) -> None:
    for seed in range(50 if ON_GPU else 2):
        step = step_of(random.Random(seed).choice([1, 5, 64, 200] if ON_GPU else [1, 5]), seed)
        two, one = step.y.clone(), step.y.clone()
        lora.lora_linear(two, step.x, step.work, low_rank, MEMBERS, 0.3, lora.PRODUCTS)
        lora.lora_linear(one, step.x, step.work, low_rank, MEMBERS, 0.3, lora.ONE_LAUNCH)
        assert torch.equal(one, two), f"step {seed}"
    assert not lora.counters(1, DEVICE).any()


@pytest.mark.skipif(not ON_GPU, reason="graphs are captured on CUDA only")
def test_a_captured_graph_replays_and_follows_the_tables() -> None:
    """Adapters are swapped under a captured launch: only table rows change."""
    step, low_rank = step_of(33, 5), low_rank_tables()
    for form in (lora.DECODE, lora.PRODUCTS, lora.ONE_LAUNCH):
        out = step.y.clone()
        lora.lora_linear(out, step.x, step.work, low_rank, MEMBERS, 0.3, form)  # compiles, builds tiles
        expected, graph = out.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lora.lora_linear(out, step.x, step.work, low_rank, MEMBERS, 0.3, form)
        for _ in range(20):
            out.copy_(step.y)
            graph.replay()
            assert torch.equal(out, expected)
        for slot, rank in enumerate(RANKS):
            a, b_t = (tensor.clone() * 2 for tensor in low_rank.get(0, slot) or ())
            assert a.shape[0] == rank
            low_rank.set(0, slot, a, b_t)
        out.copy_(step.y)
        graph.replay()
        eager = step.y.clone()
        lora.lora_linear(eager, step.x, step.work, low_rank, MEMBERS, 0.3, form)
        assert torch.equal(out, eager)
        assert not torch.equal(out, expected)


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (8, 1, 256)])
def test_attention_equals_the_definition(heads: int, kv_heads: int, head_dim: int, options: dict[str, float]) -> None:
    if not ON_GPU:
        heads, head_dim = min(heads, 9), 16
        kv_heads = min(kv_heads, 3) if heads == 9 else 1
    case = PagedCase([1, 1, 17, 30, 0, 1], [1, 700 if ON_GPU else 70, 17, 60, 5, 33], heads, kv_heads, head_dim, DTYPE)
    args = [tensor.to(DEVICE) for tensor in case.args]
    expected = reference.paged_attention(*args, scale=head_dim**-0.5, **options)
    out = attention.paged_attention(*args, scale=head_dim**-0.5, **options)
    close(out, expected, 1e-2)


def test_write_kv_equals_the_definition() -> None:
    pool = torch.zeros(8, 2, 2, 16, 64, dtype=DTYPE, device=DEVICE)
    expected = pool.clone()
    k, v = (randn(40, 2, 64, dtype=DTYPE, seed=seed).to(DEVICE) for seed in (1, 2))
    index = torch.randperm(128)[:40].to(DEVICE)
    attention.write_kv(k, v, pool[:, 0], pool[:, 1], index)
    reference.write_kv(k, v, expected[:, 0], expected[:, 1], index)
    assert torch.equal(pool, expected)


BLOCK_FORMS = {"by_row": blocks.DECODE, "prompts": blocks.PROMPTS}


@pytest.mark.parametrize("form", BLOCK_FORMS.values(), ids=BLOCK_FORMS)
@pytest.mark.parametrize("num_rows", [1, 17, 63 if ON_GPU else 20])
def test_blocks_equal_the_definition(num_rows: int, form: blocks.RowForm | lora.LoraForm) -> None:
    step, tables = step_of(num_rows, num_rows, slots=4), BlockTables(len(WIDTHS), 4, DEVICE)
    for linear, width in enumerate(WIDTHS):
        rows = torch.arange(1, width, 13 + linear, dtype=torch.int32)
        cols = torch.arange(2, IN_FEATURES, 31, dtype=torch.int32)
        for slot, (out_rows, in_cols) in enumerate(((None, cols), (rows, None), (rows, cols))):
            shape = [len(rows) if out_rows is not None else width, len(cols) if in_cols is not None else IN_FEATURES]
            d = randn(*shape, dtype=DTYPE, seed=10 * slot + linear, scale=shape[1] ** -0.5)
            d = d.t().contiguous() if out_rows is None else d
            lists = {
                name: None if listed is None else listed.to(DEVICE)
                for name, listed in (("out_rows", out_rows), ("in_cols", in_cols))
            }
            tables.set(linear, slot, d.to(DEVICE), IN_FEATURES, width, **lists)
    expected, out = step.y.clone(), step.y.clone()
    term_reference.block_linear(expected, step.x, step.work, tables, MEMBERS, 0.3)
    blocks.block_linear(out, step.x, step.work, tables, MEMBERS, 0.3, form)
    close(out, expected, 3e-3)


DENSE_FORMS = {"decode": dense.DECODE, "prompts": dense.PROMPTS}


@pytest.mark.parametrize("form", DENSE_FORMS.values(), ids=DENSE_FORMS)
@pytest.mark.parametrize("num_rows", [1, 17, 200 if ON_GPU else 20])
def test_differences_equal_the_definition(num_rows: int, form: dense.DenseForm) -> None:
    step, tables = step_of(num_rows, num_rows, slots=3), ApartFamily(len(WIDTHS), 0, 3, DEVICE).dense
    base = weight_of(step.y.shape[1], IN_FEATURES, DTYPE)
    weight = WeightView(base.data.to(DEVICE), base.outputs)
    for slot in range(2):
        entries = [
            (
                i,
                [full(width, IN_FEATURES, i, DTYPE), packed(width, IN_FEATURES, i), mask(width, IN_FEATURES, i)][
                    (slot + i) % 3
                ],
            )
            for i, width in enumerate(WIDTHS)
        ]
        tables.set_all(slot, [(linear, entry.to(DEVICE)) for linear, entry in entries])
    expected, out = step.y.clone(), step.y.clone()
    apart_rows_reference.dense_linear(expected, step.x, step.work, tables, MEMBERS, 0.3, lambda: weight)
    dense.dense_linear(out, step.x, step.work, tables, MEMBERS, 0.3, lambda: weight, form)
    close(out, expected, 3e-3)


def test_modules_equal_the_definition() -> None:
    slots = len(ACTIVATIONS)
    tables = ApartFamily(0, 2, slots, DEVICE).modules
    for slot, activation in enumerate(ACTIVATIONS):
        options = {"dtype": DTYPE, "reads": slot % 2 - 1, "has_biases": slot % 3 > 0}
        tables.set_all(slot, [(1, module(IN_FEATURES, (5, 64, 130)[slot % 3], activation, slot, **options).to(DEVICE))])
    bindings: list[Parts] = [((row % slots, 1.0, -0.5),) if row % 5 else () for row in range(33 if ON_GPU else 9)]
    work, shape = build_work_list(bindings, DEVICE), (len(bindings), IN_FEATURES)
    y, other = (randn(*shape, dtype=DTYPE, seed=seed).to(DEVICE) for seed in (1, 2))
    results = []
    for operators in (apart_rows_reference, modules):
        out = y.clone()
        kept = operators.set_module_rows_aside(out, work, tables, 1)
        assert not out[1].any()
        operators.put_module_rows_back(out, kept, work, tables, 1)
        assert torch.equal(out, y)
        operators.add_modules(out, work, tables, 1, 0.3, {0: other})
        results.append(out)
    close(results[1], results[0], 2e-2)
    assert torch.equal(results[1][::5], y[::5])


@pytest.mark.parametrize("num_rows", [1, 33 if ON_GPU else 9])
def test_rotations_equal_the_definition(num_rows: int) -> None:
    """One factor, several on permuted rows, one block that all share; by the forms of both kinds of steps."""
    step, tables = step_of(num_rows, num_rows, slots=3), RotationTables(len(WIDTHS), 3, DEVICE)
    # One part of a row turns it.
    bindings: list[Parts] = [((row % 3, 1.0, -0.5),) if row % 5 else () for row in range(num_rows)]

    def factor(width: int, size: int, seed: int, is_shuffled: bool = False, count: int = 0) -> RotationFactor:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).int() if is_shuffled else None
        blocks = randn(count or width // size, size, size, dtype=DTYPE, seed=seed, scale=0.3 * size**-0.5)
        return RotationFactor(blocks.to(DEVICE), None if order is None else order.to(DEVICE))

    for linear, width in enumerate(WIDTHS):
        tables.set_all(0, [(linear, (factor(width, 8, linear),))])
        several = (factor(width, 16, linear, is_shuffled=True), factor(width, 4, linear + 9, is_shuffled=True))
        tables.set_all(1, [(linear, several if linear else (factor(width, 2, 3, count=1),))])
    x = step.y.flip(1).contiguous()
    work = build_work_list(bindings, DEVICE)
    expected = step.y.clone()
    rotations.rotate_blocks(expected, x, work, tables, MEMBERS, 0.3, backend="reference")
    for has_prompts in (False, True):
        out = step.y.clone()
        by_triton.turn_rows(out, x, replace(work, has_prompts=has_prompts), tables, MEMBERS, 0.3, 2)
        close(out, expected, 5e-3)
        assert torch.equal(out[::5], step.y[::5])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_vectors_equal_the_definition(form: lora.LoraForm, low_rank: LoraTables) -> None:
    step, tables = step_of(33 if ON_GPU else 9, 3), VectorTables(len(WIDTHS), len(RANKS) + 1, DEVICE)
    for linear, width in enumerate(WIDTHS):
        scale = (1 + randn(width, seed=linear, scale=0.3)).to(DEVICE)
        for slot in (0, 2, len(RANKS)):  # the last has vectors alone
            tables.set(linear, slot, scale, randn(width, seed=slot).to(DEVICE) if slot else None)
    expected, out = step.y.clone(), step.y.clone()
    term_reference.lora_vector_linear(expected, step.x, step.work, low_rank, tables, MEMBERS, 0.3)
    vectors.lora_vector_linear(out, step.x, step.work, low_rank, tables, MEMBERS, 0.3, form)
    close(out, expected, 3e-3, folded_error(step, low_rank, 0.3, tables) if form.fold else None)


def test_the_norm_equals_the_definition() -> None:
    step, tables = step_of(33 if ON_GPU else 9, 4), NormTables(1, len(RANKS), DEVICE)
    tables.set(0, 1, randn(IN_FEATURES, seed=8).to(DEVICE))
    weight = randn(IN_FEATURES, dtype=DTYPE, seed=9).to(DEVICE)
    expected = term_reference.rms_norm(step.x, weight, 1e-5, step.work, tables, 0, 0.3)
    close(vectors.rms_norm(step.x, weight, 1e-5, step.work, tables, 0, 0.3), expected, 1e-5)


@pytest.mark.parametrize("half", [32, 10])
def test_rotary_equals_the_definition(half: int) -> None:
    pool = torch.zeros(8, 2, 2, 16, 64, dtype=DTYPE, device=DEVICE)
    qkv = randn(40, 9, 64, dtype=DTYPE, seed=1).to(DEVICE)
    angles = randn(40, half, seed=2, scale=3.0).to(DEVICE)
    index = torch.randperm(128)[:40].to(DEVICE)
    results = []
    for operator in (term_reference.rotate_and_write_kv, rotary.rotate_and_write_kv):
        rows, cache = qkv.clone(), pool.clone()
        q, k, v = rows.split([5, 2, 2], dim=1)
        operator(q, k, v, angles.cos(), angles.sin(), cache[:, 0], cache[:, 1], index)
        results.append((rows, cache))
    for got, expected in zip(results[1], results[0], strict=True):
        close(got, expected, 1e-5)


@pytest.mark.parametrize("num_rows", [1, 63, 3000 if ON_GPU else 5])
@pytest.mark.parametrize("size", [4096, 14336, 1000] if ON_GPU else [96, 100])
def test_rows_between_products_equal_the_definition(size: int, num_rows: int) -> None:
    both, weight = randn(num_rows, 2 * size, dtype=DTYPE).to(DEVICE), randn(size, dtype=DTYPE, seed=9).to(DEVICE)
    x = both[:, :size]  # rows apart, as of a projection group
    close(pointwise.rms_norm(x, weight, 1e-5, 1.0), by_definition.rms_norm(x, weight, 1e-5, 1.0), 1e-5)
    for activation in by_definition.ACTIVATIONS:
        close(pointwise.gated_product(both, activation), by_definition.gated_product(both, activation), 1e-5)


@pytest.mark.parametrize("num_rows", [1, 63, 3000 if ON_GPU else 5])
def test_rotation_of_a_group_equals_the_definition(num_rows: int) -> None:
    heads, kv_heads, size = (32, 8, 128) if ON_GPU else (3, 1, 16)
    pool = torch.zeros(num_rows // 16 + 1, 2, kv_heads, 16, size, dtype=DTYPE, device=DEVICE)
    qkv = randn(num_rows, (heads + 2 * kv_heads) * size, dtype=DTYPE, seed=1).to(DEVICE)
    cos, sin = (randn(num_rows, size, dtype=DTYPE, seed=seed).to(DEVICE) for seed in (2, 3))
    index = torch.randperm(len(pool) * 16)[:num_rows].to(DEVICE)
    results = []
    for operators in (by_definition, pointwise):
        rows, cache = qkv.clone(), pool.clone()
        operators.rotate_and_store(rows, cos, sin, cache[:, 0], cache[:, 1], index)
        results.append((rows, cache))
    for got, expected in zip(results[1], results[0], strict=True):
        close(got, expected, 1e-5)
