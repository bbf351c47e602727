"""The judge of any composition: transformers' own model, changed by hand in fp32.

Sums of differences are in its weights, biases, norms and vocabulary rows, residual modules hang around its sublayers,
and virtual tokens are in its cache, put there or computed by it in the order of the parts. Nothing of the engine runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.prefixes import PlainPrefix, plain_prefix
from deltaserve.deltas.vectors import dense_biases, dense_norms
from deltaserve.deltas.vocabulary import row_changes
from deltaserve.model.base import BaseModel
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.formats import read_adapter
from deltatest.apart_adapters import added
from deltatest.sum_of_deltas import Parts, Strength

Modules = dict[str, list[tuple[BottleneckDelta, float]]]
"""By attach point, in the order of the parts, each with its strength there."""


class ComposedJudge:
    """``logits`` of a model of Llama's layout with all ``parts``."""

    def __init__(self, model: nn.Module, base: BaseModel, folders: Mapping[str, Path], parts: Parts) -> None:
        self.model: Any = copy.deepcopy(model).eval()
        self.prefixes: list[PlainPrefix] = []
        self.num_layers: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
        modules: Modules = {}
        with torch.no_grad():
            for name, strength in parts:
                self._add(folders[name], base, strength, modules)
        self._hang(modules)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Float32 [T, vocab] of the tokens behind all virtual ones."""
        cache = DynamicCache(config=self.model.config)
        waiting: list[Tensor] = []  # embeddings are run with what follows, as far as that is embeddings or tokens
        for prefix in self.prefixes:
            if prefix.embeddings is not None:
                waiting.append(prefix.embeddings)
                continue
            if waiting:
                self.model(inputs_embeds=torch.cat(waiting)[None], past_key_values=cache, use_cache=True)
                waiting = []
            for layer, (keys, values) in enumerate(prefix.keys_values):
                cache.update(keys[None], values[None], layer)
        waiting.append(self.model.get_input_embeddings()(torch.tensor(list(ids))))
        found = self.model(inputs_embeds=torch.cat(waiting)[None], past_key_values=cache, use_cache=True).logits[0]
        return found[-len(ids) :].float()  # type: ignore[no-any-return]

    def to(self, dtype: torch.dtype) -> ComposedJudge:
        """All of it rounded, itself."""
        self.model.to(dtype)
        self.prefixes = [
            PlainPrefix(
                None if prefix.embeddings is None else prefix.embeddings.to(dtype),
                tuple((keys.to(dtype), values.to(dtype)) for keys, values in prefix.keys_values),
            )
            for prefix in self.prefixes
        ]
        return self

    def choices(self, prompt: Sequence[int], said: Sequence[int]) -> list[int]:
        """The likeliest token at each place of ``said``, given what was said before it."""
        return self.logits([*prompt, *said])[len(prompt) - 1 : -1].argmax(dim=-1).tolist()

    def _at(self, name: str, strength: Strength, default: float) -> float:
        """The strength at the depth of a module; ``default`` is the depth of what is in no layer."""
        first, last = strength if isinstance(strength, tuple) else (strength, strength)
        numbers = [int(word) for word in name.split(".") if word.isdigit()]
        return first + (last - first) * (numbers[0] / (self.num_layers - 1) if numbers else default)

    def _add(self, folder: Path, base: BaseModel, strength: Strength, modules: Modules) -> None:
        parsed = read_adapter(folder, base.spec)
        for linear in dense_deltas(parsed, base.spec, base):
            at = self._at(linear, strength, 1.0)
            delta = dense_deltas(parsed, base.spec, base, at)[linear]()
            weight = self.model.get_submodule(linear).weight
            weight += delta.t() if base.spec.linears[linear].transposed else delta
        for linear, difference in dense_biases(parsed, base).items():
            module = self.model.get_submodule(linear)
            bias = self._at(linear, strength, 1.0) * difference()
            module.bias = nn.Parameter(bias if module.bias is None else module.bias + bias)
        for norm, (gain, shift) in dense_norms(parsed, base).items():
            module, at = self.model.get_submodule(norm), self._at(norm, strength, 1.0)
            module.weight += 0.0 if gain is None else at * gain
            if shift is not None:
                module.bias += at * shift
        for matrix, change in row_changes(parsed, base.spec, base).items():
            module = self.model.get_submodule(matrix)
            is_embedding = base.spec.embedding is not None and matrix == base.spec.embedding.name
            at = self._at("", strength, 0.0 if is_embedding else 1.0)
            difference = change(torch.arange(len(module.weight)))
            module.weight = nn.Parameter(module.weight.detach() + at * difference)  # tied ones part
        for delta in parsed.deltas:
            if isinstance(delta, BottleneckDelta):
                at = self._at(delta.point, strength, 0.0 if delta.point == "embed_out" else 1.0)
                modules.setdefault(delta.point, []).append((delta, at))
        if parsed.prefix is not None and strength != 0.0:
            self.prefixes.append(plain_prefix(parsed.prefix, base.spec))

    def _hang(self, modules: Modules) -> None:
        """Modules of one point run one after another; parallel ones read what the sublayer is fed."""
        fed: dict[str, Tensor] = {}

        def change(point: str, x: Tensor, source: Tensor | None = None) -> Tensor:
            y = x.double()
            for delta, at in modules.get(point, ()):
                y = y + at * added(delta, source if delta.is_parallel and source is not None else y)
            return y.to(x.dtype)

        def around(module: nn.Module, name: str) -> None:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x = fed[name] = change(f"{name}_in", args[0] if args else kwargs["hidden_states"])
                return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

            def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                y = output[0] if isinstance(output, tuple) else output
                y = change(f"{name}_out", y, fed[name])
                return (y, *output[1:]) if isinstance(output, tuple) else y

            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True)

        if not modules:
            return
        layers = self.model.model.layers
        for index, layer in enumerate(layers):
            around(layer.self_attn, f"layers.{index}.attn")
            around(layer.mlp, f"layers.{index}.mlp")
        layers[0].register_forward_pre_hook(lambda _, args: (change("embed_out", args[0]), *args[1:]))
        self.model.lm_head.register_forward_pre_hook(lambda _, args: (change("final_hidden", args[0]),))
