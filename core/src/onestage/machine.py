"""What of the machine this process may use, and has used; importing this does not import torch."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: torch.device) -> int:
    """Processes that read images where nobody says how many: none on a small CPU, where the model needs the cores."""
    cores = usable_cores()
    return min(4, cores // 2) if device.type == "cuda" or cores > 4 else 0


def peak_memory(device: torch.device | None = None) -> float:
    """Most bytes in use so far: by tensors on a GPU, else by this process; NaN where the system does not tell."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return math.nan
    import resource  # only where the platform has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
