"""Which implementation of an op runs. Every op has a plain-torch twin; none has a Triton kernel yet."""

import os

from onestage.errors import MachineError, UsageError


def refuse_forced_kernel(op: str) -> None:
    """Raises where the user asks for a kernel that is not there.

    `ONESTAGE_KERNELS` is "auto" (a kernel for CUDA tensors, if the op has one), "torch" (never) or "triton" (always).

    Args:
        op: Name of the op's module.

    Raises:
        UsageError: another value.
        MachineError: "triton", since `op` has no kernel.
    """
    choice = os.environ.get("ONESTAGE_KERNELS", "auto")
    if choice not in ("auto", "torch", "triton"):
        raise UsageError(f"ONESTAGE_KERNELS is '{choice}'", "set it to auto, torch or triton, or unset it")
    if choice == "triton":
        raise MachineError(f"ONESTAGE_KERNELS is 'triton', but '{op}' has no Triton kernel", "unset ONESTAGE_KERNELS")
