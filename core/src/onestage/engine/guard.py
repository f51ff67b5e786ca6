"""A loss that is not finite stops the run: the batch is kept, the message says where to look, `replay` repeats it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from onestage.config import Precision
from onestage.engine.checkpoint import WeightsInfo, load_checkpoint, load_into, save_checkpoint
from onestage.errors import UsageError, UserError, some
from onestage.structures import Reference, Target


class NonFiniteLoss(UserError):
    """Training produced infinity or NaN."""


@dataclass(frozen=True)
class Replay:
    """What a repeated crash shows.

    Args:
        losses: Each term's value.
        first_layer: Name of the first layer in order of execution whose output is not finite, None if all are.
        step: The step that failed.
    """

    losses: dict[str, float]
    first_layer: str | None
    step: int


def seed_step(seed: int, rank: int, batch: int) -> None:
    """Sets every random generator from (seed, rank, batch).

    Done before each batch, it makes the generators of every rank part of the position in the run: nothing that draws
    in between (evaluation, a restarted loader, a resumed process) can change what follows.
    """
    mixed = int(np.random.SeedSequence((seed, rank, batch)).generate_state(1, np.uint64)[0])
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % (1 << 32))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 or fp16 where `precision` asks for it.

    Raises:
        UsageError: it asks for something else.
    """
    if precision not in get_args(Precision):
        raise UsageError(f"precision '{precision}' is unknown", f"use one of {', '.join(get_args(Precision))}")
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@dataclass(frozen=True)
class Suspect:
    """One batch about to be judged: all that is needed to repeat it.

    Args:
        images: As the model gets them.
        targets: One per image.
        seed: Arguments of `seed_step`: (seed, rank, batch).
        step: The update it belongs to.
        lr: Learning rate of that update.
        batch_size: Images per update over all processes.
        precision: fp32, bf16 or fp16.
    """

    images: Sequence[Tensor]
    targets: Sequence[Target]
    seed: tuple[int, int, int]
    step: int
    lr: float
    batch_size: int
    precision: str

    def save(self, path: Path, model: nn.Module, info: WeightsInfo) -> None:
        """Writes the batch, its random state, the weights it met and what they are."""
        targets = [
            {
                "boxes": t.boxes,
                "labels": t.labels,
                "masks": t.masks,
                "iscrowd": t.iscrowd,
                "image_id": t.image_id,
                "polygons": t.polygons,
                "track_ids": t.track_ids,
                "reference": None if t.reference is None else vars(t.reference),
            }
            for t in self.targets
        ]
        content = {
            "images": list(self.images),
            "targets": targets,
            "seed": self.seed,
            "step": self.step,
            "precision": self.precision,
            "model": model.state_dict(),
            "info": info.to_json(),
        }
        save_checkpoint(path, content, "crash")

    def error(self, bad_terms: Sequence[str], path: Path | None) -> NonFiniteLoss:
        """The two lines a user reads."""
        ids = [str(target.image_id) for target in self.targets]
        sizes = [size for target in self.targets for size in (target.boxes[:, 2:] - target.boxes[:, :2]).tolist()]
        smallest = min(sizes, key=min, default=None)
        boxes = "no boxes" if smallest is None else f"smallest box {smallest[0]:.3g} x {smallest[1]:.3g} px"
        tiny = sum(min(size) < 1 for size in sizes)
        saved = f"; batch saved to {path}" if path else ""
        repeat = f"add --replay {path} to repeat it; " if path else ""
        return NonFiniteLoss(
            f"{some(list(bad_terms))} is not finite at step {self.step} (rank {self.seed[1]}, images {some(ids)}; "
            f"{boxes}){saved}",
            f"{repeat}usual causes: learning rate {self.lr:.3g} for total batch {self.batch_size}, "
            f"boxes under 1 px (this batch has {tiny})",
        )


def info_of_crash(path: str | Path) -> WeightsInfo:
    """What the weights in a crash file are, their config among it.

    Raises:
        WeightsError: no such file, damaged, or something else.
    """
    return WeightsInfo.from_json(load_checkpoint(path, "crash")["info"])


def replay(path: str | Path, model: nn.Module, device: torch.device | str = "cpu") -> Replay:
    """Repeats the batch of a crash file with the weights and the random state it met.

    Args:
        path: A crash-<step>.pt.
        model: Built from the run's config (`info_of_crash`); its weights are replaced.
        device: Where to run.

    Raises:
        WeightsError: no such file, damaged, or of another model.
    """
    crash = load_checkpoint(path, "crash")
    device = torch.device(device)
    load_into(model, crash["model"], WeightsInfo.from_json(crash["info"]))
    model.to(device).train()
    images = [image.to(device) for image in crash["images"]]
    targets = [_target_of(saved).to(device) for saved in crash["targets"]]
    with _first_non_finite(model) as found, autocast(device, crash["precision"]):
        seed_step(*crash["seed"])
        losses: Mapping[str, Tensor] = model(images, targets)
    return Replay(
        {name: float(value.detach()) for name, value in losses.items()}, found[0] if found else None, crash["step"]
    )


def _target_of(saved: Mapping[str, Any]) -> Target:
    reference = saved.get("reference")
    return Target(**{**saved, "reference": None if reference is None else Reference(**reference)})


@contextlib.contextmanager
def _first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of leaf layers whose output is not finite, in order of execution."""
    found: list[str] = []

    def watch(name: str) -> object:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                found.append(name)

        return look

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
