"""Launches that begin while the launch before them ends (programmatic dependent launch, capability 9.0 on).

A launch marked early may start as soon as every program of the one before it has allowed that, and waits itself before
it touches what others write. Each early kernel waits, in all of its programs: whoever comes behind it waits for it
alone, so it must not end before those before it have.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_then_allow(EARLY: tl.constexpr):
    """At a kernel's top: wait for the launch before this one, then let the next one begin."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@cache
def is_possible(device: torch.device) -> bool:
    """Whether launches on this device may overlap; never in the interpreter."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that is early where the device has such."""
    possible = is_possible(device)
    return {"EARLY": possible, "launch_pdl": possible}
