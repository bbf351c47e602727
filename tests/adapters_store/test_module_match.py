"""Which modules a config means: PEFT's own functions are the oracle."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from deltaserve_store.formats.module_match import PatternTable, TargetRules, is_pattern_key
from deltatest.adapter_corpus import corpus_base

MODULES = [
    *(
        f"model.layers.{layer}.{path}"
        for layer in (0, 1, 11)
        for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.q_proj", "mlp.experts.3.up_proj")
    ),
    "transformer.h.1.attn.c_attn",
    "q_proj",
    "xq_proj",
    "h.1.up_proj",
]
ENDINGS = [
    "q_proj",
    "v_proj",
    "up_proj",
    "self_attn.q_proj",
    "mlp.up_proj",
    "1.self_attn.v_proj",
    "layers.1.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.11.self_attn.q_proj",
    "c_attn",
    "attn.q_proj",
    "proj",
]


@settings(max_examples=400, deadline=None)
@given(
    targets=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4),
    excluded=st.lists(st.sampled_from(ENDINGS), max_size=2),
    layers=st.none() | st.lists(st.sampled_from([0, 1, 3, 11, 5]), max_size=3),
    pattern=st.sampled_from([None, "layers", "h", "experts", "model.layers"]),
)
def test_targets_as_peft_finds_them(
    targets: list[str], excluded: list[str], layers: list[int] | None, pattern: str | None
) -> None:
    config = SimpleNamespace(
        target_modules=set(targets),
        exclude_modules=set(excluded),
        layers_to_transform=layers,
        layers_pattern=pattern,
        modules_to_save=None,
        target_parameters=None,
    )
    rules = TargetRules(
        frozenset(targets), frozenset(excluded), frozenset(layers) if layers else None, (pattern,) if pattern else ()
    )
    for module in MODULES:
        found = check_target_module_exists(config, module)
        assert rules.matches(module) == bool(found), module


KEYS = [
    *ENDINGS,
    r"layers\.\d+\.mlp",
    r"layers.\d+.mlp.up_proj",
    "^q_proj",
    "^model.layers.1.mlp.up_proj$",
    ".*up_proj",
]


@settings(max_examples=400, deadline=None)
@given(keys=st.lists(st.sampled_from(KEYS), max_size=5, unique=True))
def test_patterns_as_peft_finds_them(keys: list[str]) -> None:
    patterns = {key: float(index) for index, key in enumerate(keys)}
    table = PatternTable(patterns)
    for module in MODULES:
        assert table.value_for(module, -1.0) == patterns.get(get_pattern_key(list(patterns), module), -1.0)


@pytest.mark.parametrize("key", [*KEYS, "q-proj", "layers.[0-9]+.q_proj"])
def test_keys_people_write(key: str) -> None:
    assert is_pattern_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "(a+)+",
        "a|b",
        "a*",
        "[a-z]+",
        "a{3}",
        ".*.*q",
        ".*a.*b",
        r"\d+\d+\d+\d+",
        r"\w+",
        "a\\",
        "q_proj\n",
        "a" * 257,
        "é",
        "(?i)q",
    ],
)
def test_keys_that_could_hurt(key: str) -> None:
    assert not is_pattern_key(key)


def test_accepted_keys_cost_little() -> None:
    """The worst of the grammar against a long path, and the most keys a config may have."""
    module = "a." * 120 + "q_proj"
    hard = r"\d+.*\d+" + "a." * 100 + "x"
    assert is_pattern_key(hard)
    before = time.monotonic()
    PatternTable({hard: 1.0}).value_for(module, 0.0)
    PatternTable({f"layers.{i}.self_attn.q_proj": 1.0 for i in range(2048)}).value_for(MODULES[0], 0.0)
    assert time.monotonic() - before < 2.0


def test_all_linear_leaves_the_head_out() -> None:
    rules = TargetRules(None, frozenset({"down_proj"}))
    base = corpus_base()
    assert rules.select(base) == tuple(name for name in base.linears if "down_proj" not in name)
    assert not rules.matches("lm_head")
