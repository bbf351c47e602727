"""What PEFT types that save a seed in place of tensors need: numbers drawn again, in the order of the model's modules.

A draw is repeated only where this build's generators give the numbers that they gave when this was written, and only
for a base that tells in which order it registers its modules: PEFT goes through them in that order.
"""

from __future__ import annotations

import numpy as np
import torch

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_kinds.reader import PeftReader

_KNOWN_NORMAL = (-0.1467950940132141, 0.13280697166919708, -0.8201345205307007, -0.42832550406455994)
"""Of seed 7: values 0 and 11 of 12 (one by one), 0 and 4099 of 5000 (in stretches)."""
_KNOWN_SHUFFLE = (553, 4779, 1218, 4557, 9444, 12295)
"""Of seed 7, in turn: items 0 and 4099 of 5000 shuffled; first and last of 300 of 5000, and of 1000 of 20000."""


def is_known_normal() -> bool:
    """Whether PyTorch's normal draws are those that seeds meant."""
    short, long = (_normal(count) for count in (12, 5000))
    return (float(short[0]), float(short[11]), float(long[0]), float(long[4099])) == _KNOWN_NORMAL


def _normal(count: int) -> torch.Tensor:
    return torch.normal(mean=0.0, std=1.0, size=(count,), generator=torch.Generator().manual_seed(7))


def is_known_shuffle() -> bool:
    """Whether numpy shuffles and chooses as seeds meant: it does not promise that from version to version."""
    generator = np.random.default_rng(7)
    shuffled = np.arange(5000, dtype=np.int32)
    generator.shuffle(shuffled)
    few, many = generator.choice(5000, 300, replace=False), generator.choice(20000, 1000, replace=False)
    found = (shuffled[0], shuffled[4099], few[0], few[-1], many[0], many[-1])
    return tuple(int(number) for number in found) == _KNOWN_SHUFFLE


def balanced_draw(count: int, length: int, seed: int) -> torch.Tensor:
    """int32 ``[count]``: numbers below ``length`` in random order, each as often as any other or once more."""
    generator = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(length, dtype=np.int32), count // length)
    if rest := count % length:
        more = generator.choice(length, size=rest, replace=False)
        numbers = np.concatenate([numbers, more.astype(np.int32)])
    generator.shuffle(numbers)
    return torch.from_numpy(numbers)


def check_order(reader: PeftReader, field: str, findings: Findings) -> None:
    """A base whose order of modules is known, and no targeted linear that is counted in it but cannot be served."""
    place, names = f"{reader.where}:{field}", {linear.name for linear in reader.linears}
    if not reader.registered:
        allowed = "a base that tells the order of its modules; or a file that holds what hangs on it"
        findings.add("seed_not_usable", place, reader.config.get(field), allowed)
    for name in reader.registered:
        if name not in names:
            findings.add("unsupported_target", f"{reader.where}:target_modules", name, "linears of the decoder layers")
