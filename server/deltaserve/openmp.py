"""How long OpenMP's threads wait awake."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 2000


def let_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Call it before torch is imported; what the user set stays.

    libgomp's threads wait for the next parallel region in 300,000 turns of a loop, some milliseconds. Between two
    regions of PyTorch run the C++ operators, whose own threads want those cores: left as it is, a step with a prompt of
    512 tokens takes a quarter longer on two cores.
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = str(SPINS)
