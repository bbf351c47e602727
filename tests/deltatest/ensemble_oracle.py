"""Ensembles computed the slow way over the fake model: member by member, mixed in float64, written down again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deltaserve.core import Ensemble, Mix
from deltatest.engine_fakes import row_logits


def mixed(models: Ensemble, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Float64 [vocab]; of probabilities their logarithm."""
    weights = np.array([member.weight for member in models.members])
    wide = np.stack(rows).astype(np.float64)
    if models.mix is Mix.LOGITS:
        return np.asarray(weights @ wide)
    each = np.exp(wide - wide.max(axis=1, keepdims=True))
    shares = each / each.sum(axis=1, keepdims=True)
    return np.asarray(np.log((weights / weights.sum()) @ shares))


def mixed_after(models: Ensemble, contents: Mapping[str, float], tokens: Sequence[int]) -> np.ndarray:
    """The mix after all of ``tokens``; ``contents`` of adapters by version."""
    rows = []
    for member in models.members:
        parts = [(contents[part.version], part) for part in member.binding.parts]
        rows.append(
            row_logits(
                [
                    (token, tuple((held, p.scale_first, p.scale_last) for held, p in parts if p.start_position <= at))
                    for at, token in enumerate(tokens)
                ]
            )
        )
    return mixed(models, rows)


def expected_of_ensemble(
    prompt: Sequence[int], models: Ensemble, contents: Mapping[str, float], num_tokens: int
) -> list[int]:
    """Greedy completion."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(mixed_after(models, contents, tokens).argmax()))
    return tokens[len(prompt) :]
