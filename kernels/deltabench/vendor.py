"""Other servers' Triton kernels, if the person who runs the benchmark has put their files into ``kernels/vendor/``.

That folder is ignored by git: third-party source is never part of this repository. Unzip a wheel of vLLM or SGLang
there (only ``vllm/lora`` or ``sglang/kernels/ops/lora`` is read). The kernel files are imported from there without the
packages around them: what they ask of their host (settings, loggers, platform queries, registration of custom
operators) is answered by small stand-ins below, and the functions run as their servers call them, with their default
tiles.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltabench.cases import AddDelta, LoraCase
from deltabench.implementations import Implementation, NotPresent

FOLDER = Path(os.environ.get("DELTABENCH_VENDOR", Path(__file__).resolve().parents[1] / "vendor"))


class _Folder(ModuleType):
    """A package whose ``__init__`` is not run: only a place to find files. Unknown names are not there."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self.__path__ = [str(path)]


def _stand_in(name: str, **names: Any) -> None:
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(names)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _packages(*names: str) -> None:
    for name in names:
        package = sys.modules[name] = _Folder(name, FOLDER / name.replace(".", "/"))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, package)


def _decline(*_: Any, **__: Any) -> None:
    """Registration of a custom operator: answered with the error after which the plain function is used."""
    raise AttributeError("custom operators are not registered here")


def _require(*relative: str) -> None:
    """Raises NotPresent unless these files are there."""
    for path in relative:
        if not (FOLDER / path).is_file():
            raise NotPresent(f"no {path} in {FOLDER.name}/")


def _vllm_setting(name: str) -> bool | None:
    """``envs.X``: everything off. Plain values: some end as constants of a kernel."""
    if name.startswith("__"):
        raise AttributeError(name)
    return None if name.endswith("FOLDER") else False


