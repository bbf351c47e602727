"""Builds the library ahead of time, as an image does, and prints where it lies."""

from __future__ import annotations

import sys

from deltaserve_kernels.cpu.build import BuildFailed, ensure_built

try:
    sys.stdout.write(f"{ensure_built()}\n")
except BuildFailed as error:
    sys.exit(f"CPU operators not built: {error}")
