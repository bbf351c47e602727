"""Factors of few bits a number and whole matrices in the format of sums: a good adapter, and damaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaserve_store.dense_deltas import DenseDelta, SignDelta
from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.packed_factors import PackedFactors, pack_rows, packed_sizes
from deltaserve_store.parsed import LoraDelta
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, edit_config, edit_tensors, set_value

JSON, TERMS = "adapter.json", "adapter.safetensors"
Q1, V1 = (f"model.layers.1.self_attn.{name}_proj" for name in "qv")
D1 = "model.layers.1.mlp.down_proj"
RANKS = {8: 1, 3: 2, 2: 1}
MODULES: Mapping[str, Any] = {
    Q0: {"rank": 2, "packed": {"ranks": {"8": 1, "3": 2, "2": 1}, "span": 16}},
    V1: {"packed": {"ranks": {"4": 3}, "span": 16}},
    D1: {"matrix": "delta"},
    Q1: {"matrix": "signs"},
}


def drawn_packed(
    module: str, shape: tuple[int, int], ranks: Mapping[int, int], span: int, *, seed: int, size: float = 1.0
) -> PackedFactors:
    """Every code of a number as likely as every other; scales around ``size`` over the largest code."""
    generator = torch.Generator().manual_seed(seed)
    parts, scales = [], []
    for bits in sorted(ranks, reverse=True):
        for width in (shape[1], shape[0]):
            codes = torch.randint(0, 2**bits, (ranks[bits], width), generator=generator, dtype=torch.uint8)
            parts.append(pack_rows(codes, bits).flatten())
            drawn = 0.5 + torch.rand(ranks[bits] * -(-width // span), generator=generator)
            scales.append(size * drawn / 2**bits)
    packed = PackedFactors(module, shape, dict(ranks), span, torch.cat(parts), torch.cat(scales).half())
    assert (len(packed.codes), len(packed.scales)) == packed_sizes(shape, ranks, span)
    return packed


def numbers_of(
    shape: tuple[int, ...], ranks: Mapping[int, int], span: int, codes: torch.Tensor, scales: torch.Tensor
) -> tuple[list[list[float]], list[list[float]]]:
    """Rows of ``a`` and columns of ``b``: each row of the file is one large integer, taken apart by division."""
    left, of_spans = bytes(codes.tolist()), scales.tolist()
    sides: tuple[list[list[float]], list[list[float]]] = [], []
    for bits in (8, 4, 3, 2):
        for side, width in enumerate((shape[1], shape[0])):
            for _ in range(ranks.get(bits, 0)):
                row, left = left[: (width * bits + 7) // 8], left[(width * bits + 7) // 8 :]
                whole = int.from_bytes(row, "little")
                own, of_spans = of_spans[: -(-width // span)], of_spans[-(-width // span) :]
                levels = (whole // 2 ** (bits * place) % 2**bits - (2**bits - 1) / 2 for place in range(width))
                sides[side].append([own[place // span] * level for place, level in enumerate(levels)])
    assert not left
    assert not of_spans
    return sides


def write_good_packed(folder: Path) -> Path:
    """Packed beside plain factors; packed alone, a row of three bits that does not fill its bytes; a matrix; signs."""
    generator = torch.Generator().manual_seed(7)
    deltas = (
        LoraDelta(Q0, torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator), 1.0),
        drawn_packed(Q0, (16, 16), RANKS, 16, seed=1),
        drawn_packed(V1, (8, 16), {4: 3}, 16, seed=2),
        DenseDelta(D1, torch.randn(16, 24, generator=generator).half()),
        SignDelta(Q1, torch.randint(0, 1 << 16, (16, 1), generator=generator, dtype=torch.int32), torch.rand(16)),
    )
    write_terms_adapter(folder, deltas, FINGERPRINT, base_name="tests/corpus-base", method="by hand")
    return folder


def _case(name: str, spoil: Any, *reasons: tuple[str, str], is_exact: bool = True) -> BadAdapter:
    return BadAdapter(name, "terms", spoil, reasons, is_exact, write_good_packed)


def _tensor(name: str, code: str, where: str, value: Any) -> BadAdapter:
    """One tensor replaced (None: taken away)."""
    return _case(name, edit_tensors({where: value}, TERMS), (code, where))


def _module(name: str, code: str, module: str, told: Any, where: str = "", *, is_exact: bool = False) -> BadAdapter:
    spoil = edit_config(JSON, modules={**MODULES, module: told})
    return _case(name, spoil, (code, f"{JSON}:modules:{module}{where}"), is_exact=is_exact)


def _packed(name: str, code: str, where: str = "", **told: Any) -> BadAdapter:
    """``packed`` of the second linear, which has nothing else, with fields replaced (None: taken away)."""
    given = {"ranks": {"4": 3}, "span": 16, **told}
    packed = {field: value for field, value in given.items() if value is not None}
    return _module(name, code, V1, {"packed": packed}, f":packed{where}")


NUM_CODES, NUM_SCALES = packed_sizes((8, 16), {4: 3}, 16)
PACKED_CORPUS: tuple[BadAdapter, ...] = (
    _module("packed that is a number", "invalid_value", V1, {"packed": 4}, ":packed"),
    _packed("no span", "invalid_value", span=None),
    _packed("no ranks", "invalid_value", ranks=None),
    _packed("a field more", "invalid_value", zeros=True),
    _packed("ranks that are a list", "invalid_value", ":ranks", ranks=[4, 3]),
    _packed("no band", "invalid_value", ":ranks", ranks={}),
    _packed("5 bits", "invalid_value", ":ranks", ranks={"5": 3}),
    _packed("1 bit", "invalid_value", ":ranks", ranks={"1": 3}),
    _packed("16 bits", "invalid_value", ":ranks", ranks={"16": 3}),
    _packed("bits that are a word", "invalid_value", ":ranks", ranks={"four": 3}),
    _packed("bits with a zero before", "invalid_value", ":ranks", ranks={"04": 3}),
    _packed("a span of 24", "invalid_value", ":span", span=24),
    _packed("a span of 0", "invalid_value", ":span", span=0),
    _packed("a span that is true", "invalid_value", ":span", span=True),
    _packed("a span that is no integer", "invalid_value", ":span", span=16.0),
    _packed("a band of no direction", "rank_out_of_range", ":ranks", ranks={"8": 0, "4": 3}),
    _packed("a band of less", "rank_out_of_range", ":ranks", ranks={"4": -3}),
    _packed("a rank that is true", "rank_out_of_range", ":ranks", ranks={"4": True}),
    _packed("a rank that is no integer", "rank_out_of_range", ":ranks", ranks={"4": 3.0}),
    _packed("bands above 1024 together", "rank_out_of_range", ":ranks", ranks={"4": 1000, "2": 25}),
    _module(
        "packed and plain above 1024 together",
        "rank_out_of_range",
        Q0,
        {"rank": 1000, "packed": {"ranks": {"2": 25}, "span": 16}},
        ":packed:ranks",
    ),
    # Ranks that do not add up to what is there: by one, or between bands.
    _case(
        "one direction more than there is",
        edit_config(JSON, modules={**MODULES, V1: {"packed": {"ranks": {"4": 4}, "span": 16}}}),
        ("shape_mismatch", f"{V1}.codes"),
        ("shape_mismatch", f"{V1}.scales"),
    ),
    _case(
        "as many bytes in fewer directions",
        edit_config(JSON, modules={**MODULES, V1: {"packed": {"ranks": {"8": 1, "4": 1}, "span": 16}}}),
        ("shape_mismatch", f"{V1}.scales"),
    ),
    _case(
        "another span",
        edit_config(JSON, modules={**MODULES, Q0: {**MODULES[Q0], "packed": {"ranks": {"8": 9}, "span": 32}}}),
        ("shape_mismatch", f"{Q0}.codes"),
        is_exact=False,
    ),
    _module("packed of a norm", "invalid_value", "model.layers.0.input_layernorm", {"packed": {}}),
    _tensor("codes missing", "missing_tensor", f"{V1}.codes", None),
    _tensor("scales missing", "missing_tensor", f"{V1}.scales", None),
    _tensor("a byte too few", "shape_mismatch", f"{V1}.codes", torch.zeros(NUM_CODES - 1, dtype=torch.uint8)),
    _tensor("codes in two dimensions", "shape_mismatch", f"{V1}.codes", torch.zeros(1, NUM_CODES, dtype=torch.uint8)),
    _tensor("a scale too many", "shape_mismatch", f"{V1}.scales", torch.ones(NUM_SCALES + 1)),
    _tensor("codes that are integers", "unsupported_dtype", f"{V1}.codes", torch.zeros(NUM_CODES, dtype=torch.int32)),
    _tensor("codes that are numbers", "unsupported_dtype", f"{V1}.codes", torch.zeros(NUM_CODES)),
    _tensor("scales that are bytes", "unsupported_dtype", f"{V1}.scales", torch.ones(NUM_SCALES, dtype=torch.uint8)),
    _tensor("NaN in the scales", "non_finite", f"{V1}.scales", set_value(float("nan"))),
    _tensor("infinity in the scales", "non_finite", f"{Q0}.scales", set_value(float("inf"))),
    _tensor("a huge scale", "value_out_of_range", f"{V1}.scales", torch.full((NUM_SCALES,), 1e20)),
    _tensor("scales whose numbers are huge", "value_out_of_range", f"{V1}.scales", torch.full((NUM_SCALES,), 6e4)),
    _tensor("codes of a plain term", "unexpected_tensor", f"{D1}.codes", torch.zeros(8, dtype=torch.uint8)),
    _module("a matrix of another sort", "invalid_value", D1, {"matrix": "mask"}, ":matrix"),
    _module("a matrix that is a list", "invalid_value", D1, {"matrix": ["delta"]}, ":matrix"),
    _tensor("a matrix missing", "missing_tensor", f"{D1}.delta", None),
    _tensor("a matrix laid out the other way", "shape_mismatch", f"{D1}.delta", torch.ones(24, 16)),
    _tensor("NaN in a matrix", "non_finite", f"{D1}.delta", set_value(float("nan"))),
    _tensor("signs without a scale", "missing_tensor", f"{Q1}.scale", None),
    _tensor("one scale for all rows", "shape_mismatch", f"{Q1}.scale", torch.ones(1)),
    _tensor("signs of floats", "unsupported_dtype", f"{Q1}.signs", torch.ones(16, 1)),
    _tensor(
        "signs past the last column",
        "index_out_of_range",
        f"{Q1}.signs",
        torch.full((16, 1), 1 << 16, dtype=torch.int32),
    ),
)
