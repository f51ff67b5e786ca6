"""From a data set to batches: order, augmentation and workers, all reproducible from (seed, epoch, sample).

A position in training is (epoch, batch), and every random choice is drawn from a generator seeded with what it is for;
so a resumed run goes on exactly, with any number of workers.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_iou
from torchvision.transforms import v2

from onestage.config import InputConfig
from onestage.errors import MachineError, UsageError, UserError
from onestage.structures import Target

Sample = tuple[Tensor, Target]
Augmentation = Callable[[Tensor, Target], Sample]

CROP_MODES = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # least IoU of every box with the crop; None: no crop
CROP_TRIES = 50


class WorkerDied(MachineError):
    """A process that reads images ended before its work was done."""


class InstanceDataset(Protocol):
    """What training and evaluation need of a data set; `CocoDataset` and `ShapesDataset` have it."""

    name: str
    skipped: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def subset(self, indices: Sequence[int]) -> InstanceDataset: ...

    @property
    def categories(self) -> tuple[tuple[int, str], ...]: ...

    @property
    def image_ids(self) -> list[int]: ...

    @property
    def image_sizes(self) -> np.ndarray: ...

    @property
    def aspect_ratios(self) -> np.ndarray: ...

    def coco_gt(self) -> COCO: ...


def make_loader(
    dataset: InstanceDataset,
    config: InputConfig,
    *,
    batch_size: int,
    training: bool,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Batches of (images, targets): lists of [3, h, w] uint8 RGB tensors and of `Target` in image pixels.

    Args:
        dataset: Where samples come from.
        config: Names the augmentation; resizing and normalising is the model's.
        batch_size: Images of a batch of this process.
        training: Shuffled, grouped by aspect ratio and augmented, with a `ResumableSampler` as `batch_sampler`;
            otherwise in order, each image once over all processes.
        workers: Worker processes; 0 loads in this one.
        seed: Of order and augmentation.
        rank: This process, of `world`.
        world: Number of processes.
    """
    if workers:
        _allow_many_open_files()
    batches: Iterable[list[tuple[int, int]]]
    if training:
        change = augment(config)
        batches = ResumableSampler(dataset.aspect_ratios, batch_size, seed=seed, rank=rank, world=world)
    else:
        change = augment(replace(config, augmentation="none"))
        own = [(0, index) for index in range(rank, len(dataset), world)]
        batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    return _Loader(
        AugmentedDataset(dataset, change, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_Collate(dataset),
        worker_init_fn=leave_sigterm,
        persistent_workers=training and workers > 0,
    )


class ResumableSampler(Sampler):
    """Batches of (epoch, index) of one process, images of like aspect together.

    Every epoch is a permutation that depends on the seed and the epoch alone. Wide images (width / height > 1) and the
    others are batched apart; what is left of both over full batches shares the last ones, which repeat images to be
    full. The number of batches is the same in every epoch and for every process.

    Iterating goes on from (epoch, batch) to the end of the epoch; iterating again gives the next one. Workers run ahead
    of training, so training counts the batches it took itself and says so with `load_state_dict`.

    Args:
        aspect_ratios: [number of images] width / height.
        batch_size: Images of a batch of one process.
        seed: Of the order.
        rank: This process, of `world`.
        world: Number of processes.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.wide = np.asarray(aspect_ratios) > 1
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.wide) / (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self._batches(self.epoch)
        while self.batch < len(batches):
            self.batch += 1
            yield [(self.epoch, index) for index in batches[self.batch - 1].tolist()]
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _batches(self, epoch: int) -> np.ndarray:
        """[batches, batch_size] image indices of this process."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.wide))
        whole = self.batch_size * self.world
        groups = [order[self.wide[order]], order[~self.wide[order]]]
        full = [group[: len(group) // whole * whole].reshape(-1, whole) for group in groups]
        rest = np.concatenate([group[len(group) // whole * whole :] for group in groups])
        missing = -len(rest) % whole
        rest = np.concatenate((rest, np.resize(order, missing))).reshape(-1, whole)
        batches = random.permutation(np.concatenate((*full, rest)))
        return batches[:, self.rank :: self.world]


class AugmentedDataset(Dataset):
    """Samples by (epoch, index), augmented from a random state of their own.

    Args:
        dataset: Where samples come from.
        change: The augmentation; draws from torch's CPU generator.
        seed: With epoch and index the seed of that generator.
    """

    def __init__(self, dataset: InstanceDataset, change: Augmentation, seed: int):
        self.dataset = dataset
        self.change = change
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample | UserError:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))
            try:
                return self.change(*self.dataset[index])  # a pair of frames draws its second one
            except UserError as error:  # raised in the main process: between processes torch would make text of it
                return error


def collate(samples: Sequence[Sample | UserError]) -> tuple[list[Tensor], list[Target]] | UserError:
    """Two lists, as images of a batch differ in size until the model has resized them; or the first error."""
    images, targets = [], []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        images.append(sample[0])
        targets.append(sample[1])
    return images, targets


class _Collate:
    """`collate`, and what the data set has listed in `skipped` since the last batch: a worker has its own list."""

    def __init__(self, dataset: InstanceDataset):
        self.dataset = dataset
        self.told = len(dataset.skipped)

    def __call__(self, samples: Sequence[Sample | UserError]) -> tuple[Any, list[str]]:
        news = self.dataset.skipped[self.told :]
        self.told += len(news)
        return collate(samples), news


class _Loader(DataLoader):
    """Raises the errors that workers hand on, tells of their deaths, and keeps the list of what they skipped."""

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Target]]]:  # type: ignore[override]
        augmented: Any = self.dataset
        skipped = augmented.dataset.skipped
        iterator: Any = None
        while True:
            try:
                if iterator is None:
                    with _deaths_unannounced():
                        iterator = super().__iter__()  # of workers that stay it waits for an answer of each
                batch, news = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                failed: Any = iterator or self._iterator
                raise _worker_died([worker.exitcode for worker in failed._workers]) from error
            skipped += [line for line in news if line not in skipped]
            if isinstance(batch, UserError):
                raise batch
            yield batch


def leave_sigterm(worker: int) -> None:
    """Lets a worker obey the SIGTERM of the main process alone.

    torchrun and batch systems send one to every process, and the main one needs its workers to finish the step.
    """
    if sys.platform == "linux":  # others do not tell who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def _deaths_unannounced() -> Iterator[None]:
    """Takes back torch's handler of SIGCHLD, which raises wherever the main thread is, in the middle of a step too.

    Without it a loader that misses a batch looks after its workers within five seconds.
    """
    reachable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if reachable else None
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def _worker_died(exit_codes: Sequence[int | None]) -> WorkerDied:
    """What the exit codes of all workers say; None is one that lives."""
    code = next((code for code in exit_codes if code), 0)
    name = signal.Signals(-code).name if code < 0 else ""
    how = f"was ended by {name}" if name else f"ended with exit code {code}"
    fixes = {
        "SIGKILL": "memory ran out, if nobody killed it: use fewer --workers",
        "SIGBUS": "shared memory is full: use --workers 0, or give the container more (docker run --shm-size 8g)",
    }
    fix = fixes.get(name, "use --workers 0, where what ends it shows")
    return WorkerDied(f"a process that reads images {how}", fix)


def augment(config: InputConfig) -> Augmentation:
    """The training augmentation that `config.augmentation` names, on images and targets in image pixels."""
    if config.augmentation == "none":
        return lambda image, target: (image, target)
    if config.augmentation == "flip":
        return random_flip
    mean = config.mean if config.channel_order == "rgb" else config.mean[::-1]
    photometric = v2.RandomPhotometricDistort(
        brightness=(1 - 32 / 255, 1 + 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.05, 0.05), p=0.5
    )

    def ssd(image: Tensor, target: Target) -> Sample:
        if target.reference is not None:
            raise UsageError("pairs of frames cannot be cropped apart", "use --model.input.augmentation flip")
        check_iou = config.augmentation == "ssd"
        return random_flip(*expand_and_crop(photometric(image), target, mean, check_iou))

    return ssd


def random_flip(image: Tensor, target: Target) -> Sample:
    """Mirrors left and right with probability 0.5, a reference frame with its image."""
    if torch.rand(()) >= 0.5:
        return image, target
    width = image.shape[-1]
    polygons = target.polygons
    if polygons is not None:
        polygons = tuple(
            None if parts is None else tuple(tuple(_mirrored(part, width)) for part in parts) for parts in polygons
        )
    reference = target.reference
    if reference is not None:
        boxes = _mirrored_boxes(reference.boxes, reference.image.shape[-1])
        reference = replace(reference, image=reference.image.flip(-1), boxes=boxes)
    boxes = _mirrored_boxes(target.boxes, width)
    masks = target.masks.flip(-1)
    return image.flip(-1), replace(target, boxes=boxes, masks=masks, polygons=polygons, reference=reference)


def expand_and_crop(image: Tensor, target: Target, fill: Sequence[float], check_iou: bool = True) -> Sample:
    """SSD's two steps: a larger canvas around the image (probability 0.5), then a crop that boxes lie well inside.

    The canvas is never built: the crop is cut from the image and filled where it goes beyond. torchvision's
    RandomIoUCrop asks one box for the IoU, the recipe asks all of them.

    Args:
        image: [3, H, W] uint8.
        target: In the same pixels; at least one instance stays if there was one.
        fill: Colour outside the image, 0..255 RGB.
        check_iou: False: a crop has to hold the centre of one instance and no more, as in YOLACT's code, whose test of
            the IoU always passes.
    """
    height, width = image.shape[-2:]
    window = (0, 0, width, height)  # x0, y0, x1, y1 in image pixels
    if torch.rand(()) < 0.5:
        ratio = _uniform(1, 4)
        left, top = int(_uniform(0, width * ratio - width)), int(_uniform(0, height * ratio - height))
        window = (-left, -top, int(width * ratio) - left, int(height * ratio) - top)
    boxes = target.boxes[~target.iscrowd]
    window = _random_crop(window, boxes, check_iou) or window
    return _cut(image, target, window, fill)


def _random_crop(canvas: tuple[int, int, int, int], boxes: Tensor, check_iou: bool) -> tuple[int, int, int, int] | None:
    """A window of the canvas for a mode drawn at random; a mode that finds none draws another, as published."""
    width, height = canvas[2] - canvas[0], canvas[3] - canvas[1]
    while True:
        least = CROP_MODES[int(torch.randint(len(CROP_MODES), ()))]
        if least is None:
            return None
        for _ in range(CROP_TRIES):
            w, h = _uniform(0.3 * width, width), _uniform(0.3 * height, height)
            if not 0.5 <= h / w <= 2:
                continue
            x0, y0 = int(canvas[0] + _uniform(0, width - w)), int(canvas[1] + _uniform(0, height - h))
            window = (x0, y0, x0 + max(1, int(w)), y0 + max(1, int(h)))
            if not len(boxes):
                return window
            if check_iou and box_iou(boxes, boxes.new_tensor([window])).min() < least:
                continue
            if _centre_inside(boxes, window).any():
                return window


def _cut(image: Tensor, target: Target, window: tuple[int, int, int, int], fill: Sequence[float]) -> Sample:
    """Image and target in the window's frame; instances whose centre is outside are dropped."""
    x0, y0, x1, y1 = window
    height, width = image.shape[-2:]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    inside = (slice(top - y0, max(bottom, top) - y0), slice(left - x0, max(right, left) - x0))
    source = (slice(top, bottom), slice(left, right))
    target = target[_centre_inside(target.boxes, window)]
    pixels = image.new_empty(3, y1 - y0, x1 - x0)
    pixels[:] = torch.tensor(fill).round().to(image.dtype)[:, None, None]
    masks = target.masks.new_zeros(len(target), y1 - y0, x1 - x0)
    if right > left and bottom > top:
        pixels[:, inside[0], inside[1]] = image[:, source[0], source[1]]
        masks[:, inside[0], inside[1]] = target.masks[:, source[0], source[1]]
    boxes = target.boxes - target.boxes.new_tensor([x0, y0, x0, y0])
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([x1 - x0, y1 - y0, x1 - x0, y1 - y0]))
    polygons = target.polygons
    if polygons is not None:
        polygons = tuple(
            None
            if parts is None
            else tuple(tuple(value - (y0 if i % 2 else x0) for i, value in enumerate(part)) for part in parts)
            for parts in polygons
        )
    return pixels, replace(target, boxes=boxes, masks=masks, polygons=polygons)


def _centre_inside(boxes: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    low, high = boxes.new_tensor(window[:2]), boxes.new_tensor(window[2:])
    return ((centres > low) & (centres < high)).all(1)


def _mirrored_boxes(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((width - x2, y1, width - x1, y2), 1)


def _mirrored(polygon: Sequence[float], width: int) -> Iterator[float]:
    return (value if i % 2 else width - value for i, value in enumerate(polygon))


def _uniform(low: float, high: float) -> float:
    return low + float(torch.rand((), dtype=torch.float64)) * (high - low)


def _allow_many_open_files() -> None:
    """Every tensor that comes from a worker is an open file; the usual soft limit of 1024 is a few batches."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
