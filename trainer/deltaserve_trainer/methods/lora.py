"""LoRA through peft: attach, save in peft's own file format, load again."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaserve_trainer.base import Base, is_transposed, target_linears
from deltaserve_trainer.errors import RecipeInvalid
from deltaserve_trainer.recipe import Recipe


class LoraMethod:
    """A ``PeftModel`` with one adapter named "default"."""

    def __init__(self, model: Any) -> None:
        self.model: nn.Module = model
        self._peft = model

    @classmethod
    def attach(cls, model: nn.Module, recipe: Recipe) -> LoraMethod:
        """New A (random, by the recipe's seed) and B (zero) beside every targeted linear."""
        from peft import LoraConfig, get_peft_model

        options = recipe.lora
        if options is None:
            raise RecipeInvalid("lora options are missing", param="lora")
        targets = target_linears(model, options.target_modules)
        for pattern in (*options.rank_pattern, *options.alpha_pattern):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                raise RecipeInvalid(f"rank or alpha pattern {pattern!r} fits no targeted linear", param="lora")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            use_rslora=options.rslora,
            rank_pattern=dict(options.rank_pattern),
            alpha_pattern=dict(options.alpha_pattern),
            target_modules=_short_names(model, targets),
            fan_in_fan_out=all(is_transposed(linear) for linear in targets.values()),
            bias="none",
        )
        torch.manual_seed(recipe.seed)
        with _without_deprecations():
            return cls(get_peft_model(model, config))

    @classmethod
    def load(cls, model: nn.Module, folder: Path) -> LoraMethod:
        """Attach a saved adapter. The files must have passed the store's check: peft itself accepts too much."""
        from peft import PeftModel

        with _without_deprecations():
            return cls(PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval())

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def structure(self) -> dict[str, Tensor]:
        return {}

    def disabled(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._peft.disable_adapter()
        return context

    def num_entries(self) -> int:
        return sum(p.numel() for p in self.parameters().values())

    def save(self, folder: Path, base: Base, save_dtype: str) -> None:
        """``adapter_config.json`` (lists sorted, the base's id, no path) and ``adapter_model.safetensors``."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, save_dtype)
        tensors = {
            k: v.detach().to("cpu", dtype).contiguous() for k, v in get_peft_model_state_dict(self._peft).items()
        }
        save_file(dict(sorted(tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._peft.peft_config["default"]
        config.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text("utf-8"))
        content["base_model_name_or_path"] = base.name
        content["inference_mode"] = True
        content["target_modules"] = sorted(content["target_modules"])
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """peft reads attributes that newer transformers announce to rename; whoever runs a training cannot act on that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _short_names(model: nn.Module, targets: dict[str, nn.Module]) -> list[str]:
    """Leaf names where they pick exactly the targets, else whole paths (peft matches by suffix)."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in targets})
    picked = {
        name for name, _ in model.named_modules() if any(name == leaf or name.endswith("." + leaf) for leaf in leaves)
    }
    return leaves if picked == set(targets) else sorted(targets)
