"""The page docs/adapter-kinds.md; ``python -m deltaserve_store.formats.peft_kinds.page`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from deltaserve_store.formats.peft_fields import MAX_RANK, FieldRule
from deltaserve_store.formats.peft_kinds.table import READERS, REFUSED

_INTRO = f"""# Kinds of adapters

Made from the code by `python -m deltaserve_store.formats.peft_kinds.page`; edit the readers, not this page.

The server adds terms to a linear `y = W x + b`: low rank, `B (A x)`, sparse, `S x`, and dense blocks of some rows and
columns; it serves vectors: scales, biases and norm differences; and trained rows of embedding and head. Every kind
below is exactly made of them. What PEFT stores in another parametrisation is converted when the adapter is read, in
float32, before the one cast to the serving dtype; nothing is approximated. The proof at the door compares the engine
with the base plus the method's own formula, evaluated from the file's tensors, so that it would also find a wrong
conversion. Low-rank terms are served at their exact rank, at most {MAX_RANK}; a higher one is refused with the rank
found (`rank_out_of_range`).

Files, targets, base names and reason codes are those of [adapter-format.md](adapter-format.md).

## Served
"""

_OWN = (
    ("LoRA", "`peft-lora`", "`lora_A`, `lora_B`", "`alpha / r · B A`", "low rank, rank r", "see adapter-format.md"),
    (
        "SHiRA",
        "`peft-shira`",
        "`shira_indices`, `shira_weight`",
        "entries at their positions",
        "sparse",
        "see adapter-format.md",
    ),
    ("IA3", "`peft-ia3`", "`ia3_l`", "scales of outputs or inputs", "vector", "see adapter-format.md"),
    ("LN tuning", "`peft-ln-tuning`", "`ln_tuning_layers`", "differences of norms", "vector", "see adapter-format.md"),
    (
        "Trainable tokens",
        "`peft-trainable-tokens`",
        "`trainable_tokens_delta`",
        "rows of embedding and head, in place of the base's",
        "rows",
        "see adapter-format.md",
    ),
    (
        "deltaserve vectors",
        "`deltaserve-vectors`",
        "named vectors",
        "scales, biases, norms",
        "vector",
        "see adapter-format.md",
    ),
    (
        "deltaserve blocks",
        "`deltaserve-blocks`",
        "`block`; `rows`, `cols`",
        "a dense block at these rows and columns",
        "block",
        "see adapter-format.md",
    ),
    (
        "deltaserve sparse",
        "`deltaserve-sparse`",
        "`rows`, `cols`, `values`",
        "entries at their positions",
        "sparse",
        "see adapter-format.md",
    ),
)

_INITIAL = """
## LoRA that changes the base at its start

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base before they train. A file of such a training fits only that
changed base, and is refused (`unsupported_feature`) as long as its `init_lora_weights` names the method. PEFT can save
PiSSA, OLoRA and CorDA as a plain LoRA of twice the rank: give `save_pretrained` the option
`path_initial_model_for_weight_conversion` with the folder of the adapter as it was before training. The result says
`init_lora_weights: true` and is served as any LoRA.

## Refused by name

Each with `unsupported_kind` and this reason:
"""

_FIELDS = """
## Fields of the configs

*Understood*: applied. *Descriptive*: says how the adapter came to be; nothing follows from it. *Neutral-only*: not
served; refused unless switched off. A field that is not in its table is refused.
"""


def kinds_page() -> str:
    """The whole page."""
    served = [
        *_OWN,
        *(
            (
                reader.title,
                f"`peft-{reader.peft_type.lower()}`",
                reader.source,
                reader.delta,
                reader.term,
                reader.limits,
            )
            for reader in READERS.values()
        ),
    ]
    lines = [_INTRO, *_table(("kind", "format", "tensors of the file", "delta of a linear", "term", "refused"), served)]
    lines += [_INITIAL, *_table(("type", "why"), [(f"`{kind}`", why) for kind, why in sorted(REFUSED.items())])]
    lines.append(_FIELDS)
    for reader in READERS.values():
        lines += [f"### {reader.title}\n", *_table(("field", "treatment", "accepted"), _rows(reader.fields)), ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]


def _rows(rules: Mapping[str, FieldRule]) -> list[tuple[str, ...]]:
    order = {"understood": 0, "descriptive": 1, "neutral-only": 2}
    ordered = sorted(rules.items(), key=lambda item: (order[item[1].treatment], item[0]))
    return [
        (f"`{name}`", f"{rule.treatment}{', required' if rule.required else ''}", rule.allowed)
        for name, rule in ordered
    ]


if __name__ == "__main__":
    sys.stdout.write(kinds_page())
