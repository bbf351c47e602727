"""Small files that ask for much: terms of gigabytes, decompositions of every weight, permutations without end.

Their bases have the shapes of a large model and no weights; the tensors are zeros, since nothing looks at them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltaserve_store.formats.peft_kinds.table import READERS
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltatest.adapter_corpus import CONFIG, PREFIX, TENSORS, corpus_base

LARGE = ((40_960, 40_960),) * 64
FLAT = ((8_192, 16_384),) * 16
"""As large as a linear may be whose positions are drawn."""
MANY_SIZES = tuple((8_192, 16_384 - 64 * i) for i in range(5))
_PSOFT = {
    "psoft_orth": True,
    "psoft_mag_a": False,
    "psoft_mag_b": False,
    "ab_svd_init": "psoft_init",
    "use_cayley_neumann": False,
    "num_cayley_neumann_terms": 5,
}
_FLOPS = "target fewer linears, or serve with more --conversion-flops"
_OTHERWISE = "path_initial_model_for_weight_conversion, or upload the initial factors too, or serve"
_DRAWS = ("permutations of", "fewer sizes")


@dataclass(frozen=True)
class CostCase:
    """A config for a base whose linears have these ``shapes``, and what its refusal names: the place, what was
    found, and a way out."""

    name: str
    kind: str
    options: Mapping[str, Any]
    shapes: tuple[tuple[int, int], ...]
    found: str
    way_out: str
    where: str = CONFIG

    @property
    def base(self) -> BaseSpec:
        names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(len(self.shapes))]
        linears = {name: LinearSpec(name, *shape) for name, shape in zip(names, self.shapes, strict=True)}
        return replace(corpus_base(), linears=linears, num_layers=len(names), registered=tuple(names), norms={})

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        config = {"peft_type": self.kind.upper(), "target_modules": ["q_proj"], **self.options}
        linears = tuple(self.base.linears.values())
        if self.kind == "lora":
            rank, extra = config["r"], {"lora_diag": (config["r"],)} if "kasa_config" in config else {}
            shapes: dict[str, tuple[int, ...]] = {}
            for linear in linears:
                own = {"lora_A.weight": (rank, linear.in_features), "lora_B.weight": (linear.out_features, rank)}
                shapes |= {f"{PREFIX}{linear.name}.{suffix}": shape for suffix, shape in (own | extra).items()}
        else:
            reader = READERS[self.kind.upper()](config, linears, CONFIG)
            rules = dict(reader.shared_layout())
            for linear in linears:
                rules |= {f"{PREFIX}{linear.name}.{suffix}": rule for suffix, rule in reader.layout(linear).items()}
            shapes = {name: rule.shape for name, rule in rules.items()}
        indices = "indices" if self.kind != "lora" else "-"
        tensors = {
            name: torch.zeros(shape, dtype=torch.int32 if indices in name else torch.float16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps(config))
        return folder


def _bytes(
    kind: str,
    options: Mapping[str, Any],
    shapes: tuple[tuple[int, int], ...] = LARGE,
    way_out: str = "train a smaller rank",
) -> CostCase:
    return CostCase("terms of gigabytes", kind, options, shapes, "terms of", way_out)


def _work(kind: str, name: str, options: Mapping[str, Any], way_out: str, where: str = CONFIG) -> CostCase:
    return CostCase(name, kind, options, LARGE, "decompositions of", way_out, where)


def _lora(**options: Any) -> dict[str, Any]:
    return {"r": 1, "lora_alpha": 2, **options}


COST_CORPUS: tuple[CostCase, ...] = (
    _bytes("vera", {"r": 1024, "save_projection": False}),
    _bytes("pvera", {"r": 1024, "save_projection": False}),
    _bytes("miss", {"r": 1024, "init_weights": "mini", "mini_r": 1}),
    _bytes("miss", {"r": 4, "init_weights": "bat"}, shapes=((1_024, 1_048_576),) * 2),
    _bytes("c3a", {"block_size": 40_960}, way_out="a smaller --conversion-rank"),
    _bytes("lokr", {"r": 16, "alpha": 16, "decompose_both": True}),
    _bytes("psoft", {"r": 1024, **_PSOFT}, shapes=((4_096, 524_288),) * 4),
    _bytes("waveft", {"n_frequency": 80_000, "wavelet_family": "db10"}, shapes=FLAT),
    _work("psoft", "the singular vectors of every weight", {"r": 2, **_PSOFT}, _FLOPS),
    _work("lora", "PiSSA", _lora(init_lora_weights="pissa"), _OTHERWISE, f"{CONFIG}:r"),
    _work("lora", "OLoRA", _lora(init_lora_weights="olora"), _OTHERWISE, f"{CONFIG}:r"),
    _work("lora", "KaSA", _lora(kasa_config={}), _FLOPS, f"{CONFIG}:r"),
    CostCase("as many permutations as sizes", "fourierft", {"n_frequency": 1}, MANY_SIZES, *_DRAWS),
    CostCase("as many permutations as sizes", "waveft", {"n_frequency": 1}, MANY_SIZES, *_DRAWS),
)
