"""Any two families in one request: the sum made by hand, or the refusal that docs/api.md tells; with depth profiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.core import Binding, BindingPart
from deltaserve.deltas.composition import RULES, check_composition, traits_of
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.errors import CompositionRefused
from deltaserve.model.base import BaseModel, load_base
from deltatest.apart_adapters import make_bottleneck, make_dense
from deltatest.block_adapters import make_blocks
from deltatest.composed_judge import ComposedJudge
from deltatest.engine_fakes import request as make_request
from deltatest.peft_adapters import make_gates, make_peft_ia3, make_peft_ln_tuning, make_peft_lora, make_peft_shira
from deltatest.peft_adapters import make_sparse as make_entries
from deltatest.prefix_adapters import make_prefix
from deltatest.real_engine import fold_folder, real_rig
from deltatest.rotation_kinds import make_rotation
from deltatest.sum_of_deltas import Parts, Strength, binding_of
from deltatest.tiny_models import build_tiny_model
from deltatest.vocabulary_adapters import TOKENS, make_vocabulary_adapter

torch.set_num_threads(1)

# Two adapters of each family; "dora" is one of two families.
OF_FAMILY: dict[str, tuple[str, str]] = {
    "block": ("both", "s2ft"),
    "bottleneck": ("serial", "parallel"),
    "dense": ("delta", "mask"),
    "lora": ("lora", "dora"),
    "prefix": ("given", "prompt"),
    "rotation": ("oft", "road"),
    "rows": ("tokens", "saved"),
    "sparse": ("entries", "shira"),
    "vector": ("norms", "ia3"),
}
IDS = [*TOKENS, 5, 17]
MIXED_SIDES = {
    frozenset(pair) for pair in (("oft", "road"), ("oft", "dora"), ("oft", "ia3"), ("road", "ia3"), ("dora", "ia3"))
}
"""Of all pairs: one changes inputs of a linear whose outputs the other changes."""


@dataclass
class Setting:
    base: BaseModel
    model: Any
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]
    plain: Tensor = field(default_factory=lambda: torch.zeros(0))

    def judge(self, parts: Parts) -> Tensor:
        return ComposedJudge(self.model, self.base, self.folders, parts).logits(IDS)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("pairs")
    folder = build_tiny_model("llama", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "digests")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    spec = base.spec
    on_rows: Any = {"target": "q_proj", "norm": "norm"}
    makers: dict[str, Callable[[Path], Path]] = {
        "both": lambda to: make_blocks("both", spec, to, seed=1, std=0.1),
        "s2ft": lambda to: make_blocks("s2ft", spec, to, seed=2, std=0.1),
        "serial": lambda to: make_bottleneck(spec, to, seed=3, std=0.1),
        "parallel": lambda to: make_bottleneck(spec, to, parallel=True, seed=4, std=0.1),
        "delta": lambda to: make_dense(spec, to, "delta", seed=5),
        "mask": lambda to: make_dense(spec, to, "thick-mask", seed=6),
        "lora": lambda to: make_peft_lora(model, to, rank=3, std=0.1, seed=7),
        "dora": lambda to: make_peft_lora(model, to, rank=2, use_dora=True, std=0.1, seed=8),
        "given": lambda to: make_prefix(model, to, "prefix", seed=9),
        "prompt": lambda to: make_prefix(model, to, "prompt", seed=10),
        "oft": lambda to: make_rotation(model, to, "oft", seed=11),
        "road": lambda to: make_rotation(model, to, "road-1", seed=12),
        "tokens": lambda to: make_vocabulary_adapter("tokens-alone", model, to, seed=13, **on_rows),
        "saved": lambda to: make_vocabulary_adapter("saved", model, to, seed=14, **on_rows),
        "entries": lambda to: make_entries(spec, to, seed=15),
        "shira": lambda to: make_peft_shira(model, to, std=0.2, seed=16),
        "norms": lambda to: make_peft_ln_tuning(model, to, std=0.1, seed=17),
        "ia3": lambda to: make_peft_ia3(model, to, std=0.1, seed=18),
        "gates": lambda to: make_gates(spec, to, seed=19),
    }
    folders = {name: make(root / name) for name, make in makers.items()}
    return Setting(base, model, folders, {name: fold_folder(path, base) for name, path in folders.items()})


def strength_of(setting: Setting, name: str, place: int) -> Strength:
    """One that differs by place, where the kinds of the adapter have one."""
    is_switch = any(RULES[family].is_switch for family in setting.adapters[name].kinds)
    return 1.0 if is_switch else (0.7, -0.4)[place]


def pairs_of(setting: Setting) -> list[Parts]:
    """Of each two families, also of one twice, the first's first adapter and the second's second, in both orders by
    turns."""
    found: list[Parts] = []
    for index, (one, other) in enumerate(combinations_with_replacement(OF_FAMILY, 2)):
        names = (OF_FAMILY[one][0], OF_FAMILY[other][1])
        chosen = names[::-1] if index % 2 else names
        found.append(tuple((name, strength_of(setting, name, place)) for place, name in enumerate(chosen)))
    return found


def first_rows(setting: Setting, work: list[Parts]) -> list[Tensor]:
    """The row of the prompt's last token of each, all in the same steps."""
    rig = real_rig(setting.base, setting.adapters, num_slots=len(setting.adapters), max_num_batched_tokens=2048)
    rig.run(*(make_request(str(i), IDS, binding=binding_of(parts), max_tokens=1) for i, parts in enumerate(work)))
    return [rig.runner.rows[i][0] for i in range(len(work))]