class _Off:
    """SGLang's settings: ``envs.X.get()`` is False."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return SimpleNamespace(get=lambda: False)


class _Logger(logging.Logger):
    def info_once(self, *_: Any) -> None: ...

    warning_once = info_once


@dataclass(frozen=True)
class _Vllm:
    shrink: Callable[..., None]
    expand: Callable[..., None]
    meta: Any
    utils: Any


def load_vllm() -> _Vllm:
    """vLLM's shrink and expand. Raises NotPresent."""
    folder = "vllm/lora/ops/triton_ops"
    _require(f"{folder}/lora_shrink_op.py", f"{folder}/lora_expand_op.py", f"{folder}/lora_kernel_metadata.py")
    if "vllm" not in sys.modules:
        _packages("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.utils")
        _stand_in("vllm.envs")
        sys.modules["vllm.envs"].__dict__["__getattr__"] = _vllm_setting
        _stand_in("vllm.logger", init_logger=_Logger)
        platform = SimpleNamespace(
            is_cuda=torch.cuda.is_available,
            has_device_capability=lambda wanted: torch.cuda.get_device_capability() >= (wanted // 10, wanted % 10),
        )
        _stand_in("vllm.platforms", current_platform=platform)
        _stand_in("vllm.triton_utils", tl=tl, triton=triton)
        _stand_in("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
        _stand_in(
            "vllm.utils.torch_utils",
            async_tensor_h2d=lambda data, dtype, device, **_: torch.tensor(data, dtype=dtype).to(device),
            direct_register_custom_op=_decline,
        )
    module = importlib.import_module
    prefix = "vllm.lora.ops.triton_ops."
    return _Vllm(
        module(prefix + "lora_shrink_op").lora_shrink,
        module(prefix + "lora_expand_op").lora_expand,
        module(prefix + "lora_kernel_metadata").LoRAKernelMeta,
        module(prefix + "utils"),
    )


def _vllm(case: LoraCase) -> AddDelta:
    """vLLM's default path: the slots of the server, not the adapters of the batch, make the grid; ranks padded."""
    vllm = load_vllm()
    # It remembers address tables by the addresses of the stacks, which another case may have had.
    vllm.utils._LORA_A_PTR_DICT.clear()
    vllm.utils._LORA_B_PTR_DICT.clear()
    rows, slots = case.point.rows, case.point.num_slots
    meta = vllm.meta.make(slots, rows, device=case.device)
    meta.prepare_tensors(case.owner.to(torch.int32))
    arguments = meta.meta_args(rows, False)
    b = [[stack.transpose(1, 2).contiguous() for stack in of_layer] for of_layer in case.b_t]
    h = torch.empty(len(case.columns), rows, case.max_rank, dtype=torch.float32, device=case.device)

    def run(layer: int, y: Tensor) -> None:
        vllm.shrink(case.x, case.a[layer], h, *arguments, 1.0)
        vllm.expand(h, b[layer], y, *arguments, offset_start=0, add_inputs=True)

    return run


_BATCH_FIELDS = (
    "use_cuda_graph bs num_segments seg_indptr weight_indices lora_ranks scalings max_len seg_lens permutation"
)


def load_sglang() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Any]:
    """SGLang's chunked shrink and expand, and its batch description. Raises NotPresent."""
    folder = "sglang/kernels/ops/lora/dense"
    _require(f"{folder}/chunked_sgmv_shrink.py", f"{folder}/chunked_sgmv_expand.py", f"{folder}/lora_tuning_config.py")
    if "sglang" not in sys.modules:
        _packages("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.lora", folder.replace("/", "."))
        _packages("sglang.srt", "sglang.srt.lora")
        _stand_in("sglang.srt.environ", envs=_Off())
        batch = make_dataclass("LoRABatchInfo", _BATCH_FIELDS.split())
        _stand_in("sglang.srt.lora.utils", LoRABatchInfo=batch)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        _stand_in(
            "sglang.srt.utils",
            cached_triton_kernel=lambda _key: lambda kernel: kernel,
            get_device_name=lambda: name,
        )
    module = importlib.import_module
    prefix = folder.replace("/", ".")
    return (
        module(f"{prefix}.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward,
        module(f"{prefix}.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward,
        sys.modules["sglang.srt.lora.utils"].LoRABatchInfo,
    )


def _csgmv(case: LoraCase) -> AddDelta:
    """SGLang's default backend: rows sorted by adapter, cut into chunks of 16, its server's default."""
    shrink, expand, batch_info = load_sglang()
    rows, slices = case.point.rows, len(case.columns)
    chunk = 16
    segments = [
        (adapter, min(chunk, len(of_adapter) - start))
        for adapter, of_adapter in enumerate(case.groups)
        for start in range(0, len(of_adapter), chunk)
    ]

    def int32(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=case.device)

    starts = [sum(length for _, length in segments[:i]) for i in range(len(segments) + 1)]
    info = batch_info(
        use_cuda_graph=False,
        bs=rows,
        num_segments=len(segments),
        seg_indptr=int32(starts),
        weight_indices=int32([adapter for adapter, _ in segments]),
        lora_ranks=int32(case.ranks),
        scalings=torch.ones(len(case.ranks), dtype=torch.float32, device=case.device),
        max_len=chunk,
        seg_lens=int32([length for _, length in segments]),
        permutation=case.order.to(torch.int32),
    )
    # A: the slices' rows of an adapter one after another at its true rank, then padding. B: slices stacked, padded.
    a = [_packed(of_layer, case) for of_layer in case.a]
    b = [torch.cat([stack.transpose(1, 2) for stack in of_layer], dim=1).contiguous() for of_layer in case.b_t]
    edges = torch.tensor([0, *(stop for _, stop in case.columns)], dtype=torch.int32)
    on_device, widest = edges.to(case.device), max(case.group.widths)

    def run(layer: int, y: Tensor) -> None:
        h = shrink(case.x, a[layer], info, slices)
        expand(h, b[layer], info, on_device, widest, y, slice_offsets_cpu=edges)

    return run


def _packed(stacks: list[Tensor], case: LoraCase) -> Tensor:
    slots, _, width = stacks[0].shape
    packed = stacks[0].new_zeros(slots, len(stacks) * case.max_rank, width)
    for slot, rank in enumerate(case.ranks):
        for i, stack in enumerate(stacks):
            packed[slot, i * rank : (i + 1) * rank] = stack[slot, :rank]
    return packed


VENDORS = (
    Implementation("vLLM shrink + expand", "vendor", _vllm, prefill=True),
    Implementation("SGLang csgmv", "vendor", _csgmv, prefill=True),
)
