"""One hooked forward pass over the unmodified base, which finds out what the base is made of.

It records, per layer, the scale, window and soft cap that attention is really called with, and which linears are fed
the same tensor. Anything it does not understand is refused by name: nothing is guessed from configuration files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from deltaserve.errors import UnsupportedBase
from deltaserve.model.attention import AttentionSpec, dense_attention
from deltaserve.model.context import PassContext, current, use

TRACE_NAME = "deltaserve-trace"

# Arguments that models hand to attention functions and that change nothing for us.
_NEUTRAL_ARGUMENTS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "return_dict"}
)


@dataclass(frozen=True, slots=True)
class LayerMask:
    """What a layer may see: causal, and only the last ``window`` positions when that is set."""

    window: int | None


@dataclass(slots=True)
class Trace(PassContext):
    """What the pass saw: attention modules with their specs in call order, and the groups of linears in call order."""

    specs: dict[nn.Module, AttentionSpec] = field(default_factory=dict)
    kv_shapes: set[tuple[int, int]] = field(default_factory=set)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    # Inputs are kept until the pass ends, so that no two of them can have the same address.
    inputs: list[Tensor] = field(default_factory=list)

    def groups(self) -> list[tuple[str, ...]]:
        """Names of linears fed the same tensor, in call order."""
        by_input: dict[tuple[Any, ...], list[str]] = {}
        for name, key in self.calls:
            by_input.setdefault(key, []).append(name)
        return [tuple(names) for names in by_input.values()]


def trace(model: PreTrainedModel, linears: dict[str, nn.Module], ids: Tensor) -> Trace:
    """Run ``ids`` [T] through ``model`` (its linears still transformers' own) and return what was seen."""
    record = Trace()
    handles = [
        module.register_forward_pre_hook(_record_input(record, name, module)) for name, module in linears.items()
    ]
    previous = model.config._attn_implementation
    model.set_attn_implementation(TRACE_NAME)
    if model.config._attn_implementation != TRACE_NAME:
        raise UnsupportedBase(
            f"{type(model).__name__} does not call attention through transformers' attention interface; "
            "only architectures that do can be served"
        )
    positions = torch.arange(len(ids), device=ids.device)
    try:
        with torch.no_grad(), use(record):
            model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    finally:
        model.set_attn_implementation(previous)
        for handle in handles:
            handle.remove()
        record.inputs.clear()
    called = [name for name, _ in record.calls]
    if sorted(called) != sorted(linears):
        odd = sorted(set(linears) - set(called)) or sorted(name for name in set(called) if called.count(name) > 1)
        raise UnsupportedBase(
            f"linear {odd[0]} is not called exactly once in a forward pass; such layers are not served"
        )
    return record


def _record_input(record: Trace, name: str, module: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        weight: Tensor = module.weight  # type: ignore[assignment]
        record.inputs.append(x)
        # The version counter tells apart a tensor before and after an in-place change.
        key = (x.data_ptr(), x.shape, x.stride(), x._version, weight.dtype)
        record.calls.append((name, key))

    return hook


def _describe_mask(
    *, mask_function: Callable[..., Tensor], attention_mask: Tensor | None = None, **arguments: Any
) -> LayerMask:
    """Stands in for a mask: checks by evaluation that the model asks for plain or sliding causal attention."""
    window = arguments.get("local_size")
    edge = 1 if window is None else int(window)
    queries = torch.tensor(sorted({0, 1, 2, 5, edge - 1, edge, edge + 1, 2 * edge + 3}))
    keys = torch.cat([queries, queries + 1, (queries - edge).clamp(min=0), (queries - edge + 1).clamp(min=0)])
    q, k = (axis.flatten() for axis in torch.meshgrid(queries, keys.unique(), indexing="ij"))
    zero = torch.zeros((), dtype=torch.long)
    wanted = (k <= q) if window is None else (k <= q) & (k > q - int(window))
    try:
        found = mask_function(zero, zero, q, k)
    except (IndexError, RuntimeError) as error:
        raise UnsupportedBase(f"attention mask of this architecture cannot be evaluated: {error}") from error
    if attention_mask is not None or not torch.equal(found.bool().cpu(), wanted):
        raise UnsupportedBase(
            "attention mask is neither causal nor sliding-window causal (chunked, bidirectional or prefix attention); "
            "not served"
        )
    return LayerMask(None if window is None else int(window))


def _trace_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    record = current()
    if not isinstance(record, Trace):
        raise RuntimeError("trace attention called outside a trace")
    where = type(module).__name__
    for name, argument in arguments.items():
        if argument is not None and name not in _NEUTRAL_ARGUMENTS:
            raise UnsupportedBase(
                f"{where} passes {name} to attention (sinks, biases or the like), which is not served"
            )
    if not isinstance(attention_mask, LayerMask) or is_causal is False:
        raise UnsupportedBase(f"{where} attends without a causal mask; only decoder self-attention is served")
    if dropout:
        raise UnsupportedBase(f"{where} drops attention weights at inference; not served")
    if module in record.specs:
        raise UnsupportedBase(f"{where} attends more than once in a forward pass; shared layers are not served")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedBase(f"{where} does not know its layer index; its KV cache kind is not served")
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise UnsupportedBase(f"{where} has different head sizes for queries, keys and values; not served")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise UnsupportedBase(f"{where} has {query.shape[1]} query heads over {key.shape[1]} KV heads; not served")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spec = AttentionSpec(layer, scale, attention_mask.window, None if softcap is None else float(softcap))
    record.specs[module] = spec
    record.kv_shapes.add((key.shape[1], key.shape[3]))
    return dense_attention(query, key, value, spec), None


AttentionInterface.register(TRACE_NAME, _trace_attention)
AttentionMaskInterface.register(TRACE_NAME, _describe_mask)
