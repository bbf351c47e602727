"""The kinds of terms that decode graphs know, and how a captured pass is given each.

A *family* is tables plus what a pass does with the step's padded list. A kind joins here, and nowhere else in the
engine, when its operators

- read pointers, sizes and scales from tables on the device, by the slots of a padded list (``StepInputs.work``): rows
  past the counts, rows of the base and rows whose parts have no entry keep their bits;
- launch the same kernels over the same grids whatever the tables hold, and look into no tensor: the host may ask what
  an adapter is (``has_slot``) when it picks a graph, never while a pass runs. Which row is whose is told on the device
  by ``triton_ops.row_items`` (int32 [T], the item of each row, -1: base) and, where a family must know its rows as
  such, by ``row_items.flagged_rows`` and an int32 flag a slot that its tables keep;
- keep memory that only grows before a capture: tables of a fixed number of slots, and room for the largest sizes.

Then ``known_families`` makes a ``GraphFamily``: ``give`` puts into a ``ForwardContext`` what the model's code runs by,
built from ``ctx.work`` alone. Families are given in order, so one may build upon what an earlier one put there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.model.base import BaseModel
from deltaserve.model.context import ForwardContext
from deltaserve_kernels import (
    ApartFamily,
    ApartRows,
    BlockTables,
    LoraTables,
    SparseTables,
    VectorFamily,
    VectorRows,
    VocabularyFamily,
    VocabularyStep,
    shares_points,
    turns_twice,
)

Family = str
MAX_FACTORS = 4
"""Factors of a rotation that graphs have launches for. Rotations of more are served without graphs."""
MAX_ADDED = 256
"""Tokens beyond the base's that graphs have logits for. Adapters that add more are served without graphs."""


@dataclass(frozen=True)
class GraphFamily:
    """One kind of term.

    has_slot:  whether the adapter in a slot has such terms: its rows need a graph with this family
    num_slots: slots of the tables now; graphs hold their addresses, so they end when this changes
    give:      what a pass with this family finds in its context
    refuses:   whether an adapter in a slot has outgrown what graphs have room for
    refuses_together: whether the adapters of one binding, by their slots, are more than a captured pass can add up
    is_alone:  whether there is a graph for rows with this family alone; otherwise it joins the larger ones
    is_large:  it costs enough, though no row has it, that mixtures of others get a graph without it
    """

    has_slot: Callable[[int], bool]
    num_slots: Callable[[], int]
    give: Callable[[ForwardContext], None]
    refuses: Callable[[int], bool] = lambda slot: False
    refuses_together: Callable[[Sequence[int]], bool] = lambda slots: False
    is_alone: bool = True
    is_large: bool = False


def known_families(base: BaseModel, tables: DeltaTables, *, max_rank: int) -> dict[Family, GraphFamily]:
    """The families that are served, by name, in the order that they are given to a pass."""
    known: dict[Family, GraphFamily] = {}
    if tables.lora is not None:
        tables.lora.reserve_rank(max_rank)
        known["lora"] = _low_rank(tables.lora)
    if tables.sparse is not None:
        known["sparse"] = _sparse(tables.sparse)
    if tables.vectors is not None:
        known["vectors"] = _vectors(tables.vectors)
        known["rotations"], known["factors"] = _rotations(tables.vectors), _factors(tables.vectors)
        known["fed"] = _fed(tables.vectors, base)
    if tables.blocks is not None:
        known["blocks"] = _blocks(tables.blocks)
    if tables.apart is not None:
        tables.apart.modules.reserve_rank(max_rank)
        known["apart"] = _apart(tables.apart)
    if tables.vocabulary is not None:
        tables.vocabulary.lora.reserve_rank(max_rank)
        known["vocabulary"] = _vocabulary(tables.vocabulary)
        known["added"] = _added(tables.vocabulary, base)
    return known


def default_keys(known: Mapping[Family, GraphFamily]) -> list[set[Family]]:
    """None, the frequent ones and the largest alone, low rank with sparse, rotations of one factor on either side, all
    but the large ones, all. Blocks and vocabularies get none of their own: what they share one with is some empty
    launches, and each set is captured in every bucket."""
    alone = [{name} for name, family in known.items() if family.is_alone]
    light = {name for name, family in known.items() if not family.is_large}
    together = [{"lora", "sparse"} & set(known), {"vectors", "rotations", "fed"} & set(known)]
    return [set(), *alone, *together, light, set(known)]


def give(known: Mapping[Family, GraphFamily], key: Iterable[Family], ctx: ForwardContext) -> None:
    """Tell a pass what it needs for the families of ``key``."""
    wanted = set(key)
    for name, family in known.items():
        if name in wanted:
            family.give(ctx)


