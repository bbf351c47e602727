"""The model card that travels with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaserve_trainer.base import Base
from deltaserve_trainer.evaluate import Evaluation
from deltaserve_trainer.recipe import Recipe


def render_card(
    *,
    title: str,
    base: Base,
    recipe: Recipe,
    data: Mapping[str, Any],
    evaluation: Evaluation,
    best_step: int,
    num_entries: int,
    parity: Mapping[str, Any] | None = None,
) -> str:
    """Markdown: base, data, hyperparameters, evaluation against the base, parity with the engine."""
    lines = [
        f"# {title}",
        "",
        f"A {'LoRA' if recipe.method == 'lora' else 'sparse'} adapter for `{base.name}`.",
        "",
        f"- Base fingerprint: `{base.fingerprint}`",
        f"- Trained numbers: {num_entries:,} ({recipe.save_dtype})",
        f"- Best state: training step {best_step}",
        "",
        "## Data",
        "",
        f"- {data['num_train_rows']} training and {data['num_eval_rows']} held-out rows, format {data['format']}",
        f"- {data['num_train_tokens']:,} tokens, of which {data['masked_token_share']:.0%} carry no loss",
        f"- SHA-256 of the training file: `{data['sha256']}`",
        "",
        "## Evaluation",
        "",
        "Mean loss in nats per trained token; the last column is adapter minus base.",
        "",
        "| | base | adapter | change |",
        "| --- | --- | --- | --- |",
        f"| held-out target ({evaluation.num_target_rows} rows) | {evaluation.base_target:.4f} | "
        f"{evaluation.adapter_target:.4f} | {-evaluation.gain:+.4f} |",
        f"| general text ({evaluation.num_general_rows} rows) | {evaluation.base_general:.4f} | "
        f"{evaluation.adapter_general:.4f} | {evaluation.forgetting:+.4f} |",
        "",
    ]
    if parity is not None:
        lines += [
            f"Parity: over {parity['num_tokens']} tokens the engine's logits differ from the trainer's by at most "
            f"{parity['max_difference']:.2e} (allowed {parity['tolerance']:.2e}).",
            "",
        ]
    for sample in evaluation.samples:
        lines += ["```text", sample.prompt.replace("```", "'''").strip(), "", f"base:    {_one_line(sample.base)}"]
        lines += [f"adapter: {_one_line(sample.adapter)}", "```", ""]
    lines += ["## Recipe", "", "```json", recipe.to_json().strip(), "```", ""]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.replace("```", "'''").split())
