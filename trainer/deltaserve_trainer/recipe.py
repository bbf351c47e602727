"""What a training run is asked to do: frozen, complete, resolved once and stored with the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltaserve_trainer.data import DataFormat
from deltaserve_trainer.errors import RecipeInvalid


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraOptions(_Frozen):
    """Low-rank adapters (Hu et al. 2021; rank-stabilised scaling: Kalajdzievski 2023).

    ``rank_pattern`` and ``alpha_pattern`` give single modules their own values (peft's regular expressions over module
    names). ``target_modules`` None means every linear of the decoder layers.
    """

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    rslora: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    target_modules: tuple[str, ...] | None = None


class SparseOptions(_Frozen):
    """Sparse fine-tuning with a fixed mask: exactly ``num_entries`` weights (or ``density`` of the targeted ones).

    ``selection`` "gradient" takes the entries with the largest sum of squared gradients over ``selection_steps``
    batches (Sung et al. 2021, FISH mask); "magnitude" those that moved most in ``selection_steps`` steps of dense
    training, which is then undone (Ansell et al. 2022, LT-SFT).
    """

    num_entries: int | None = Field(None, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    selection: Literal["gradient", "magnitude"] = "gradient"
    selection_steps: int = Field(16, ge=1)
    target_modules: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> SparseOptions:
        if (self.num_entries is None) == (self.density is None):
            raise ValueError("give exactly one of num_entries and density")
        return self


class Recipe(_Frozen):
    """Every setting of a run. Lengths in tokens; ``eval_every`` and ``checkpoint_every`` in steps.

    ``epochs`` counts unless ``max_steps`` is given. ``micro_batch_size`` rows go through the model at once; the step is
    that of ``batch_size`` rows all the same. ``patience`` stops the run after so many evaluations without a better
    held-out loss. Rows are cut at ``max_length`` or at the base's context,
    whichever is less. ``precision`` "bfloat16" computes in bfloat16 over float32 weights. ``save_dtype`` is that of the
    adapter file; what is evaluated is what is saved.
    """

    method: Literal["lora", "sparse"] = "lora"
    lora: LoraOptions | None = None
    sparse: SparseOptions | None = None
    data_format: DataFormat | None = None
    seed: int = Field(0, ge=0, le=2**31 - 1)
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    max_length: int = Field(1024, ge=8)
    learning_rate: float = Field(5e-4, gt=0)
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    eval_every: int = Field(50, ge=1)
    max_eval_rows: int = Field(256, ge=1)
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    patience: int | None = Field(None, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _options_of_the_method(self) -> Recipe:
        other = "sparse" if self.method == "lora" else "lora"
        if getattr(self, other) is not None:
            raise ValueError(f"{other} options have no effect with method {self.method}; remove them")
        if getattr(self, self.method) is None:
            raise ValueError(f"{self.method} options are missing")
        return self

    def to_json(self) -> str:
        """The effective configuration, as stored in the run directory."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


# Chosen for adapters of small bases on little hardware; every key can be overridden.
_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"epochs": 1.0, "learning_rate": 2e-3, "eval_every": 25, "max_length": 512, "max_eval_rows": 64},
    "balanced": {"epochs": 3.0, "learning_rate": 1e-3},
    "quality": {"epochs": 6.0, "learning_rate": 5e-4, "max_length": 2048, "max_eval_rows": 1024, "patience": 5},
}
_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "quick": {"rank": 8, "alpha": 16.0},
        "balanced": {"rank": 16, "alpha": 32.0},
        "quality": {"rank": 32, "alpha": 64.0},
    },
    "sparse": {
        "quick": {"density": 0.01},
        "balanced": {"density": 0.02},
        "quality": {"density": 0.05, "selection": "magnitude", "selection_steps": 64},
    },
}
PRESETS = tuple(_PRESETS)


def resolve_recipe(preset: str = "balanced", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A preset with ``overrides`` on top; keys may be dotted ("lora.rank"). Raises ``RecipeInvalid``."""
    if preset not in _PRESETS:
        raise RecipeInvalid(f"preset {preset!r} is unknown; allowed: {', '.join(PRESETS)}", param="preset")
    given = _nest(overrides or {})
    method = given.get("method", "lora")
    options = dict(_METHODS.get(method, {}).get(preset, {})) if isinstance(method, str) else {}
    own = given.pop(method, None) or {} if isinstance(method, str) else {}
    if not isinstance(own, dict):
        raise RecipeInvalid(f"{method} is a {type(own).__name__}; expected keys and values", param=str(method))
    if "num_entries" in own:
        options.pop("density", None)
    return _validated({**_PRESETS[preset], **given, str(method): {**options, **own}})


def load_recipe(path: Path) -> Recipe:
    """The recipe that ``Recipe.to_json`` wrote."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeInvalid(f"{path.name} cannot be read: {error}") from error
    return _validated(content)


def _validated(content: Any) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise RecipeInvalid("the recipe is invalid: " + "; ".join(found), param=found[0].split(":")[0]) from error


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise RecipeInvalid(f"{key} is below {parent}, which has a value of its own", param=key)
        if isinstance(value, Mapping) and isinstance(place.get(leaf), dict):
            place[leaf].update(value)
        else:
            place[leaf] = dict(value) if isinstance(value, Mapping) else value
    return nested
