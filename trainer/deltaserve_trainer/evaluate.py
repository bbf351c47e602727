"""Base against adapter: loss on held-out target data (gain) and on general text (forgetting), and answers of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaserve.tinybase import DEMO_DATA
from deltaserve_trainer.base import Base, load_model
from deltaserve_trainer.data import Example, read_dataset
from deltaserve_trainer.encoding import EncodedExample, Encoder
from deltaserve_trainer.errors import DataInvalid
from deltaserve_trainer.loss import mean_loss
from deltaserve_trainer.methods import Method, load_method
from deltaserve_trainer.report import encode_all

BUNDLED_GENERAL_TEXT = DEMO_DATA / "general.eval.jsonl"
NUM_SAMPLES = 4
MAX_SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt, the answer in the data, and the greedy answers."""

    prompt: str
    expected: str
    base: str
    adapter: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean nats per trained token."""

    base_target: float
    adapter_target: float
    base_general: float
    adapter_general: float
    num_target_rows: int
    num_general_rows: int
    samples: tuple[Sample, ...] = ()

    @property
    def gain(self) -> float:
        """How much better the adapter is on target data, nats per token."""
        return self.base_target - self.adapter_target

    @property
    def forgetting(self) -> float:
        """How much worse the adapter is on general text, nats per token; negative is better."""
        return self.adapter_general - self.base_general

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain, "forgetting": self.forgetting}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Evaluation:
        fields = {key: value for key, value in content.items() if key not in ("gain", "forgetting", "samples")}
        return cls(**fields, samples=tuple(Sample(**sample) for sample in content["samples"]))


def evaluate_method(
    method: Method,
    encoder: Encoder,
    *,
    target: Sequence[EncodedExample],
    general: Sequence[EncodedExample],
    sample_rows: Sequence[Example],
    batch_size: int,
    precision: str,
) -> Evaluation:
    """Measure ``method`` with its adapter on and off."""

    def loss(rows: Sequence[EncodedExample]) -> float:
        pad = encoder.pad_token_id
        return mean_loss(method.model, rows, batch_size=batch_size, pad_token_id=pad, precision=precision)

    def losses() -> tuple[float, float, list[str]]:
        answers = [greedy_answer(method, encoder, encoder.prompt_ids(row)) for row in sample_rows]
        return loss(target), loss(general), answers

    method.model.eval()
    adapter_target, adapter_general, adapter_answers = losses()
    with method.disabled():
        base_target, base_general, base_answers = losses()
    samples = tuple(
        Sample(encoder.decode(encoder.prompt_ids(row)), row.turns[-1].content, base, adapter)
        for row, base, adapter in zip(sample_rows, base_answers, adapter_answers, strict=True)
    )
    return Evaluation(base_target, adapter_target, base_general, adapter_general, len(target), len(general), samples)


@torch.no_grad()
def greedy_answer(
    method: Method, encoder: Encoder, prompt_ids: Sequence[int], max_tokens: int = MAX_SAMPLE_TOKENS
) -> str:
    """The most likely continuation, to the end token or ``max_tokens``."""
    from transformers import GenerationConfig

    model: Any = method.model
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt_ids)], device=device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(encoder.eos_token_ids),
        pad_token_id=encoder.pad_token_id,
    )
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return encoder.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def evaluate_adapter(
    base: Base,
    adapter_folder: Path,
    data: Path,
    *,
    general_data: Path | None = None,
    max_rows: int = 256,
    max_length: int = 1024,
    batch_size: int = 16,
    device: str = "cpu",
) -> Evaluation:
    """Measure any adapter folder that the store's checks accept on the rows of ``data``.

    Without ``general_data`` the bundled general text is used. Raises ``DataInvalid`` for the data and the store's
    ``AdapterInvalid`` for the adapter.
    """
    encoder = Encoder.from_folder(base.folder, max_length)
    examples = read_dataset(data).examples[:max_rows]
    target, _ = encode_all(encoder, examples)
    if not target:
        raise DataInvalid(data.name, [f"no row has a trained token within {max_length} tokens"], 1)
    general = read_general(general_data or BUNDLED_GENERAL_TEXT, encoder, max_rows)
    method = load_method(load_model(base.folder, device=device), adapter_folder, base)
    return evaluate_method(
        method,
        encoder,
        target=target,
        general=general,
        sample_rows=examples[:NUM_SAMPLES],
        batch_size=batch_size,
        precision="float32",
    )


def read_general(path: Path, encoder: Encoder, max_rows: int) -> list[EncodedExample]:
    """The first ``max_rows`` rows of general text, encoded. Raises ``DataInvalid``."""
    rows, _ = encode_all(encoder, read_dataset(path).examples[:max_rows])
    if not rows:
        raise DataInvalid(path.name, ["no row of general text has a trained token within max_length"], 1)
    return rows
