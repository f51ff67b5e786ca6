"""Generated shapes: a data set that needs no files, in memory or written in COCO format.

The cases that mask heads are compared on are all there: instances of one class that touch, overlap, holes, objects in
several parts, a large range of sizes. Every image is a function of (seed, split, index) alone.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor

from onestage.data.coco import coco_object
from onestage.data.drawing import (
    BACKDROPS,
    MARGIN,
    MIN_AREA,
    NAMES,
    SHAPES,
    Shape,
    background,
    boxes_of,
    color_unlike,
    jittered,
    overlap,
    paint,
    placed,
    rasterise,
    surface,
)
from onestage.errors import UsageError
from onestage.structures import Target

DifficultyName = Literal["easy", "medium", "hard"]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How crowded and how varied images are."""

    objects: tuple[int, int]  # instances of an image, both included
    extent: tuple[float, float]  # longer side of an object, in image sizes
    large: float  # 1: sizes as on a logarithmic scale; below 1: more of the larger ones
    touching: float  # share of instances set against the one before, same class and alike in colour
    visible: float  # least share of every instance that stays visible
    stretch: float  # largest ratio between the two sides' scales
    bars: int  # most bars, which belong to no class, laid over the objects
    contrast: float  # least colour distance between object and background, 0..1


DIFFICULTIES: Mapping[DifficultyName, Difficulty] = {
    "easy": Difficulty(
        objects=(2, 4), extent=(0.125, 0.47), large=0.5, touching=0.2, visible=0.8, stretch=1.15, bars=0, contrast=0.4
    ),
    "medium": Difficulty(
        objects=(2, 7), extent=(0.1, 0.6), large=0.7, touching=0.35, visible=0.5, stretch=1.4, bars=1, contrast=0.3
    ),
    "hard": Difficulty(
        objects=(4, 14), extent=(0.06, 0.9), large=1.0, touching=0.5, visible=0.3, stretch=1.8, bars=3, contrast=0.2
    ),
}


