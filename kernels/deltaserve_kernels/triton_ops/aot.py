"""Compile a kernel for a GPU that is not here, and read in the machine code what the interpreter cannot show:
registers, spills, shared memory, the width of loads, which matrix instructions.

The triton wheel carries ptxas and cuobjdump; no GPU and no driver are needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on one architecture. ``loads``: global loads by bits a thread takes at once, 128 the most;
    ``instructions``: count by opcode without modifiers; ``listing``: each with its operands, by address."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    instructions: Mapping[str, int]
    listing: tuple[str, ...] = field(default=(), repr=False)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.instructions.get("LDL", 0) + self.instructions.get("STL", 0)


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile ``kernel``, a ``triton.jit`` function, for compute capability ``arch`` (80, 90).

    ``types`` names each run-time argument's type ("*bf16", "i32", "fp32"), ``constants`` each constexpr's value. As the
    just-in-time compiler would, every argument it may specialise is taken as a multiple of 16.
    """
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, param in enumerate(kernel.params):
        signature[param.name] = "constexpr" if param.name in constants else types[param.name]
        may_specialise = param.name not in constants and not param.do_not_specialize
        if may_specialise and not signature[param.name].startswith("fp"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, dict(constants), attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    sass, usage = _disassemble(compiled.asm["cubin"])
    opcodes = _INSTRUCTION.findall(sass)
    match = _USAGE.search(usage)
    if match is None or not opcodes:
        raise RuntimeError(f"cuobjdump says nothing of {kernel.__name__}; the format it prints may have changed")
    return Compiled(
        name=kernel.__name__,
        arch=arch,
        registers=int(match[1]),
        stack_bytes=int(match[2]),
        shared_bytes=compiled.metadata.shared,
        loads=_widths(opcodes, ("LDG", "LDGSTS")),
        stores=_widths(opcodes, ("STG",)),
        instructions=Counter(opcode.split(".")[0] for opcode in opcodes),
        listing=tuple(_LINE.findall(sass)),
    )


def _widths(opcodes: list[str], names: tuple[str, ...]) -> Counter[int]:
    widths: Counter[int] = Counter()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name in names:
            widths[next((_BITS[modifier] for modifier in modifiers if modifier in _BITS), 32)] += 1
    return widths


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return sass, usage