def _low_rank(tables: LoraTables) -> GraphFamily:
    room = tables.rank_capacity

    def give_tables(ctx: ForwardContext) -> None:
        ctx.lora = tables

    return GraphFamily(
        tables.has_slot, lambda: tables.num_slots, give_tables, refuses=lambda slot: tables.largest_rank(slot) > room
    )


def _sparse(tables: SparseTables) -> GraphFamily:
    def give_tables(ctx: ForwardContext) -> None:
        ctx.sparse = tables

    return GraphFamily(tables.has_slot, lambda: tables.num_slots, give_tables)


def _blocks(tables: BlockTables) -> GraphFamily:
    def give_tables(ctx: ForwardContext) -> None:
        ctx.blocks = tables

    return GraphFamily(tables.has_slot, lambda: tables.num_slots, give_tables, is_alone=False)


def _apart(family: ApartFamily) -> GraphFamily:
    """Dense differences and residual modules."""
    room = family.modules.rank_capacity

    def give_rows(ctx: ForwardContext) -> None:
        if ctx.work is not None:
            ctx.apart = ApartRows(family, ctx.work)

    return GraphFamily(
        family.has_slot,
        lambda: family.num_slots,
        give_rows,
        refuses=lambda slot: family.modules.largest_rank(slot) > room,
        refuses_together=lambda slots: shares_points(family, slots),
        is_large=True,
    )


def _vectors(family: VectorFamily) -> GraphFamily:
    """Scales and biases of outputs, norms, and input scales of linears that share their input with no other. What else
    a slot of the family has is told by the families that follow."""

    def give_rows(ctx: ForwardContext) -> None:
        if ctx.work is not None:
            ctx.vectors = VectorRows(family, ctx.work, fans_out=False)

    return GraphFamily(family.has_slot, lambda: family.num_slots, give_rows)


def _rotations(family: VectorFamily) -> GraphFamily:
    """Rotations of one factor, a launch and a copy of the rows each: of outputs, and of inputs that are not "fed"."""

    def turn(ctx: ForwardContext) -> None:
        if isinstance(ctx.vectors, VectorRows):
            ctx.vectors = replace(ctx.vectors, max_factors=1)

    return GraphFamily(
        lambda slot: family.num_factors(slot) > 0,
        lambda: family.num_slots,
        turn,
        refuses_together=lambda slots: turns_twice(family, slots),
        is_alone=False,
        is_large=True,
    )


def _factors(family: VectorFamily) -> GraphFamily:
    """Rotations of several factors, a launch each."""

    def turn(ctx: ForwardContext) -> None:
        if isinstance(ctx.vectors, VectorRows):
            ctx.vectors = replace(ctx.vectors, max_factors=MAX_FACTORS)

    return GraphFamily(
        lambda slot: family.num_factors(slot) > 1,
        lambda: family.num_slots,
        turn,
        refuses=lambda slot: family.num_factors(slot) > MAX_FACTORS,
        is_alone=False,
        is_large=True,
    )


def _fed(family: VectorFamily, base: BaseModel) -> GraphFamily:
    """Own inputs of linears that share theirs: products of several times the rows, so a family of its own."""
    shared = [base.linears.index(name) for group in base.groups() if len(group) > 1 for name in group]

    def has_slot(slot: int) -> bool:
        held = [tables for tables in (family.inputs, family.in_rotations) if tables.has_slot(slot)]
        return any(tables.mark(linear, slot) is not None for tables in held for linear in shared)

    def fan_out(ctx: ForwardContext) -> None:
        if isinstance(ctx.vectors, VectorRows):
            ctx.vectors = replace(ctx.vectors, fans_out=True)

    return GraphFamily(has_slot, lambda: family.num_slots, fan_out, is_alone=False, is_large=True)


def _vocabulary(family: VocabularyFamily) -> GraphFamily:
    """Low rank and trained rows of embedding and head; each row of a decode step gets logits. Scales and biases have no
    launch in a graph."""
    room = family.lora.rank_capacity

    def give_lists(ctx: ForwardContext) -> None:
        ctx.vocabulary = VocabularyStep(family, ctx.work, ctx.work)

    return GraphFamily(
        family.has_slot,
        lambda: family.num_slots,
        give_lists,
        refuses=lambda slot: family.lora.largest_rank(slot) > room or family.vectors.has_slot(slot),
        is_alone=False,
    )


def _added(family: VocabularyFamily, base: BaseModel) -> GraphFamily:
    """Tokens beyond the base's: logits of a fixed width, so that they are copied once more."""
    width = base.vocab_size + MAX_ADDED

    def widen(ctx: ForwardContext) -> None:
        if ctx.vocabulary is not None:
            ctx.vocabulary = replace(ctx.vocabulary, num_token_ids=width)

    return GraphFamily(
        lambda slot: family.num_token_ids(slot) > base.vocab_size,
        lambda: family.num_slots,
        widen,
        refuses=lambda slot: family.num_token_ids(slot) > width,
        is_alone=False,
        is_large=True,
    )
