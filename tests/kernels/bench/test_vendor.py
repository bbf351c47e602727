"""The loader of other projects' kernel files, tried on files made here that ask for what theirs ask for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and the programs under test are written in it", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
VLLM = {
    "kernel_utils.py": "from vllm.triton_utils import tl, triton\n",
    "utils.py": """
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import next_power_of_2
from vllm.utils.torch_utils import async_tensor_h2d
logger = init_logger(__name__)
is_batch_invariant = envs.VLLM_BATCH_INVARIANT
assert not is_batch_invariant and envs.VLLM_TUNED_CONFIG_FOLDER is None
assert current_platform.is_cuda() in (True, False) and next_power_of_2(5) == 8
logger.warning_once("said once")
_LORA_A_PTR_DICT = {"old": 1}
_LORA_B_PTR_DICT = {"old": 1}
""",
    "lora_shrink_op.py": """
import torch
from vllm import envs
from vllm.lora.ops.triton_ops.kernel_utils import tl
from vllm.lora.ops.triton_ops.utils import is_batch_invariant
from vllm.utils.torch_utils import direct_register_custom_op

def _shrink(x, a, out, owner, scaling):
    out.zero_()
    for row, slot in enumerate(owner.tolist()):
        for i, stack in enumerate(a):
            out[i, row] = scaling * (stack[slot].float() @ x[row].float())

try:
    direct_register_custom_op(op_name="lora_shrink", op_func=_shrink)
    lora_shrink = torch.ops.vllm.lora_shrink
except AttributeError:
    lora_shrink = _shrink
""",
    "lora_expand_op.py": """
def lora_expand(h, b, y, owner, offset_start, add_inputs):
    assert add_inputs and offset_start == 0
    for row, slot in enumerate(owner.tolist()):
        at = 0
        for i, stack in enumerate(b):
            width = stack.shape[1]
            y[row, at : at + width] += (stack[slot].float() @ h[i, row]).to(y.dtype)
            at += width
""",
    "lora_kernel_metadata.py": """
class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return LoRAKernelMeta()
    def prepare_tensors(self, owner):
        self.owner = owner
    def meta_args(self, rows, specialize):
        return (self.owner[:rows],)
""",
    "__init__.py": "raise ImportError('the package itself is not run')\n",
}
SGLANG = {
    "lora_tuning_config.py": "from sglang.srt.utils import get_device_name\nassert get_device_name()\n",
    "chunked_sgmv_shrink.py": """
from sglang.kernels.ops.lora.dense.lora_tuning_config import get_device_name
from sglang.srt.environ import envs
from sglang.srt.lora.utils import LoRABatchInfo
from sglang.srt.utils import cached_triton_kernel
assert envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.get() is False

@cached_triton_kernel(lambda _, kwargs: ())
def segments(info):
    edges = info.seg_indptr.tolist()
    for i, slot in enumerate(info.weight_indices.tolist()):
        assert 0 < edges[i + 1] - edges[i] <= info.max_len
        for row in info.permutation[edges[i] : edges[i + 1]].tolist():
            yield row, slot, int(info.lora_ranks[slot])

def chunked_sgmv_lora_shrink_forward(x, weights, info, num_slices):
    out = x.new_zeros(len(x), weights.shape[1])
    for row, slot, rank in segments(info):
        out[row, : rank * num_slices] = weights[slot, : rank * num_slices] @ x[row]
    return out
""",
    "chunked_sgmv_expand.py": """
from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import segments

def chunked_sgmv_lora_expand_forward(h, weights, info, offsets, widest, y, slice_offsets_cpu):
    edges = slice_offsets_cpu.tolist()
    for row, slot, rank in segments(info):
        for i, (start, stop) in enumerate(zip(edges, edges[1:])):
            y[row, start:stop] += weights[slot, start:stop, :rank] @ h[row, i * rank : (i + 1) * rank]
""",
}
CHECK = """
import torch
from deltabench import vendor
from deltabench.cases import LoraCase
from deltabench.floors import FusedLinear
from deltabench.implementations import NotPresent
from deltabench.kernel_section import check
from deltabench.points import Point
for one in vendor.VENDORS:
    for point in (Point("mixed", 40, 2, (8, 16), 4), Point("again", 5, 3, (4,))):
        case = LoraCase(FusedLinear("qkv", 64, (64, 32, 32)), point, 1, torch.float32, torch.device("cpu"))
        try:
            error, allowed = check(case, one, one.prepare(case))
            print(one.name, "right" if error <= allowed else f"wrong {error}")
        except NotPresent as reason:
            print(one.name, "not present", reason)
if "vllm.lora.ops.triton_ops.utils" in __import__("sys").modules:
    print(vendor.load_vllm().utils._LORA_A_PTR_DICT)
"""


def outcome(folder: Path) -> str:
    environment = {**os.environ, "DELTABENCH_VENDOR": str(folder), "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_files_run_without_their_packages(tmp_path) -> None:
    for folder, files in (("vllm/lora/ops/triton_ops", VLLM), ("sglang/kernels/ops/lora/dense", SGLANG)):
        target = tmp_path / folder
        target.mkdir(parents=True)
        for name, text in files.items():
            (target / name).write_text(text)
    found = outcome(tmp_path).splitlines()
    assert found == ["vLLM shrink + expand right"] * 2 + ["SGLang csgmv right"] * 2 + ["{}"]


def test_absent_files_are_named(tmp_path) -> None:
    found = outcome(tmp_path)
    assert found.count("not present") == 4
    assert "lora_shrink_op.py" in found
    assert "chunked_sgmv_shrink.py" in found


def test_third_party_files_are_ignored_by_git() -> None:
    assert "kernels/vendor/" in (ROOT / ".gitignore").read_text().splitlines()
