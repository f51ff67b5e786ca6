"""Which implementation of an op runs: the plain-torch twin, or a kernel where there is one."""

from __future__ import annotations

import os

from torch import Tensor

from onestage.errors import MachineError, UsageError

KERNELS: frozenset[str] = frozenset()  # ops with a Triton kernel, by module name


def wants_triton(op: str, *tensors: Tensor) -> bool:
    """True if the Triton kernel of `op` shall run on these inputs.

    `ONESTAGE_KERNELS` decides: "auto" (kernels for CUDA tensors), "torch" (never) or "triton" (always). An op without a
    kernel runs in torch unless "triton" was asked for.
    """
    choice = os.environ.get("ONESTAGE_KERNELS", "auto")
    if choice not in ("auto", "torch", "triton"):
        raise UsageError(f"ONESTAGE_KERNELS is '{choice}'", "set it to auto, torch or triton, or unset it")
    if choice == "triton" and op not in KERNELS:
        raise MachineError(f"ONESTAGE_KERNELS is 'triton', but '{op}' has no Triton kernel", "unset ONESTAGE_KERNELS")
    return op in KERNELS and (choice == "triton" or (choice == "auto" and all(tensor.is_cuda for tensor in tensors)))
