"""Adapters of residual modules and of whole-weight differences on disk, and models changed by hand as their oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve_kernels import pack_bits
from deltaserve_store.bottleneck_deltas import ACTIVATIONS, BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, MaskDelta, SignDelta
from deltaserve_store.formats.deltaserve_bottleneck import write_bottleneck_adapter
from deltaserve_store.formats.deltaserve_dense import write_dense_adapter
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

# Where transformers keeps the sublayers of a layer; the rest of the names is Llama's.
SUBLAYERS = {"gpt2": ("attn", "mlp"), "gpt-neox": ("attention", "mlp")}
LAYERS = {"gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


def make_bottleneck(
    spec: BaseSpec,
    folder: Path,
    points: Iterable[str] | None = None,
    *,
    parallel: bool = False,
    activation: str | None = None,
    rank: int = 5,
    std: float = 0.2,
    seed: int = 0,
    scale: float = 1.0,
    **config: Any,
) -> Path:
    """Modules at the points that end with one of ``points`` (all), of every activation in turn, with and without
    biases; ``parallel``: those at outputs of sublayers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    deltas = []
    for index, point in enumerate(sorted(spec.points)):
        if points is not None and not point.endswith(tuple(points)):
            continue
        biases = [randn(rank) if index % 3 else None, randn(spec.hidden_size) if index % 2 else None]
        is_parallel = parallel and point.endswith((".attn_out", ".mlp_out"))
        chosen = activation or ACTIVATIONS[(index + seed) % len(ACTIVATIONS)]
        matrices = randn(rank, spec.hidden_size), randn(spec.hidden_size, rank)
        deltas.append(BottleneckDelta(point, *matrices, chosen, *biases, is_parallel, scale))
    write_bottleneck_adapter(folder, deltas, spec.fingerprint, method="bottleneck", **config)
    return folder


_PHI = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def added(delta: BottleneckDelta, x: Tensor) -> Tensor:
    """The module's formula in float64."""
    zero = torch.zeros((), dtype=torch.float64)
    down_bias = zero if delta.down_bias is None else delta.down_bias.double()
    up_bias = zero if delta.up_bias is None else delta.up_bias.double()
    middle = _PHI[delta.activation](x.double() @ delta.down.double().t() + down_bias)
    return delta.scale * (middle @ delta.up.double().t() + up_bias)


def hooked_logits(
    model: nn.Module, arch: str, deltas: Sequence[BottleneckDelta], ids: Sequence[int], strength: float = 1.0
) -> Tensor:
    """Oracle: float32 logits [T, vocab] of transformers' model with hooks around its sublayers and before its head."""
    model = copy.deepcopy(model)
    attention, mlp = SUBLAYERS.get(arch, ("self_attn", "mlp"))
    fed: dict[str, Tensor] = {}

    def change(delta: BottleneckDelta, x: Tensor, source: Tensor) -> Tensor:
        return (x.double() + strength * added(delta, source)).to(x.dtype)

    def around(module: nn.Module, name: str, by_point: dict[str, BottleneckDelta]) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            delta = by_point.get(f"{name}_in")
            x = fed[name] = x if delta is None else change(delta, x, x)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            delta = by_point.get(f"{name}_out")
            y = output[0] if isinstance(output, tuple) else output
            if delta is not None:
                y = change(delta, y, fed[name] if delta.is_parallel else y)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    by_point = {delta.point: delta for delta in deltas}
    layers: Any = model.get_submodule(LAYERS.get(arch, "model.layers"))
    for index, layer in enumerate(layers):
        around(layer.get_submodule(attention), f"layers.{index}.attn", by_point)
        if hasattr(layer, mlp):  # OPT has its linears in the layer itself
            around(layer.get_submodule(mlp), f"layers.{index}.mlp", by_point)
    embedded = by_point.get("embed_out")
    if embedded is not None:
        layers[0].register_forward_pre_hook(lambda _, args: (change(embedded, args[0], args[0]), *args[1:]))
    final = by_point.get("final_hidden")
    if final is not None:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.register_forward_pre_hook(lambda _, args: (change(final, args[0], args[0]),))
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


def make_dense(spec: BaseSpec, folder: Path, form: str, *, seed: int = 0, std: float = 0.05, **config: Any) -> Path:
    """Of every second linear: ``delta``, ``mask`` (one weight in twenty; ``thick-mask``: three in four), ``signs`` (one
    scale a row, or one in all). ``delta`` also has biases and norm differences, as a partial fine-tune does."""
    generator = torch.Generator().manual_seed(seed)
    deltas: list[Any] = []
    for index, (name, linear) in enumerate(spec.linears.items()):
        if index % 2:
            continue
        size = linear.out_features, linear.in_features
        if form == "delta":
            deltas.append(DenseDelta(name, std * torch.randn(size, generator=generator)))
            deltas.append(VectorDelta(name, bias=std * torch.randn(size[0], generator=generator)))
        elif form == "signs":
            count = size[0] if index % 4 else 1
            scale = std * (0.5 + torch.rand(count, generator=generator))
            deltas.append(SignDelta(name, pack_bits(torch.rand(size, generator=generator) < 0.5), scale))
        else:
            share = 0.75 if form == "thick-mask" else 0.05
            deltas.append(MaskDelta(name, pack_bits(torch.rand(size, generator=generator) < share)))
    if form == "delta":
        for name, norm in spec.norms.items():
            deltas.append(NormDelta(name, gain=std * torch.randn(norm.size, generator=generator)))
    write_dense_adapter(folder, deltas, spec.fingerprint, method=form, **config)
    return folder


def changed_model(model: nn.Module, deltas: Sequence[Any], spec: BaseSpec) -> nn.Module:
    """Oracle: transformers' model with the differences in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for delta in deltas:
            module: Any = model.get_submodule(delta.module)
            if isinstance(delta, NormDelta):
                module.weight += delta.gain
            elif isinstance(delta, VectorDelta):
                module.bias = nn.Parameter(delta.bias + (0 if module.bias is None else module.bias))
            else:
                weight = module.weight.t() if spec.linears[delta.module].transposed else module.weight
                _change_weight(weight, delta)
    return model


def _change_weight(weight: Tensor, delta: DenseDelta | MaskDelta | SignDelta) -> None:
    if isinstance(delta, DenseDelta):
        weight += delta.delta
        return
    words = (delta.mask if isinstance(delta, MaskDelta) else delta.signs).tolist()
    bits = torch.tensor([[row[k // 32] >> k % 32 & 1 for k in range(weight.shape[1])] for row in words]).bool()
    if isinstance(delta, MaskDelta):
        weight[bits] = 0.0
    else:
        weight += torch.where(bits, 1.0, -1.0) * delta.scale[:, None]
