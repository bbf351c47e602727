"""PEFT folders whose vocabulary has grown: tokens added to the base's tokenizer, matrices resized, saved."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltatest.peft_adapters import edit_config

ADDED = ("<|tool|>", "<|end_of_tool|>", "wolpertinger")
"""The last one is no control token."""
KNOWN = 41
"""A token of the base that is trained too."""
KINDS = ("copied", "trained", "trained-padded", "saved", "alone")


class Grown(NamedTuple):
    """``model`` [grown] is what PEFT puts the adapter in ``folder`` on; ``tokenizer`` knows the tokens ``ids``."""

    folder: Path
    model: Any
    tokenizer: Any
    ids: tuple[int, ...]


def make_grown(
    kind: str, model: torch.nn.Module, tokenizer: Any, folder: Path, *, seed: int = 0, base_name: str = "tiny-base"
) -> Grown:
    """``copied``: a LoRA, and the resized matrices as PEFT copies them. ``trained``: rows of added tokens and a known
    one, no copies; ``trained-padded``: resized to a multiple of 64, with copies. ``saved``: whole matrices. ``alone``:
    trainable tokens without a LoRA, with copies. Added rows are large, so that answers have such tokens."""
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model
    from transformers import AddedToken

    grown, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=text.startswith("<")) for text in ADDED])
    ids = tuple(tokenizer.convert_tokens_to_ids(list(ADDED)))
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        resized: Any = grown
        resized.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64 if kind == "trained-padded" else None)
        for matrix in {resized.get_input_embeddings(), resized.get_output_embeddings()}:
            rows = matrix.weight[ids[0] :]
            rows.copy_(randn(*rows.shape) * matrix.weight[: ids[0]].std() * 2)
            rows[len(ids) :] = 0  # rows of no token, which the server leaves out
        is_tied = resized.get_input_embeddings().weight is resized.get_output_embeddings().weight
        trained: Any = [*ids, KNOWN] if is_tied else {"embed_tokens": [*ids, KNOWN], "lm_head": [*ids, KNOWN]}
        lora: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        config: Any
        if kind == "alone":
            targets = None if is_tied else ["embed_tokens", "lm_head"]
            config = TrainableTokensConfig(token_indices=[*ids, KNOWN], target_modules=targets, task_type="CAUSAL_LM")
        elif kind.startswith("trained"):
            config = LoraConfig(trainable_token_indices=trained, **lora)
        elif kind == "saved":
            config = LoraConfig(modules_to_save=["embed_tokens", "lm_head"], **lora)
        else:
            config = LoraConfig(**lora)
        wrapped = get_peft_model(copy.deepcopy(grown), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(randn(*parameter.shape) * 0.2)
            elif "trainable_tokens_delta" in name:
                parameter.add_(randn(*parameter.shape) * parameter.std())
            elif ".modules_to_save." in name:
                parameter[[*ids, KNOWN]] += randn(len(ids) + 1, parameter.shape[1]) * parameter.std()
        wrapped.save_pretrained(str(folder), save_embedding_layers=kind not in ("trained", "saved"))
    edit_config(folder, base_model_name_or_path=base_name)
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return Grown(folder, grown, tokenizer, ids)
