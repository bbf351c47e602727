"""A finished adapter of any sum of terms, folded into the model's weights: to be measured, not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec
from deltaserve_trainer.base import Base, is_transposed, weight_of
from deltaserve_trainer.errors import TrainingError
from deltaserve_trainer.merging.update import Update, update_of


class FoldedMethod:
    """Parameters are exchanged, never added to and subtracted from: without the adapter the base is the base again."""

    def __init__(self, model: nn.Module, parsed: ParsedAdapter, spec: BaseSpec) -> None:
        self.model = model
        self._num_entries = parsed.num_parameters
        self._plain: dict[tuple[str, str], nn.Parameter | None] = {}
        self._changed: dict[tuple[str, str], nn.Parameter] = {}
        with torch.no_grad():
            self._fold(update_of(parsed, spec, ModelWeights(model)))
        self._show(self._changed)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def structure(self) -> dict[str, Tensor]:
        return {}

    def num_entries(self) -> int:
        return self._num_entries

    def save(self, folder: Path, base: Base, save_dtype: str) -> None:
        raise TrainingError("a folded adapter is measured, not saved")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._show(self._plain)
        try:
            yield
        finally:
            self._show(self._changed)

    def _fold(self, update: Update) -> None:
        for name, change in update.linears.items():
            linear = self.model.get_submodule(name)
            stored = weight_of(linear)
            if change.has_matrix:
                delta = change.dense(lambda w=stored, m=linear: w.t() if is_transposed(m) else w)  # type: ignore[misc]
                self._put(name, "weight", stored + (delta.t() if is_transposed(linear) else delta))
            if "bias" in change.vectors:
                self._add(name, "bias", change.vectors["bias"])
        for name, parts in update.norms.items():
            for part, vector in parts.items():
                self._add(name, {"gain": "weight", "shift": "bias"}[part], vector)

    def _add(self, module: str, parameter: str, vector: Tensor) -> None:
        stored = getattr(self.model.get_submodule(module), parameter, None)
        self._put(module, parameter, vector if stored is None else stored + vector)

    def _put(self, module: str, parameter: str, value: Tensor) -> None:
        self._plain[module, parameter] = getattr(self.model.get_submodule(module), parameter, None)
        self._changed[module, parameter] = nn.Parameter(value, requires_grad=False)

    def _show(self, parameters: dict[tuple[str, str], Any]) -> None:
        for (module, parameter), value in parameters.items():
            setattr(self.model.get_submodule(module), parameter, value)


class ModelWeights:
    """A plain model's numbers as ``merging`` reads them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def weight(self, linear: str) -> Tensor:
        module = self._model.get_submodule(linear)
        weight = weight_of(module).detach().float()
        return weight.t() if is_transposed(module) else weight

    def bias(self, linear: str) -> Tensor | None:
        bias: Any = getattr(self._model.get_submodule(linear), "bias", None)
        return None if bias is None else bias.detach().float()

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        module: Any = self._model.get_submodule(name)
        bias = getattr(module, "bias", None)
        return module.weight.detach().float(), None if bias is None else bias.detach().float()
