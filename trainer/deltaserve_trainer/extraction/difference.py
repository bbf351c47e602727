"""What a fine-tune changed, by the parts of the base that adapters can change and those that they cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaserve_store.spec import BaseSpec
from deltaserve_trainer.base import is_transposed, linears_of
from deltaserve_trainer.errors import ExtractRefused


@dataclass(frozen=True, slots=True)
class Difference:
    """Two models of one architecture. Matrices are made when asked for, float32 ``[out, in]``.

    ``biases`` [out] by linear and ``norms`` (some of ``gain``, ``shift``) by norm hold what differs. ``not_carried``:
    squared differences of every other parameter that differs, by name: embeddings, the head, norms inside attention.
    """

    linears: Mapping[str, tuple[nn.Module, nn.Module]]
    biases: Mapping[str, Tensor]
    norms: Mapping[str, Mapping[str, Tensor]]
    not_carried: Mapping[str, float]

    def matrix(self, name: str) -> Tensor:
        before, after = (module.get_parameter("weight").detach().float() for module in self.linears[name])
        delta = after - before
        return delta.t().contiguous() if is_transposed(self.linears[name][0]) else delta

    def changed(self) -> Iterator[str]:
        """Names of the linears whose weight differs at all."""
        for name, (before, after) in self.linears.items():
            if not torch.equal(before.get_parameter("weight"), after.get_parameter("weight")):
                yield name


@torch.no_grad()
def difference(base: nn.Module, tuned: nn.Module, spec: BaseSpec) -> Difference:
    """Raises ``ExtractRefused`` where the two are not of one shape, or do not differ."""
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    strange = sorted(set(before) ^ set(after))
    if strange:
        raise ExtractRefused(f"the fine-tune and the base have different parameters, for one {strange[0]}")
    for name, parameter in before.items():
        if parameter.shape != after[name].shape:
            raise ExtractRefused(
                f"{name} is {list(after[name].shape)} in the fine-tune and {list(parameter.shape)} in the base; "
                "a fine-tune with another vocabulary or shape is no fine-tune of this base"
            )
        if not bool(after[name].isfinite().all()):
            raise ExtractRefused(f"{name} of the fine-tune holds values that are not finite")
    first, second = linears_of(base), linears_of(tuned)
    linears = {name: (first[name], second[name]) for name in spec.linears}
    seen = {f"{name}.weight" for name in linears}
    biases: dict[str, Tensor] = {}
    for name in linears:
        key = f"{name}.bias"
        seen.add(key)
        if key in before and not torch.equal(before[key], after[key]):
            biases[name] = after[key].float() - before[key].float()
    norms: dict[str, dict[str, Tensor]] = {}
    for name in spec.norms:
        for part, key in (("gain", f"{name}.weight"), ("shift", f"{name}.bias")):
            seen.add(key)
            if key in before and not torch.equal(before[key], after[key]):
                norms.setdefault(name, {})[part] = after[key].float() - before[key].float()
    others = {
        name: float((after[name].double() - before[name].double()).square().sum())
        for name in before
        if name not in seen and not torch.equal(before[name], after[name])
    }
    found = Difference(linears, biases, norms, others)
    if not biases and not norms and next(found.changed(), None) is None:
        told = f"; it differs in {', '.join(others)}, which adapters cannot change yet" if others else ""
        raise ExtractRefused(f"no linear and no norm differs from the base{told}")
    return found
