"""The page docs/adapter-kinds.md; ``python -m deltaserve_store.formats.peft_kinds.page`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from deltaserve_store.formats.conversion_cost import MAX_FLOPS
from deltaserve_store.formats.peft_fields import MAX_RANK, FieldRule
from deltaserve_store.formats.peft_kinds.low_rank import DEFAULT_LIMITS
from deltaserve_store.formats.peft_kinds.positions import MAX_DRAWN
from deltaserve_store.formats.peft_kinds.table import READERS, REFUSED
from deltaserve_store.formats.peft_prefixes import PREFIX_KINDS

_INTRO = f"""# Kinds of adapters

Made from the code by `python -m deltaserve_store.formats.peft_kinds.page`; edit the readers, not this page.

The server adds terms to a linear `y = W x + b`: low rank, `B (A x)`, sparse, `S x`, dense, `Q x`, and dense blocks of
some rows and columns; it serves vectors: scales, biases and norm differences; rotations of a linear's input or output;
trained rows of embedding and head; and bottlenecks on the residual stream. Every kind of the first table is made of
them; [prefixes](#prefixes) are apart. What PEFT stores in another parametrisation is converted when the adapter is
read, in float32, before the one cast to the serving dtype. The proof at the door compares the engine with the base plus
the method's own formula, evaluated from the file's tensors, so that it would also find a wrong conversion. Low-rank
terms are served at their exact rank up to {MAX_RANK}, and nothing is approximated then. What becomes of deltas of a
higher rank is told [below](#deltas-of-high-rank).

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
        "deltaserve rotations",
        "`deltaserve-rotations`",
        "`changes`, `order`",
        "blocks on a permuted diagonal",
        "rotation of inputs or outputs",
        "see adapter-format.md",
    ),
    (
        "deltaserve dense",
        "`deltaserve-dense`",
        "`delta`; `mask`; `signs`, `scale`",
        "a whole matrix, `-W` where a bit is set, `scale · ±1`",
        "dense; of a mask its bits, with the base's weights read again; at most 1/16 marked: sparse",
        "see adapter-format.md",
    ),
    (
        "deltaserve bottleneck",
        "`deltaserve-bottleneck`",
        "`down`, `up`, biases",
        "`up φ(down h)` on the residual stream",
        "bottleneck",
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
    (
        "deltaserve terms",
        "`deltaserve-terms`",
        "`a`, `b`; `codes`, `scales`; `rows`, `cols`, `values`; `delta` or `signs`, `scale`; named vectors",
        "the sum of them",
        "low rank, sparse, dense, vector",
        "see adapter-format.md",
    ),
)

_HIGH_RANK = f"""
## Deltas of high rank

LoHa, LoKr, FourierFT, WaveFT, C3A, RandLoRA, HiRA and MiSS "bat" make deltas whose rank may be that of the whole
matrix. What is exact stays exact:

- A matrix `[out, in]` has rank min(in, out) at most. Up to {DEFAULT_LIMITS.exact_rank} it is served as a low-rank term
  with an identity on its narrower side: as large as the delta and the identity, and equal to it.
- FourierFT is a sum of waves `cos(a_u + b_v)`. Waves of one row frequency share `cos a` and `sin a`, also with the
  mirrored frequency, and so do those of one column frequency: the rank is at most twice the number of frequencies that
  differ, rows or columns, whichever are fewer. n coefficients have rank 2 n or little less.
- WaveFT adds a patch of L x L entries for each coefficient (L is the filter's length, 2 for `db1`): a sparse term,
  exact, as long as the patches fill a quarter of the matrix at most.
- C3A is diagonal in the Fourier basis of its blocks, and RandLoRA a sum of low-rank products whose ranks add up: both
  have full rank. HiRA and MiSS "bat" multiply the base's weights, entry by entry or tile by tile, and have their rank.

Where the exact rank exceeds {DEFAULT_LIMITS.exact_rank}, the nearest term of rank {DEFAULT_LIMITS.rank} (`serve
--conversion-rank`, up to {MAX_RANK}) takes the delta's place, and what that costs is measured and stated: the door
compares the base with the exact deltas and the base with these terms, both in float32, on the probe tokens. The largest
difference of a logit may be 5 % of the largest that the adapter makes (`serve --conversion-error 0.05`); for a weak
adapter both are taken at a larger strength, where they stand out from rounding. Above that the answer is
`conversion_error` with the number found, the limit and what helps. Below it the number is a warning of the upload and
part of the stored evidence (`conversion`: `error`, `effect`, `limit`, `scale`, `rank`, `num_linears`). A spectrum that
hardly falls does not pass: of FourierFT's default, 1000 coefficients, drawn at random on a linear of 4096 x 4096, the
best 256 directions miss 64 % of the delta's norm and the best 1024 still 11 %.

## What a conversion may cost

A small file may stand for large terms (VeRA's vectors for factors of rank r, FourierFT's coefficients for waves), or
for a decomposition of every weight (PSOFT, FRoD, PiSSA). Both are told from config and shapes before anything is made,
and refused as `conversion_too_large`, with what was found and what is allowed:

- The terms of an adapter, in the serving dtype, may take what the server holds of one adapter: the smaller of
  `--adapter-device-bytes` and `--adapter-host-bytes`. Of a delta that gets the nearest term `--conversion-rank` decides
  how much that is.
- Decompositions may take {MAX_FLOPS:.2g} operations together (`serve --conversion-flops`), by textbook counts: a little
  more than the singular vectors of every linear of a base of 32 billion weights. The proof makes some of them again.
- Positions that FourierFT and WaveFT draw from a seed are drawn once for all linears of one size, among
  {MAX_DRAWN} entries together.
"""

_BESIDE = """
## Beside any kind

LoRA, SHiRA, IA3, LN tuning and every converted kind may have, where PEFT's config has the field:

- `modules_to_save`: modules trained whole, `<module>.weight` and `.bias`. Embedding and head become their changed rows
  (up to 256 MiB of them), norms their differences, and a linear of the layers the difference of its weight, `Q x`,
  which takes as much memory as the linear. Names are endings of paths, as PEFT compares them; a name of a module that
  holds several (`mlp`) saves all of them. A target that is saved is no target. What no causal model has (`score`,
  `classifier`) is refused by name (`unknown_module`).
- `bias`: `<kind>_only` or `all`, trained biases in place of the base's, of linears, of a head that has one and, with
  `all`, of norms. What `all` writes once more of modules saved whole (`modules_to_save`, `original_module` in the name)
  must equal the trained bias, and of the base's need only fit: no pass uses it. GLoRA says by terms of its own what
  becomes of a bias, so it has `none` alone.

LoRA may also target embedding and head (`lora_embedding_A`, `_B`; `lora_A`, `lora_B`), with DoRA too: the head's
magnitudes [vocabulary] scale its logits, the embedding's [width] the numbers of a row, both beside their low rank.
`lora_bias` gives the head a bias and PEFT refuses it for an embedding. On a GPU rows with such scales or biases of
embedding and head run outside of decode graphs, by the PyTorch definition.
"""

_ROTATIONS = """
## Rotations

A rotation is whatever matrix PEFT computes from the file. Cayley transforms are orthogonal, and a file whose values are
so large that PEFT's own float32 loses that is refused (`invalid_value`); RoAd scales as it turns; and with
`use_cayley_neumann` OFT has a polynomial in place of the transform, orthogonal only up to what the polynomial leaves
out, which is served as it was trained. An adapter with a rotation is applied whole or not at all: its scale is 0 or 1,
else a request gets `composition_refused` (400). It takes as many numbers as features times the width of a block (on a
square linear, blocks of 32 are as much as a LoRA of rank 16), and its rows enter the base's product once more for every
linear of a projection group whose input it turns. On a GPU decode graphs have room for four factors; rotations of more
run outside of them.
"""

_INITIAL = """
## LoRA that changes the base at its start

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base before they train: they take a part `W_0` out of a weight, and
the file holds what was trained beside the rest. On the base itself that is `alpha / r · B A - W_0`, of rank 2 r.

- `pissa` and `olora`: `W_0` follows from the base's own weight (the nearest matrix of rank r; the part of the weight in
  the span of its first r columns, times `alpha / r`), and is computed when the adapter is read, as PEFT does when it
  loads such a file. It costs a decomposition of each targeted weight. Where the base leaves `W_0` open (singular values
  that hardly differ), the file is refused (`seed_not_usable`); so is DoRA on top (`unsupported_feature`).
- With the initial factors in the upload, as `initial_model.safetensors`, all of them but LoftQ are served, and nothing
  is computed from the base: the tensor file of the adapter as PEFT saved it before the first step, under that name
  beside the other two ([adapter-format.md](adapter-format.md#peft-lora)). `W_0` is `alpha / r · B_0 A_0`.
- Without them `pissa_niter_n`, which draws random numbers, CorDA and LoRA-GA, which look at data, are refused
  (`unsupported_feature`). PEFT can also save PiSSA, OLoRA, CorDA and LoRA-GA as a plain LoRA of twice the rank: give
  `save_pretrained` the option `path_initial_model_for_weight_conversion` with the folder of the adapter as it was
  before training. The result says `init_lora_weights: true` and is served as any LoRA.
- LoftQ trains beside a quantised base. What quantising took from the base is in no file and no matrix of low rank:
  `unsupported_feature`.

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
strengths 0 (the base) and 1. Its proof runs the base over embeddings and tokens in one go, or puts the given K and V
before the tokens' own in plain float32 attention; an effect that hardly stands out of rounding cannot be amplified and
leaves a warning.

Composed with others, prefixes follow each other in the order of the request and its tokens come after them all. Given K
and V stay as they are. Embeddings are then run anew, when a sequence starts, by the engine itself: at their positions,
with all terms of the other adapters, reading the virtual tokens before them. So a prompt's order counts, while given K
and V, which have no position, are the same to a token in any order (but for windows). Every layer has the same number
of virtual tokens: prefixes pruned layer by layer (E2VPT) are not served, since blocks of the KV cache hold the same
positions of all layers and attention masks nothing in them.

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
    prefixes = [
        (kind.title, f"`peft-{name.lower().replace('_', '-')}`", kind.source, kind.meaning, kind.limits)
        for name, kind in PREFIX_KINDS.items()
    ]
    lines += [
        _HIGH_RANK,
        _BESIDE,
        _ROTATIONS,
        _PREFIXES,
        *_table(("kind", "format", "tensors of the file", "becomes", "refused"), prefixes),
        _INITIAL,
        *_table(("type", "why"), [(f"`{kind}`", why) for kind, why in sorted(REFUSED.items())]),
    ]
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
