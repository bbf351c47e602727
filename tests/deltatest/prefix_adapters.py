"""One adapter of each PEFT kind of virtual tokens, written by PEFT itself, and PEFT's own answers as the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltatest.peft_adapters import edit_config

BASE_NAME = "tests/tiny-base"

# Name -> (PEFT's config class, its options, spread of the trained values). Lengths around the border of a block of 16.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}, 1.0),
    "prefix-projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 16, "prefix_projection": True, "encoder_hidden_size": 12},
        0.7,
    ),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 37, "num_frozen_tokens": 2}, 1.0),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 20}, 0.5),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 1, "encoder_hidden_size": 24}, 0.4),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 17, "encoder_hidden_size": 24, "encoder_reparameterization_type": "LSTM"},
        0.5,
    ),
    "multitask": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 15, "num_tasks": 1, "num_ranks": 3}, 0.6),
    "cpt": ("CPTConfig", {"cpt_token_ids": [4, 9, 30, 11, 8, 60, 7]}, 0.5),
}


def num_tokens(name: str) -> int:
    options = CASES[name][1]
    return options.get("num_virtual_tokens") or len(options["cpt_token_ids"])


def make_prefix(model: Any, folder: Path, name: str, *, seed: int = 0, **options: Any) -> Path:
    """Write the adapter of case ``name``, every trained value random; ``options`` override those of the case."""
    import peft

    config_class, case_options, spread = CASES[name]
    config = getattr(peft, config_class)(task_type="CAUSAL_LM", **{**case_options, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        # "auto" would ask the hub whether the base's vocabulary was resized.
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    edit_config(folder, base_model_name_or_path=BASE_NAME)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


class Oracle:
    """A model with an adapter of virtual tokens, loaded by PEFT."""

    def __init__(self, model: Any, folder: Path) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
        prepare = self.model.base_model_prepare_inputs_for_generation
        self.model.base_model_prepare_inputs_for_generation = _name_the_cache(prepare)
        config = self.model.active_peft_config
        self.options: dict[str, Any] = {}
        if "MULTITASK" in str(config.peft_type):
            self.options = {"task_ids": torch.tensor([0])}

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 [T, vocab] of the tokens themselves, by one ``forward``."""
        found = self.model(torch.tensor([list(ids)]), **self.options).logits[0].float()
        return found[-len(ids) :]

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """By ``forward`` again and again."""
        tokens = list(ids)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(ids) :]

    @torch.no_grad()
    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """By PEFT's ``generate`` with its cache, end-of-sequence ignored."""
        prompt = torch.tensor([list(ids)])
        self.model.generation_config.eos_token_id = None
        output = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
            **self.options,
        )
        return output[0, len(ids) :].tolist()


def _name_the_cache(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """PEFT 0.21.2 looks for ``past_key_values``, transformers 5.24 says ``cache``: each token would begin anew."""

    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    return prepared
