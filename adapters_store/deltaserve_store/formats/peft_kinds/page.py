"""The page docs/adapter-kinds.md; ``python -m deltaserve_store.formats.peft_kinds.page`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from deltaserve_store.formats.peft_fields import MAX_RANK, FieldRule
from deltaserve_store.formats.peft_kinds.table import READERS, REFUSED
from deltaserve_store.formats.peft_prefixes import PREFIX_KINDS

_INTRO = f"""# Kinds of adapters

Made from the code by `python -m deltaserve_store.formats.peft_kinds.page`; edit the readers, not this page.

The server adds two terms to a linear `y = W x + b`: low rank, `B (A x)`, and sparse, `S x`; and it serves vectors:
scales, biases and norm differences. Every kind of the first table is exactly made of them, [prefixes](#prefixes) are
apart. What PEFT stores in another parametrisation is converted when the adapter is read, in float32, before the one
cast to the serving dtype; nothing is approximated. The proof at the door compares the engine with the base plus the
method's own formula, evaluated from the file's tensors, so that it would also find a wrong conversion. Low-rank terms
are served at their exact rank, at most {MAX_RANK}; a higher one is refused with the rank found (`rank_out_of_range`).

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
        "deltaserve vectors",
        "`deltaserve-vectors`",
        "named vectors",
        "scales, biases, norms",
        "vector",
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

_PREFIXES = """
## Prefixes

Kinds that put p virtual tokens before a sequence's own are served in one form: K and V of positions 0 to p - 1 of every
layer. They lie in ordinary blocks of the KV cache, where they are copied once and shared by later requests of the
adapter; the request's own tokens follow at position p. Nothing else changes: such rows are rows of the base. K and V of
prefix tuning and of cartridges are used as they are given, without norm or rotary; embeddings are turned into K and V
at the door, by one float32 pass of the base over them.

The virtual tokens count against the context, `prompt + max_tokens + p`; an adapter that leaves no room for a token of
prompt and one of answer is refused (`prefix_too_long`). They are not reported as prompt tokens. A prefix has the
strengths 0 (the base) and 1, and is not composed with other adapters. Its proof runs the base over embeddings and
tokens in one go, or puts the given K and V before the tokens' own in plain float32 attention; an effect that hardly
stands out of rounding cannot be amplified and leaves a warning.

Answers equal PEFT's `forward`. Its `generate` agrees where it keeps its cache: PEFT 0.21.2 looks for it under a name
that transformers 5.24 no longer uses, and then begins anew at each token.
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
    prefixes = [
        (kind.title, f"`peft-{name.lower().replace('_', '-')}`", kind.source, kind.meaning, kind.limits)
        for name, kind in PREFIX_KINDS.items()
    ]
    lines += [_PREFIXES, *_table(("kind", "format", "tensors of the file", "becomes", "refused"), prefixes)]
    lines.append(_FIELDS)
    for kind in PREFIX_KINDS.values():
        lines += [f"### {kind.title}\n", *_table(("field", "treatment", "accepted"), _rows(kind.fields)), ""]
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
