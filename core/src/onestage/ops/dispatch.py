"""Which implementation of an op runs: the plain-torch twin, or a kernel where there is one."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

from onestage.errors import MachineError, UsageError

CHOICES = ("auto", "torch", "triton")


def wants_triton(*tensors: Tensor) -> bool:
    """True if the Triton kernel shall run on these inputs.

    `ONESTAGE_KERNELS` decides: "auto" (kernels for CUDA tensors where kernels are installed), "torch" (never) or
    "triton" (always).
    """
    choice = os.environ.get("ONESTAGE_KERNELS", "auto")
    if choice not in CHOICES:
        raise UsageError(f"ONESTAGE_KERNELS is '{choice}'", f"set it to one of {', '.join(CHOICES)}, or unset it")
    installed = importlib.util.find_spec("onestage.ops.triton") is not None
    if choice == "triton" and not installed:
        raise MachineError("ONESTAGE_KERNELS is 'triton', but this version has no Triton kernels", "unset it")
    return choice == "triton" or (choice == "auto" and installed and all(tensor.is_cuda for tensor in tensors))