def test_the_adapters_are_of_their_families(setting: Setting) -> None:
    assert set(OF_FAMILY) == set(RULES)
    for family, names in OF_FAMILY.items():
        assert all(family in setting.adapters[name].kinds for name in names)


def test_pairs_of_all_families_are_sums_or_refused(setting: Setting) -> None:
    pairs = pairs_of(setting)
    allowed = [parts for parts in pairs if frozenset(name for name, _ in parts) not in MIXED_SIDES]
    assert len(pairs) == 45
    assert len(pairs) - len(allowed) == 2  # rotations of both sides; inputs turned, outputs scaled
    alone_of = {part: setting.judge((part,))[-1] for parts in allowed for part in parts}
    for parts, found in zip(allowed, first_rows(setting, allowed), strict=True):
        wanted = setting.judge(parts)[-1]
        limit = 1e-4 * max(1.0, float(wanted.square().mean().sqrt()))
        assert float((found - wanted).abs().max()) < limit, parts
        for alone in parts:
            assert float((alone_of[alone] - wanted).abs().max()) > 20 * limit, (parts, alone)


def test_which_pairs_are_refused(setting: Setting) -> None:
    traits = {name: traits_of(adapter) for name, adapter in setting.adapters.items()}
    refused, codes = set(), set()
    for pair in combinations(traits, 2):
        binding = Binding(tuple(BindingPart(name) for name in pair))
        try:
            check_composition(binding, [traits[name] for name in pair])
        except CompositionRefused as error:
            codes |= {reason.code for reason in error.reasons}
            refused.add(frozenset(pair))
    gated = {frozenset(("gates", name)) for name in ("dora", "road", "ia3", "oft")}
    assert refused == MIXED_SIDES | gated
    assert codes == {"mixed_sides"}


PROFILES: dict[str, Strength] = {
    "both": (0.3, 1.0),
    "s2ft": (-1.0, 0.5),
    "serial": (0.3, 1.0),
    "parallel": (1.0, 0.0),
    "delta": (0.3, 1.0),
    "mask": (1.0, 0.2),
    "lora": (0.3, 1.0),
    "dora": (0.3, 1.0),
    "tokens": (0.3, 1.0),
    "saved": (0.3, 1.0),
    "entries": (0.3, 1.0),
    "shira": (2.0, 0.0),
    "norms": (0.3, 1.0),
    "ia3": (0.3, 1.0),
    "gates": (0.3, 1.0),
}


def test_profiles_over_depth_of_every_family_that_has_strengths(setting: Setting) -> None:
    assert set(PROFILES) == {n for n in setting.adapters if strength_of(setting, n, 0) != 1.0}
    for (name, strength), found in zip(
        PROFILES.items(), first_rows(setting, [((name, at),) for name, at in PROFILES.items()]), strict=True
    ):
        wanted = setting.judge(((name, strength),))[-1]
        limit = 1e-4 * max(1.0, float(wanted.square().mean().sqrt()))
        assert float((found - wanted).abs().max()) < limit, name
        assert isinstance(strength, tuple)
        for end in (1.0, strength[0], strength[1]):
            other = setting.judge(((name, end),))[-1]
            assert float((other - wanted).abs().max()) > 20 * limit, (name, end)


def test_as_many_as_there_may_be_and_0_of_everything(setting: Setting) -> None:
    """Eight parts of eight families; and all of those at 0, which is the base to the bit."""
    names = ("given", "lora", "entries", "norms", "tokens", "both", "delta", "serial")
    eight: Parts = tuple((name, strength_of(setting, name, i % 2)) for i, name in enumerate(names))
    none: Parts = tuple((name, 0.0) for name in (*names[:7], "oft"))
    found = first_rows(setting, [eight, none, ()])
    wanted = setting.judge(eight)[-1]
    assert float((found[0] - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.square().mean().sqrt()))
    assert torch.equal(found[1], found[2])
    nine = (*eight, ("shira", 1.0))
    rig = real_rig(setting.base, setting.adapters)
    with pytest.raises(Exception, match="composes 9 adapters; at most 8 are allowed"):
        rig.run(make_request("r", IDS, binding=binding_of(nine)))
