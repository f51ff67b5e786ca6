"""Which implementation of an op runs: its Triton kernels or its plain-torch twin."""

import os
from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor

from onestage.errors import MachineError, UsageError


def wants_triton(tensor: Tensor) -> bool:
    """Whether an op runs its Triton kernels on `tensor`.

    `ONESTAGE_KERNELS` is "auto" (kernels for CUDA tensors where Triton is installed, torch elsewhere), "torch" (never)
    or "triton" (always). Only the device decides, never an error of a kernel: that is the user's to see.

    Args:
        tensor: An input of the op that lies on the device where it has to run.

    Raises:
        UsageError: another value.
        MachineError: "triton" for a tensor that is not on a GPU, unless kernels run in Triton's interpreter
            (`TRITON_INTERPRET=1`).
    """
    choice = _choice()
    on_gpu = tensor.device.type == "cuda"
    if choice == "auto":
        return on_gpu and _is_triton_installed()
    if choice == "triton" and not on_gpu and not is_interpreted():
        raise MachineError(
            f"ONESTAGE_KERNELS is 'triton', but the tensors are on the {tensor.device.type.upper()}",
            "unset ONESTAGE_KERNELS, move the tensors to a GPU, or set TRITON_INTERPRET=1 to test kernels without one",
        )
    return choice == "triton"


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device: slowly, and for tests only."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _choice() -> str:
    choice = os.environ.get("ONESTAGE_KERNELS", "auto")
    if choice not in ("auto", "torch", "triton"):
        raise UsageError(f"ONESTAGE_KERNELS is '{choice}'", "set it to auto, torch or triton, or unset it")
    return choice


@lru_cache(maxsize=1)
def _is_triton_installed() -> bool:
    return find_spec("triton") is not None
