"""How many bytes a training step keeps alive, counted without a GPU and without computing the network.

The network's tensors are fake: they have a shape and a storage but no numbers, so a step takes seconds. What decides
shapes (ground truth, assignment, windows) stays real and small. `LiveBytes` sees every operator below autograd,
backward and optimiser included, and follows each storage from its birth to its release. Not counted are what a GPU
adds: workspaces of convolutions and the allocator's rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onestage.config import ScheduleConfig
from onestage.engine.schedule import make_optimizer
from onestage.structures import Target

INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def training_peak(
    build: Callable[[], nn.Module],
    images: Sequence[Tensor],
    targets: Sequence[Target],
    schedule: ScheduleConfig,
    *,
    keep_gradients: bool = False,
    steps: int = 2,
) -> int:
    """Most bytes alive during full fp32 training steps: forward, losses, backward, optimiser.

    Args:
        build: Makes the model; called where its parameters get no numbers.
        images: The batch, [3, H, W] each; real. Their sizes, not their contents, matter.
        targets: One per image; real.
        schedule: The optimiser and its settings.
        keep_gradients: Gradients are set to zero between steps, as torch did until 2022, instead of released.
        steps: The optimiser has its state from the second on.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build().train()
        optimizer = make_optimizer(model, schedule)
    live = LiveBytes([*model.parameters(), *model.buffers(), *images])
    with live:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=not keep_gradients)
            losses = model(list(images), list(targets))
            sum(losses.values()).backward()
            optimizer.step()
            del losses
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive while it is entered, and lets fake tensors meet real ones.

    An operator whose tensors are all real computes; as soon as one is fake the result is. A number that was never
    computed cannot be read (`.item()`, `.tolist()` raise).

    Args:
        existing: Tensors that are alive from the start: parameters, buffers, inputs.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()
        for tensor in existing:
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in INDEXING:
            # How many entries of a mask are true is a shape: read it while it is there to be read.
            indices = [part for index in args[1] for part in _positions(index)]
            args = (args[0], indices, *args[2:])
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the positions it selects, one tensor per axis; positions as they are."""
    if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        return list(index.nonzero(as_tuple=True))
    return [index]
