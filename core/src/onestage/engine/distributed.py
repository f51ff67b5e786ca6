"""Several processes started by torchrun, or one: the same calls work in both."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onestage.errors import MachineError, UsageError

TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 computes AP


def start(device: str = "auto") -> torch.device:
    """Joins the processes that torchrun announced in the environment, if any, and gives this one its device.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or another torch device; with several processes "cuda" means the one
            of the local rank.
    """
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if chosen.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if local_rank >= torch.cuda.device_count():
                raise MachineError(
                    f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}",
                    "start at most one process per GPU with torchrun --nproc-per-node, or add --device cpu",
                )
            chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=chosen)  # without it a barrier warns
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
    return chosen


def stop() -> None:
    """Leaves the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def left_together() -> Iterator[None]:
    """Leaves the group after the block, or when all processes were told to stop, and not after an error.

    NCCL takes a group down together: a process that failed would wait, its error unsaid, for others that wait for it in
    another operation. Left to the end of the process the group holds nobody up.
    """
    try:
        yield
    except SystemExit:  # after the same step everywhere
        stop()
        raise
    stop()


def pick_device(name: str = "auto") -> torch.device:
    """The device a name means; "auto" is the GPU if there is one.

    Raises:
        MachineError: the machine has no such device.
        UsageError: no device is called so.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device '{name}' is unknown", "use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = "" if torch.version.cuda else f"; torch {torch.__version__} was built without CUDA"
        raise MachineError(
            f"device '{name}' is not there: {torch.cuda.device_count()} GPUs found{built}", "use --device cpu"
        )
    return device


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_zero() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def reduce_mean(value: Tensor) -> Tensor:
    """Mean of `value` over all processes, without gradient; `value` itself stays as it is.

    Args:
        value: Any shape, floating point, the same shape in every process.
    """
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Writes rank 0's numbers into the tensors of every process.

    Args:
        tensors: As many, of the same shapes and types, in every process; on the group's device.
    """
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in order of rank, in every process.

    Args:
        value: Whatever JSON can hold; numbers come back exactly, tuples as lists.
    """
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    lengths = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=data.device))
    longest = max(int(length) for length in lengths)
    padded = [torch.zeros(longest, dtype=torch.uint8, device=data.device) for _ in lengths]
    dist.all_gather(padded, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [
        json.loads(part[: int(length)].cpu().numpy().tobytes()) for part, length in zip(padded, lengths, strict=True)
    ]


def broadcast(value: Any) -> Any:
    """Rank 0's `value` in every process; what JSON can hold. The others' argument does not count."""
    return gather(value if rank_zero() else None)[0]


def _device() -> torch.device:
    """Where tensors must lie for the group's backend."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
