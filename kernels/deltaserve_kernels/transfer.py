"""Small host arrays to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device | str) -> Tensor:
    """``host`` on ``device``; on the host's own device the tensor itself.

    To a GPU it goes through pinned memory of torch's caching allocator, which takes a piece back only once the copy is
    done, so nobody waits: a copy from pageable memory would hold the host until the stream has come to it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
