"""What is tried with every type, and how a case of one type is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deltaserve_store.formats.peft_kinds.reader import TensorRule
from deltaserve_store.formats.peft_kinds.table import READERS
from deltatest.adapter_corpus import CONFIG, PREFIX, BadAdapter, corpus_base, edit_config, edit_tensors, set_value
from deltatest.kind_corpus.good import CONFIGS, TARGETED, V0, V0_TENSOR


def _tensor_names(kind: str) -> Iterator[tuple[str, TensorRule]]:
    """Shared tensors, and those of one linear."""
    config = {"target_modules": list(TARGETED), **CONFIGS[kind]}
    linears = tuple(linear for name, linear in corpus_base().linears.items() if name.endswith(TARGETED))
    reader = READERS[kind.upper()](config, linears, CONFIG)
    yield from reader.shared_layout().items()
    for suffix, rule in reader.layout(corpus_base().linears[V0]).items():
        yield f"{V0_TENSOR}.{suffix}", rule


def damage(kind: str) -> Iterator[BadAdapter]:
    """What is tried with every tensor of every type, and with every config."""
    for name, rule in _tensor_names(kind):
        short = name.removeprefix(f"{V0_TENSOR}.")
        longer = (*rule.shape[:-1], rule.shape[-1] + 1)

        def case(what: str, code: str, value: Any, name: str = name, short: str = short) -> BadAdapter:
            return BadAdapter(f"{short} {what}", kind, edit_tensors({name: value}), ((code, name),))

        if not rule.optional:
            yield case("missing", "missing_tensor", None)
        yield case("of another shape", "shape_mismatch", lambda old, shape=longer: torch.ones(shape, dtype=old.dtype))
        yield case("of one more dimension", "shape_mismatch", lambda old: old.reshape(1, -1, 1)[:, :, :])
        if "F32" in rule.dtypes:
            yield case("with NaN", "non_finite", set_value(float("nan")))
            yield case("with infinity", "non_finite", lambda old: set_value(float("-inf"))(old.bfloat16()))
            yield case("with a huge value", "value_out_of_range", set_value(1e30))
            yield case("of integers", "unsupported_dtype", lambda old: old.to(torch.int32))
        else:
            yield case("of floats", "unsupported_dtype", lambda old: old.float())
    stray = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    yield BadAdapter("a stray tensor", kind, edit_tensors({stray: torch.ones(4, 24)}), (("unexpected_tensor", stray),))
    for field, value, code in (
        ("wings", 2, "unknown_field"),
        ("target_modules", ".*_proj", "regex_target"),
        ("target_modules", ["q_proj", "lm_head"], "unsupported_target"),
        ("task_type", "SEQ_CLS", "unsupported_feature"),
        ("modules_to_save", ["lm_head"], "unknown_module"),
        ("modules_to_save", ".*", "invalid_value"),
        ("bias", "some", "unsupported_feature" if kind == "glora" else "invalid_value"),
    ):
        if field in READERS[kind.upper()].fields or field == "wings":
            name = f"{field}={json.dumps(value)}"
            yield BadAdapter(name, kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),))


def config_case(kind: str, field: str, value: Any, code: str) -> BadAdapter:
    name = f"config {field}={json.dumps(value)[:60] if value is not ... else 'missing'}"
    return BadAdapter(name, kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),))


def among(kind: str, name: str, spoil: Callable[[Path], None], *reasons: tuple[str, str]) -> BadAdapter:
    """A case whose reasons are among others (one wrong rank misshapes every tensor)."""
    return BadAdapter(name, kind, spoil, reasons, is_exact=False)


def in_turn(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def raised(amount: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda old: old + amount
