"""Rows of logits of an ensemble's members, mixed into one.

``logits``: ``l = sum of w_k l_k``. The softmax of a mean of logits is that of a mean of log probabilities, since they
differ by a number that all tokens share. ``probabilities``: ``p = sum of w_k softmax(l_k)`` over the sum of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.core import Ensemble, Mix


def mix(rows: Sequence[Tensor], ensemble: Ensemble) -> Tensor:
    """Float32 [..., vocab] of ``rows[k]``, of the same shape, of member k.

    Sums run in float64 and in the order of the members, so the result depends on nothing but these rows: a member
    alone with weight 1 has the bits that it came with. A token whose logit is minus infinity for a member that counts
    with a weight below 0 stays impossible.
    """
    weights = [member.weight for member in ensemble.members]
    if ensemble.mix is Mix.PROBABILITIES:
        return _mean_of_probabilities(rows, weights)
    mixed = rows[0].double() * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        mixed += row.double() * weight
    for row, weight in zip(rows, weights, strict=True):
        if weight < 0:
            mixed.masked_fill_(row == -math.inf, -math.inf)
    return mixed.float()


def _mean_of_probabilities(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The logarithm of the mean, moved by the mean of what the members' logits are normalised by: members that agree
    give the logits that they have, and a repetition penalty finds them where it would without an ensemble."""
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    wide = [row.double() for row in rows]
    norms = [row.logsumexp(dim=-1, keepdim=True) for row in wide]
    # Not the share's logarithm: beside a large weight the share of a tiny one is 0 in a double.
    logs = [math.log(weight) - math.log(total) for weight in weights]
    terms = [row - norm + log for row, norm, log in zip(wide, norms, logs, strict=True)]
    level = norms[0] * shares[0]
    for norm, share in zip(norms[1:], shares[1:], strict=True):
        level += norm * share
    return (torch.stack(terms).logsumexp(dim=0) + level).float()
