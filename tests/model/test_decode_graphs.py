"""Decode graphs without a GPU: a capture that runs the very same pass again stands in for a CUDA graph.

What a graph freezes on the host, the pass must not read: ``graph_cases`` beside the kernels' tests holds that with a
tape of the recorded operations. Here: how steps are laid out, which graph a step takes, and every number equal to the
eager runner's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.decode_graphs import DecodeGraphs, buckets
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.engine.static_step import StaticStep
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import KVCache
from deltaserve_kernels import EMBEDDING, RotationFactor, VectorEntries, VocabularyEntries, use_backend
from deltatest.engine_fakes import request as make_request
from deltatest.graph_rig import GraphRig, rerun
from deltatest.real_engine import real_rig
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _reference_operators() -> Iterator[None]:
    """The C++ operators want lists without empty items."""
    before = use_backend("reference")
    yield
    use_backend(before)


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi3-longrope"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = build_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


def test_random_steps_equal_the_eager_runner_to_the_bit(base: BaseModel) -> None:
    rig = GraphRig(base)
    for step in range(30):
        rig.change_adapters()
        rig.check(rig.random_batch(), f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs == len(rig.graphs.row_counts) * 4


def test_random_steps_with_vectors_and_vocabularies_equal_the_eager_runner(base: BaseModel) -> None:
    """Scales, biases, norms, inputs, rotations, embeddings and heads, in rows of several parts, at strengths that vary
    by depth, in company; the eager runner finds its rows on the host and shares nothing but the tables."""
    rig = GraphRig(base, has_vectors=True, has_vocabulary=True)
    for step in range(15):
        rig.change_adapters()
        rig.check(rig.random_batch(), f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs == len(rig.graphs.row_counts) * 8


def test_random_steps_with_blocks_equal_the_eager_runner(base: BaseModel) -> None:
    rig = GraphRig(base, has_blocks=True, row_counts=[2, 5])
    for step in range(8):
        rig.change_adapters()
        rig.check(rig.random_batch(), f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs == 2 * 5


def test_random_steps_with_differences_and_modules_equal_the_eager_runner(base: BaseModel) -> None:
    """The eager runner goes by items that it finds on the host, the graphs by tables and lists alone."""
    rig = GraphRig(base, has_apart=True, row_counts=[2, 5])
    for step in range(12):
        rig.change_adapters()
        rig.check(rig.random_batch(), f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs == 2 * 6


def test_two_adapters_with_modules_in_one_binding_are_in_no_graph(llama: BaseModel) -> None:
    """One reads what the other added, which takes launches that follow the binding."""
    rig = GraphRig(llama, has_apart=True, row_counts=[2])
    for slot in (0, 1):
        rig.fill(slot, ("modules",), share=1.0)
    rig.fill(2, ("dense",), share=1.0)
    batch = rig.random_batch(2, max_parts=0)
    for slots, is_served in (([0, 2], True), ([0], True), ([0, 1], False)):
        batch[1].parts = tuple(ScheduledPart(slot, 0.5, 1.0) for slot in slots)
        assert (rig.graphs.run(batch) is not None) == is_served


def low_rank_adapter(base: BaseModel, rank: int, seed: int) -> FoldedAdapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(rank, size, generator=generator) * 0.2

    shapes = base.spec.linears.items()
    terms = {name: (LowRankTerm(draw(linear.in_features), draw(linear.out_features)),) for name, linear in shapes}
    return FoldedAdapter(terms, base.spec.fingerprint, torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


class Recorded:
    """Captures of one rig by (rows, families), and what was replayed."""

    def __init__(self, rig_graphs: DecodeGraphs) -> None:
        self.replayed: list[tuple[int, frozenset[str]]] = []
        for key, replay in list(rig_graphs._replays.items()):
            rig_graphs._replays[key] = lambda key=key, replay=replay: (self.replayed.append(key), replay())  # type: ignore[misc]


def test_buckets_rise_to_the_most_sequences() -> None:
    assert buckets(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert buckets(1) == (1,)
    assert buckets(5) == (1, 2, 4, 5)
    assert buckets(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)


def test_a_step_takes_the_smallest_graph_that_has_its_rows_and_families(llama: BaseModel) -> None:
    rig = GraphRig(llama)
    recorded = Recorded(rig.graphs)
    rig.fill(0, ("lora",))
    rig.fill(1, ("sparse",))
    rig.fill(2, ("lora", "sparse"))
    rig.lora.clear(3)
    cases: list[tuple[int, list[int], int, set[str]]] = [
        (1, [], 1, set()),
        (3, [0], 4, {"lora"}),
        (5, [1], 6, {"sparse"}),
        (2, [0, 1], 2, {"lora", "sparse"}),
        (4, [2], 4, {"lora", "sparse"}),
        (6, [3], 6, set()),  # an adapter without terms
    ]
    for num_rows, slots, rows, families in cases:
        batch = rig.random_batch(num_rows, max_parts=0)
        for seq, slot in zip(batch, slots, strict=False):
            seq.parts = (ScheduledPart(slot),)
        rig.check(batch)
        assert recorded.replayed.pop() == (rows, frozenset(families))
    # A row of nine parts needs the list of a larger step than its own.
    one = rig.random_batch(1, max_parts=0)
    one[0].parts = tuple(ScheduledPart(slot % 3, 0.1, 0.2) for slot in range(9))
    rig.check(one)
    assert recorded.replayed.pop() == (2, frozenset({"lora", "sparse"}))
    # A part that joins later is none yet; of families that were not captured the next larger set serves.
    batch[0].parts = (ScheduledPart(0, start_position=batch[0].start + 1),)
    rig.check(batch)
    assert recorded.replayed.pop() == (6, frozenset())
    narrow = GraphRig(llama, keys=[["lora", "sparse"]], row_counts=[2])
    recorded = Recorded(narrow.graphs)
    narrow.fill(0, ("lora",))
    batch = narrow.random_batch(1, max_parts=0)
    batch[0].parts = (ScheduledPart(0),)
    narrow.check(batch)
    assert recorded.replayed == [(2, frozenset({"lora", "sparse"}))]
    with pytest.raises(ValueError, match="only \\['lora', 'sparse'\\] have tables"):
        DecodeGraphs(llama, narrow.kv, narrow.tables, keys=[["blocks"]], capture=rerun)


def test_graphs_of_every_family_at_start_up_are_as_many_as_the_docs_say(llama: BaseModel) -> None:
    rig = GraphRig(llama, capture_now=False, has_vectors=True, has_blocks=True, has_apart=True, has_vocabulary=True)
    light = {"lora", "sparse", "vectors", "blocks", "vocabulary"}
    alone = [{"apart"}, {"lora"}, {"sparse"}, {"vectors"}]
    pairs, turned = {"lora", "sparse"}, {"fed", "rotations", "vectors"}
    everything = {*light, *turned, "factors", "apart", "added"}
    assert list(rig.graphs.keys) == [set(), *alone, pairs, turned, light, everything]
    assert len(buckets(64)) * len(rig.graphs.keys) == 81


def test_vectors_have_graphs_of_their_own_and_inputs_of_several_linears_those_of_rotations(llama: BaseModel) -> None:
    rig = GraphRig(llama, has_vectors=True)
    recorded = Recorded(rig.graphs)
    rig.fill(0, ("vectors",))
    rig.fill(1, ("vectors", "fed"), share=1.0)
    rig.fill(2, ("lora",))
    turned, light = frozenset({"vectors", "fed", "rotations"}), frozenset({"lora", "sparse", "vectors"})
    everything = turned | light | {"factors"}
    rig.fill(3, ("rotations",), share=1.0)
    rig.fill(4, ("rotations", "factors"), share=1.0)
    steps = [([0], {"vectors"}), ([1], turned), ([0, 2], light), ([2], {"lora"}), ([3], turned), ([4], everything)]
    for slots, families in steps:
        batch = rig.random_batch(2, max_parts=0)
        batch[1].parts = tuple(ScheduledPart(slot, 0.5, 1.0) for slot in slots)
        rig.check(batch)
        assert recorded.replayed.pop() == (2, frozenset(families))
    # Two that turn a row are added up by the definition; more factors than there are launches, too.
    batch[1].parts = (ScheduledPart(3), ScheduledPart(4))
    assert rig.graphs.run(batch) is None
    assert rig.eager.execute(batch).isfinite().all()
    rig.vectors.clear(4)
    turns = (RotationFactor(torch.randn(1, 4, 4) * 0.1),) * 5
    rig.vectors.set_all(4, VectorEntries(in_rotations=((0, turns),)))
    batch[1].parts = (ScheduledPart(4),)
    assert rig.graphs.run(batch) is None
    # At strength 0, and where nobody has such an adapter, the bits are the base's.
    plain = [ScheduledSequence(0, [7], 3, [1]), ScheduledSequence(1, [9], 3, [2])]
    wanted = rig.graphs.run(plain).clone()
    for strengths in ((0.0, 0.0), (1.0, 1.0)):
        plain[0].parts = (ScheduledPart(1, *strengths),)
        found = rig.graphs.run(plain)
        assert recorded.replayed.pop() == (2, turned)
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[0], wanted[0]) == (strengths == (0.0, 0.0))
    # Embedding and head are in the largest, as far as graphs have room.
    tokens = GraphRig(llama, has_vocabulary=True, max_rank=32)
    recorded_tokens = Recorded(tokens.graphs)
    tokens.fill(0, ("vocabulary",))
    plain[0].parts = (ScheduledPart(0),)
    tokens.check(plain)
    assert recorded_tokens.replayed == [(2, frozenset({"lora", "sparse", "vocabulary"}))]
    a, b_t = torch.zeros(33, llama.vocab_size), torch.zeros(33, llama.hidden_size)
    tokens.vocabulary.set_all(1, VocabularyEntries(((EMBEDDING, a, b_t),)))
    plain[0].parts = (ScheduledPart(1),)
    assert tokens.graphs.run(plain) is None
    # Tokens that an adapter adds make logits wider, up to a width.
    for num_added, is_served in ((3, True), (256, True), (257, False)):
        tokens.clear(1)
        tokens.fill_vocabulary(1, num_added)
        plain[0].token_ids = [llama.vocab_size]
        if is_served:
            tokens.check(plain)
            assert recorded_tokens.replayed.pop() == (2, frozenset({"lora", "sparse", "vocabulary", "added"}))
        found = tokens.graphs.run(plain)
        assert (found is not None) == is_served
        assert found is None or found.shape == (2, llama.vocab_size + num_added)
        assert found is None or (found[1, llama.vocab_size :] == float("-inf")).all()
        assert found is None or found[0].isfinite().all()
    assert tokens.eager.execute(plain).shape == (2, llama.vocab_size + 257)


def test_what_no_graph_serves_is_left_to_the_eager_runner(llama: BaseModel) -> None:
    rig = GraphRig(llama, max_rank=32)
    one = rig.random_batch(1, max_parts=0)
    assert rig.graphs.run(one) is not None
    assert rig.graphs.run([]) is None
    assert rig.graphs.run(rig.random_batch(6) + rig.random_batch(1)) is None
    assert rig.graphs.run([ScheduledSequence(0, [3, 4], 0, [0])]) is None
    assert rig.graphs.run([ScheduledSequence(0, [3], 0, [0], logits="all")]) is None
    assert rig.graphs.run([ScheduledSequence(0, [3], 0, list(range(9)))]) is None
    nine = tuple(ScheduledPart(slot % 5) for slot in range(9))
    one[0].parts = nine + nine[:6]
    assert rig.graphs.run(one) is None  # fifteen parts; a list of six rows has room for fourteen
    one[0].parts = (ScheduledPart(0),)
    rig.fill(0, ("lora",), rank=32)
    rig.check(one)
    rig.fill(0, ("lora",), rank=33)
    assert rig.graphs.run(one) is None
    rig.lora.clear(0)
    assert rig.graphs.run(one) is not None
    rig.lora.grow(9)
    assert rig.graphs.run(one) is None  # the graphs hold the old tables' addresses
    with pytest.raises(ValueError, match="scratch block"):
        DecodeGraphs(llama, KVCache(llama.kv_layout, 4, "cpu"), rig.tables, capture=rerun)
    fresh = GraphRig(llama, capture_now=False)
    assert fresh.graphs.run(one) is None


def test_filling_rows_touch_nobodys_blocks_and_captures_none_at_all(llama: BaseModel) -> None:
    rig = GraphRig(llama, capture_now=False)
    before = rig.kv.pool.clone()
    rig.graphs.capture()
    assert torch.equal(rig.kv.pool[: rig.num_blocks], before[: rig.num_blocks])
    assert not torch.equal(rig.kv.pool[rig.num_blocks], before[rig.num_blocks])
    # NaN in the scratch block, as an overflowing row may leave it, reaches nobody.
    rig.kv.pool[rig.num_blocks] = float("nan")
    rig.check(rig.random_batch(3))


def test_a_step_is_under_2_kb_and_block_tables_travel_only_when_they_change(
    llama: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = KVCache(llama.kv_layout, 8, "cpu", has_scratch=True)
    step = StaticStep(kv, max_seqs=64, max_blocks=40)
    copies: list[int] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other, **kw: copies.append(other.nbytes) or copy(self, other, **kw)
    )
    batch = [ScheduledSequence(i, [3], 100, list(range(7))) for i in range(60)]
    bindings = [((i, 1.0, 1.0),) for i in range(60)]
    step.fill(batch, 64, bindings)
    assert copies == [64 * 28 + 1640, 64 * 7 * 4]
    copies.clear()
    step.fill([ScheduledSequence(i, [3], 101, list(range(7))) for i in range(60)], 64, bindings)
    assert copies == [64 * 28 + 1640]
    assert PADDED_BYTES < 2048
    copies.clear()
    for i in (5, 8):
        batch[i] = ScheduledSequence(i, [3], 112, list(range(8)))
    step.fill(batch, 64, None)
    assert copies == [64 * 28, 4 * 8 * 4]
    assert step.inputs(64).block_tables[5, :8].tolist() == list(range(8))
    assert step.inputs(64).block_tables[60:, 0].tolist() == [8] * 4
    assert step.inputs(64).kv_index[:2].tolist() == [6 * 16 + 4] * 2


def test_the_runner_replays_decodes_and_runs_the_rest_eagerly(llama: BaseModel) -> None:
    rig = GraphRig(llama, capture_now=False)
    runner = ModelRunner(llama, rig.kv, rig.tables, graphs=rig.graphs)
    runner.warm_up()
    assert not rig.kv.pool.any()
    recorded = Recorded(rig.graphs)
    prompt = ScheduledSequence(1, [5, 6, 7], 0, [3])
    assert torch.equal(runner.execute([prompt]), rig.eager.execute([prompt]))
    assert not recorded.replayed
    token = ScheduledSequence(1, [8], 3, [3])
    assert torch.equal(runner.execute([token]), rig.eager.execute([token]))
    assert recorded.replayed == [(1, frozenset())]
    with pytest.raises(ValueError, match="has 1 blocks for 17 positions"):
        runner.execute([ScheduledSequence(1, [8], 16, [3])])


@pytest.mark.parametrize("has_graphs", [False, True])
def test_an_engine_with_graphs_answers_as_one_without(llama: BaseModel, has_graphs: bool) -> None:
    """Preemption, company and adapters that come and go, under sequences longer than a block."""
    adapters = {f"v{i}": low_rank_adapter(llama, rank=1 + 8 * i, seed=i) for i in range(3)}
    rig = real_rig(llama, adapters, num_blocks=14, num_slots=2, max_num_seqs=5, has_graphs=has_graphs)
    requests = [
        make_request(f"r{i}", [7 + i] * (5 + 9 * i), *([f"v{i % 3}"] if i % 4 else []), max_tokens=24, ignore_eos=True)
        for i in range(6)
    ]
    tokens = rig.run(*requests)
    assert rig.num_preempted > 0
    ANSWERS.append(tokens)
    assert tokens == ANSWERS[0]


ANSWERS: list[object] = []
PADDED_BYTES = 1640
