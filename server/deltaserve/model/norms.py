"""Norms whose gains and shifts adapters may change (the norm delta), found by what they do and not by their names.

A norm is ``n(x) * (offset + weight) + bias`` for some ``n`` of its own: for the rows that need it ``n`` is computed by
the module's own code with neutral parameters in fp32, and gain and shift, the adapter's difference inside, follow.
That this equals the module is tried at load on random rows. Rows without a difference never see it. An RMS norm that
runs as the C++ library's operator (``fuse``) adds the differences to its gain there instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.model.context import FoldedContext, ForwardContext, current_or_none, use
from deltaserve.model.folded import copy_with
from deltaserve_kernels import VectorRows, VectorStep, change_norm, scale_shift

logger = logging.getLogger(__name__)

_PROBE_ROWS = 3
_TOLERANCE = 1e-5  # relative, fp32


class Watch:
    """Sizes of the inputs that modules were called with in one pass over T tokens."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[torch.Size]] = {}

    def called_on_rows(self, name: str, size: int) -> bool:
        """Whether the module was called once, with one vector of ``size`` for each token."""
        shapes = self.shapes.get(name, [])
        return len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][0] == 1 and shapes[0][2] == size


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Record the calls of whatever might be a norm."""
    seen = Watch()

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.shapes.setdefault(name, []).append(args[0].shape)

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in _candidates(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        parameters = {key for key, value in module._parameters.items() if value is not None}
        weight = module._parameters.get("weight")
        if parameters in ({"weight"}, {"weight", "bias"}) and weight is not None and weight.dim() == 1:
            yield name, module


class TunableNorm:
    """One norm that adapters may change. ``index`` is its place in the table of norms; ``depth`` runs 0..1.

    ``gain`` and ``shift`` fp32 [H] are what the module multiplies and adds (shift None: nothing).
    """

    def __init__(self, name: str, module: nn.Module, offset: float, neutral: nn.Module) -> None:
        self.name = name
        self.module = module
        self.index = -1
        self.depth = 0.0
        self._neutral = neutral
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        if weight is None:
            raise ValueError(f"{name} has no weight")
        self.weight = weight.data
        self.bias = None if bias is None else bias.data
        self.gain = weight.data.float() + offset
        self.shift = None if bias is None else bias.data.float()
        self.size = len(weight)

    def normalise(self, rows: Tensor) -> Tensor:
        """``n(rows)`` [R, H] in fp32."""
        return self._neutral.forward(rows.float())

    def adjust(self, y: Tensor, x: Tensor, step: VectorStep | VectorRows) -> None:
        """Compute the rows of ``y`` anew whose bindings have a difference for this norm; x and y [1, T, H]."""
        tables = step.family.norms
        if isinstance(step, VectorRows):
            if step.may_have(tables, (self.index,)):
                normalised = self.normalise(x.reshape(-1, self.size)).contiguous()
                change_norm(y.view(-1, self.size), normalised, self.gain, self.shift, step, self.index, self.depth)
            return
        if not tables.has_any(self.index):
            return
        chosen = step.rows_with(tables, self.index)
        if chosen is not None and not len(chosen):
            return
        rows = self.normalise(x.reshape(-1, self.size)[step.rows])
        members = ((self.index, 0, self.size),)
        scale_shift(rows, step.compact, tables, members, self.depth, gain=self.gain, shift=self.shift, unit=0.0)
        targets, rows = (step.rows, rows) if chosen is None else (step.rows[chosen], rows[chosen])
        y.view(-1, self.size)[targets] = rows.to(y.dtype)

    def folded(self, x: Tensor, change: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """The module's own code in fp32 with ``weight + change[0]`` and ``bias + change[1]``."""
        names = ("weight",) if self.bias is None else ("weight", "bias")
        replaced = {
            name: stored.float() if delta is None else stored.float() + delta.to(stored.device)
            for name, stored, delta in zip(names, (self.weight, self.bias), change, strict=False)
            if stored is not None
        }
        return copy_with(self.module, replaced).forward(x)


def find_norms(model: nn.Module, seen: Watch, prefix: str, num_layers: int) -> dict[str, TunableNorm]:
    """The norms of ``model`` by path, in order of modules: called once a pass, on rows, and equal to the formula.

    For modules whose forward is still transformers' own. ``prefix`` is the path of the list of layers.
    """
    found: dict[str, TunableNorm] = {}
    offsets: dict[object, float | None] = {}
    for name, module in _candidates(model):
        weight = module._parameters["weight"]
        if weight is None or not seen.called_on_rows(name, len(weight)):
            continue
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        kind = (type(module), tuple(sorted(plain.items())), len(weight), module._parameters.get("bias") is None)
        if kind not in offsets:
            offsets[kind] = _offset(module)
        offset = offsets[kind]
        if offset is None:
            logger.info("%s is no norm that adapters can change", name)
            continue
        found[name] = TunableNorm(name, module, offset, _neutral(module, offset))
    depth = 0.0
    for index, (name, norm) in enumerate(found.items()):
        inside = name.startswith(f"{prefix}.")
        layer = int(name.removeprefix(f"{prefix}.").split(".", 1)[0]) if inside else 0
        # Outside of the layers: as deep as the side of them it lies on.
        depth = (layer / (num_layers - 1) if num_layers > 1 else 0.0) if inside else float(depth > 0)
        norm.index, norm.depth = index, depth
    return found


def _neutral(module: nn.Module, offset: float) -> nn.Module:
    """A copy that computes ``n`` alone: parameters such that ``offset + weight`` is 1 and bias 0, fp32."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None:
        raise ValueError("a norm without a weight has no neutral form")
    replaced = {"weight": torch.full_like(weight.data, 1.0 - offset, dtype=torch.float32)}
    if bias is not None:
        replaced["bias"] = torch.zeros_like(bias.data, dtype=torch.float32)
    return copy_with(module, replaced)


def _offset(module: nn.Module) -> float | None:
    """What the module adds to its weight, 0 or 1; None where neither formula gives what it computes."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None:
        return None
    x = 2 * torch.randn(_PROBE_ROWS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    own = {"weight": weight.data.float()} | ({} if bias is None else {"bias": bias.data.float()})
    try:
        with torch.inference_mode(), use(FoldedContext(deltas={})):
            wanted = copy_with(module, own).forward(x)
            for offset in (0.0, 1.0):
                shift = 0.0 if bias is None else bias.data.float()
                found = _neutral(module, offset).forward(x) * (offset + weight.data.float()) + shift
                if found.shape == wanted.shape and bool((found - wanted).norm() <= _TOLERANCE * wanted.norm()):
                    return offset
    except Exception as error:  # whatever this module is, it is not called in the way that was tried
        logger.debug("%s is left as it is: %s", type(module).__name__, error)
    return None


class TunableForward:
    """The forward ``run`` of a norm: as it was, then anew for rows with a difference."""

    def __init__(self, norm: TunableNorm, run: Callable[[Tensor], Tensor]) -> None:
        self.norm = norm
        self.run = run

    def __call__(self, x: Tensor) -> Tensor:
        ctx = current_or_none()
        if isinstance(ctx, FoldedContext) and self.norm.name in ctx.norms:
            return self.norm.folded(x, ctx.norms[self.norm.name])
        y = self.run(x)
        if isinstance(ctx, ForwardContext) and ctx.vectors is not None:
            self.norm.adjust(y, x, ctx.vectors)
        return y
