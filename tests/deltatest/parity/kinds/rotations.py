"""Kinds that turn inputs or outputs: PEFT's, and Givens rotations in the project's own format."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltaserve_store.formats.peft_kinds.table import READERS
from deltatest.parity.registry import Bench, Entry
from deltatest.peft_adapters import base_logits, peft_logits
from deltatest.rotation_kinds import CASES, compiler_of, make_givens, make_rotation, whole_matrix


def _write(bench: Bench, folder: Path, *, case: str) -> Path:
    return make_rotation(bench.model, folder, case, seed=len(case))


def _of_peft(model: Any, folder: Path, ids: Sequence[int], *, case: str) -> Tensor:
    with compiler_of(case):
        return peft_logits(model, folder, ids)


def _givens(bench: Bench, folder: Path) -> Path:
    return make_givens(bench.spec, folder, seed=3)


def _turned(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    """From the tensors of the file, multiplied out."""
    turned = copy.deepcopy(model)
    tensors = load_file(folder / "adapter.safetensors")
    for name, told in json.loads((folder / "adapter.json").read_text())["modules"].items():
        places = range(told["factors"])
        factors = [(tensors[f"{name}.changes.{at}"], tensors.get(f"{name}.order.{at}")) for at in places]
        linear = turned.get_submodule(name)
        width = linear.in_features if told["side"] == "input" else linear.out_features
        whole = whole_matrix(SimpleNamespace(factors=factors), width).float()  # type: ignore[arg-type]
        with torch.no_grad():
            linear.weight.copy_(linear.weight @ whole.t() if told["side"] == "input" else whole.t() @ linear.weight)
            if told["side"] == "output" and linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias @ whole)
    return base_logits(turned, ids)


ENTRIES = (
    *(
        Entry(
            READERS[case.config.removesuffix("Config").upper()].title,
            name.partition("-")[2],
            "PEFT",
            partial(_write, case=name),
            partial(_of_peft, case=name),
        )
        for name, case in CASES.items()
    ),
    Entry("deltaserve rotations", "Givens", "deltaserve", _givens, _turned, "edited weights"),
)
