"""One section of the GPU benchmark in a process of its own: a fault on the device ends it and nothing else.

Called by ``gpu.py``; results go to the journal. Exit status 0: all that was asked was tried. ``DEVICE_LOST``: the
device answers no more in this process, call again and it goes on behind what broke it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from deltabench import machine, probe, rates
from deltabench.floors import Rates
from deltabench.journal import Budget, Journal, read
from deltabench.kernel_section import KernelSection
from deltabench.points import DRY, FULL

NAMES = ("rates", "lora", "sparse", "decode", "decode-sparse")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--warm", action="store_true", help="compile and check, time nothing")
    parser.add_argument("--groups", nargs="*", default=[], help="fused linears, all by default")
    args = parser.parse_args(arguments)
    budget = Budget(args.seconds)
    torch.manual_seed(0)
    device = torch.device(args.device)
    # Triton's interpreter multiplies bfloat16 wrongly, so the host tries everything in float16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    journal = Journal(args.journal)
    if args.name == "rates":
        found = rates.measure(device, dtype)
        fields = {
            "copy_bytes_per_second": found.copy,
            "gemm_flops_per_second": found.gemm,
            "launch_us": rates.launch_us(device),
            "dtype": str(dtype).removeprefix("torch."),
            "machine": machine.describe(device),
            "versions": machine.versions(),
        }
        journal.add("rates", "rates", "ok", fields)
        if device.type == "cuda":
            probe.find(device, dtype, partial(_tell_capture, journal))
        return 0
    plan = DRY if args.dry_run else FULL
    found = rates_of(args.journal)
    if args.name.startswith("decode"):
        # Only here: it needs transformers and the server's packages.
        from deltabench.decode_section import DecodeSection

        section = DecodeSection(plan, device, found, journal, budget)
        if args.name == "decode":
            section.lora()
        else:
            section.sparse()
        return 0
    known = frozenset(
        e["key"].removeprefix("capture ") for e in read(args.journal) if e["kind"] == "capture" and e["can"]
    )
    kernels = KernelSection(plan, device, dtype, found, journal, budget, args.groups, args.warm, known)
    if args.name == "lora":
        kernels.lora()
    else:
        kernels.sparse()
    return 0


def _tell_capture(journal: Journal, name: str, reason: str) -> None:
    journal.add("capture", f"capture {name}", "ok", {"can": not reason, "why_not": reason})


def rates_of(path: Path) -> Rates:
    """The rates that this run has measured; 1 byte and 1 flop per second while nothing is timed."""
    for entry in read(path):
        if entry["kind"] == "rates":
            return Rates(entry["copy_bytes_per_second"], entry["gemm_flops_per_second"])
    return Rates(1.0, 1.0)