class ShapesDataset:
    """Generated images with the interface of `CocoDataset`; an image is drawn when it is asked for.

    Args:
        num_images: How many.
        split: Images of `train` and `val` have nothing in common.
        seed: Of everything.
        size: Height and width, pixels.
        classes: The first so many of `NAMES`.
        difficulty: Name of one of `DIFFICULTIES`. The default is the demo's: 2 to 4 objects of 16 to 60 px at 128 px.
    """

    def __init__(
        self,
        num_images: int,
        *,
        split: Literal["train", "val"] = "train",
        seed: int = 0,
        size: int = 128,
        classes: int = 3,
        difficulty: DifficultyName = "easy",
    ):
        if not 1 <= classes <= len(NAMES):
            raise UsageError(f"{classes} classes of shapes; there are {len(NAMES)}", f"ask for 1 to {len(NAMES)}")
        if num_images < 0 or not 32 <= size <= 4096:
            raise UsageError(f"{num_images} images of {size} px", "ask for 0 or more images of 32 to 4096 px")
        if difficulty not in DIFFICULTIES:
            raise UsageError(f"difficulty '{difficulty}' is unknown", f"use one of {', '.join(DIFFICULTIES)}")
        self.name = f"generated shapes ({difficulty}, {split}, seed {seed})"
        self.skipped: list[str] = []
        self.categories = tuple((number + 1, name) for number, name in enumerate(NAMES[:classes]))
        self.size = size
        self.difficulty = DIFFICULTIES[difficulty]
        self._stream = (seed, 0 if split == "train" else 1)
        self._positions = np.arange(num_images)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        position = int(self._positions[index])
        random = np.random.default_rng([*self._stream, position])
        pixels, masks, labels = draw_scene(random, self.size, len(self.categories), self.difficulty)
        target = Target(
            boxes=torch.from_numpy(boxes_of(masks)),
            labels=torch.from_numpy(labels),
            masks=torch.from_numpy(masks),
            iscrowd=torch.zeros(len(labels), dtype=torch.bool),
            image_id=position + 1,
        )
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), target

    def subset(self, indices: Sequence[int]) -> ShapesDataset:
        """The data set of these images only, in this order."""
        part = copy.copy(self)
        part._positions = self._positions[list(indices)]
        return part

    @property
    def image_ids(self) -> list[int]:
        return (self._positions + 1).tolist()

    @property
    def image_sizes(self) -> np.ndarray:
        """[len, 2] int64 height, width in pixels."""
        return np.full((len(self), 2), self.size, dtype=np.int64)

    @property
    def aspect_ratios(self) -> np.ndarray:
        """[len] float64 width / height."""
        return np.ones(len(self))

    def coco_gt(self) -> COCO:
        """The annotations as pycocotools' object, for evaluation. Draws every image."""
        content = self.coco_json()
        return coco_object(content["images"], content["annotations"], self.categories)

    def coco_json(self, folder: Path | None = None) -> dict[str, Any]:
        """The annotations in COCO format.

        Args:
            folder: Where images are written as well, if anywhere; it exists.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            pixels, target = self[index]
            name = f"{target.image_id:06d}.jpg"
            if folder is not None:
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name, quality=95, subsampling=0)
            images.append({"id": target.image_id, "file_name": name, "height": self.size, "width": self.size})
            rles = coco_mask.encode(np.asfortranarray(target.masks.permute(1, 2, 0).numpy()))
            for label, (x1, y1, x2, y2), rle in zip(target.labels.tolist(), target.boxes.tolist(), rles, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": target.image_id,
                        "category_id": self.categories[label][0],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": int(coco_mask.area(rle)),
                        "iscrowd": 0,
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    }
                )
        categories = [{"id": key, "name": name, "supercategory": "shape"} for key, name in self.categories]
        info = {"description": self.name}
        return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def make_shapes(
    folder: Path,
    *,
    images: tuple[int, int] = (1000, 100),
    seed: int = 0,
    size: int = 128,
    classes: int = 3,
    difficulty: DifficultyName = "easy",
) -> Path:
    """Writes a data set: `annotations/instances_{train,val}.json`, `train/`, `val/`.

    Args:
        folder: Where to; made if it is not there, files of the same name are replaced.
        images: How many for train and for val.
        seed, size, classes, difficulty: As for `ShapesDataset`.

    Returns:
        The folder.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    parts: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split, number in zip(parts, images, strict=True):
        shapes = ShapesDataset(number, split=split, seed=seed, size=size, classes=classes, difficulty=difficulty)
        (folder / split).mkdir(exist_ok=True)
        content = shapes.coco_json(folder / split)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def draw_scene(
    random: np.random.Generator, size: int, classes: int, difficulty: Difficulty
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image and its G instances.

    Args:
        random: All randomness.
        size: Height and width, pixels.
        classes: Labels are 0..classes-1.
        difficulty: How crowded and how varied.

    Returns:
        pixels [size, size, 3] uint8 RGB; masks [G, size, size] uint8 of what is visible; labels [G] int64.
    """
    canvas, backdrop = background(random, size)
    owner = np.zeros((size, size), dtype=np.int64)  # number of the instance in front, 0 for none
    areas, visible, labels = [size * size], np.array([0]), [-1]  # by that number
    last: Shape | None = None
    wanted = int(random.integers(difficulty.objects[0], difficulty.objects[1] + 1))
    num_bars = int(random.integers(difficulty.bars + 1))
    for turn in range(4 * wanted + num_bars):
        is_bar = turn >= 4 * wanted
        if not is_bar and len(labels) > wanted:
            continue
        shape = _draw_bar(random, size) if is_bar else _draw_shape(random, size, classes, difficulty, backdrop, last)
        on_canvas, in_window = overlap(shape, size)
        mask = shape.alpha[in_window] >= 0.5
        left = visible - np.bincount(owner[on_canvas][mask], minlength=len(visible))
        if (left < difficulty.visible * np.array(areas))[1:].any() or (mask.sum() < MIN_AREA and not is_bar):
            continue
        paint(canvas[on_canvas], shape, in_window)
        owner[on_canvas][mask] = 0 if is_bar else len(labels)
        visible = left
        if not is_bar:
            areas.append(int(mask.sum()))
            visible = np.append(visible, areas[-1])
            labels.append(shape.label)
            last = shape
    canvas += random.standard_normal((size, size, 1), dtype=np.float32) * 4
    masks = owner == np.arange(1, len(labels))[:, None, None]
    return canvas.clip(0, 255).astype(np.uint8), masks.astype(np.uint8), np.array(labels[1:], dtype=np.int64)


def _draw_shape(
    random: np.random.Generator,
    size: int,
    classes: int,
    difficulty: Difficulty,
    backdrop: np.ndarray,
    last: Shape | None,
) -> Shape:
    """A shape at a random place, or against the last one."""
    low, high = difficulty.extent
    extent = size * low * (high / low) ** random.random() ** difficulty.large
    beside = last is not None and random.random() < difficulty.touching
    if beside:
        assert last is not None
        label, extent = last.label, float(np.clip(last.extent * random.uniform(0.8, 1.2), size * low, size * high))
        color = (last.color * random.uniform(0.92, 1.08)).clip(0, 255)
    else:
        label, color = int(random.integers(classes)), color_unlike(random, backdrop, difficulty.contrast)
    parts, width, height = placed(random, SHAPES[NAMES[label]], extent, difficulty.stretch)
    alpha, soft = rasterise(parts, width, height)
    if beside:
        assert last is not None
        last_height, last_width = (side - 2 * MARGIN for side in last.alpha.shape)
        angle = random.uniform(0, 2 * math.pi)
        reach = 0.48 * (last.extent + extent)
        x = last.corner[0] + MARGIN + last_width / 2 + reach * math.cos(angle) - width / 2
        y = last.corner[1] + MARGIN + last_height / 2 + reach * math.sin(angle) - height / 2
    else:
        x, y = random.uniform(0, max(1, size - width)), random.uniform(0, max(1, size - height))
    x, y = min(max(x, 0), max(size - width, 0)), min(max(y, 0), max(size - height, 0))
    corner = (int(x) - MARGIN, int(y) - MARGIN)
    return Shape(corner, alpha, soft, color, surface(random, alpha.shape), label, extent)


def _draw_bar(random: np.random.Generator, size: int) -> Shape:
    """A thin bar right across the image."""
    angle, half = random.uniform(0, math.pi), size * random.uniform(0.015, 0.04)
    along = np.array([math.cos(angle), math.sin(angle)]) * size
    across = np.array([-math.sin(angle), math.cos(angle)]) * half
    middle = random.uniform(0.3, 0.7, 2) * size
    outline = [middle + along + across, middle + along - across, middle - along - across, middle - along + across]
    alpha, soft = rasterise([(np.array(outline), True)], size, size)
    color = jittered(random, BACKDROPS)
    return Shape((-MARGIN, -MARGIN), alpha, soft, color, surface(random, alpha.shape), -1, float(size))
