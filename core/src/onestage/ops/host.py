"""What the host waits for: nothing, until results travel to it together."""

from __future__ import annotations

import torch
from torch import Tensor


def keeps_fixed_shapes(device: torch.device) -> bool:
    """Whether sizes must not depend on values on this device: on a GPU the host would wait for each of them."""
    return device.type == "cuda"


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device on the host, which waits once for all of them.

    Those of a GPU come in pinned memory, of which there is little: what is kept for long is better copied on.
    """
    device = tensors[0].device
    copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return copies
