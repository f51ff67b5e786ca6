"""Generated shapes: a data set that needs no files, in memory or written in COCO format.

The cases that mask heads are compared on are all there: instances of one class that touch, overlap, holes, objects in
several parts, a large range of sizes. Every image is a function of (seed, split, index) alone.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor

from onestage.data.coco import coco_object
from onestage.errors import UsageError
from onestage.structures import Target

DifficultyName = Literal["easy", "medium", "hard"]


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How crowded and how varied images are."""

    objects: tuple[int, int]  # instances of an image, both included
    extent: tuple[float, float]  # longer side of an object, in image sizes
    touching: float  # share of instances set against the one before, same class and alike in colour
    visible: float  # least share of every instance that stays visible
    stretch: float  # largest ratio between the two sides' scales
    bars: int  # most bars, which belong to no class, laid over the objects
    contrast: float  # least colour distance between object and background, 0..1


DIFFICULTIES: Mapping[DifficultyName, Difficulty] = {
    "easy": Difficulty(
        objects=(2, 4), extent=(0.125, 0.47), touching=0.2, visible=0.8, stretch=1.15, bars=0, contrast=0.4
    ),
    "medium": Difficulty(
        objects=(2, 7), extent=(0.1, 0.6), touching=0.35, visible=0.5, stretch=1.4, bars=1, contrast=0.3
    ),
    "hard": Difficulty(
        objects=(4, 14), extent=(0.06, 0.9), touching=0.5, visible=0.3, stretch=1.8, bars=3, contrast=0.2
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
            boxes=torch.from_numpy(_boxes(masks)),
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
        images, annotations = [], []
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
    """One image and its instances, G of them, at least one.

    Args:
        random: All randomness.
        size: Height and width, pixels.
        classes: Labels are 0..classes-1.
        difficulty: How crowded and how varied.

    Returns:
        pixels [size, size, 3] uint8 RGB; masks [G, size, size] uint8 of what is visible; labels [G] int64.
    """
    backdrop = _hsv(random.random(), random.uniform(0.15, 0.5), random.uniform(0.3, 0.95))
    canvas = _background(random, size, backdrop)
    masks: list[np.ndarray] = []
    areas: list[int] = []
    labels: list[int] = []
    last: _Shape | None = None
    wanted = int(random.integers(difficulty.objects[0], difficulty.objects[1] + 1))
    for _ in range(wanted * 4):
        if len(masks) == wanted:
            break
        shape = _draw_shape(random, size, classes, difficulty, backdrop, last)
        mask = _full(shape.alpha >= 0.5, shape.corner, size)
        if masks and any(
            (old & ~mask).sum() < difficulty.visible * area for old, area in zip(masks, areas, strict=True)
        ):
            continue
        _paint(canvas, shape)
        for old in masks:
            old &= ~mask
        masks.append(mask)
        areas.append(int(mask.sum()))
        labels.append(shape.label)
        last = shape
    for _ in range(int(random.integers(difficulty.bars + 1))):
        bar = _draw_bar(random, size)
        mask = _full(bar.alpha >= 0.5, bar.corner, size)
        if all((old & ~mask).sum() >= difficulty.visible * area for old, area in zip(masks, areas, strict=True)):
            _paint(canvas, bar)
            for old in masks:
                old &= ~mask
    canvas += random.standard_normal((size, size, 1), dtype=np.float32) * 4
    return canvas.clip(0, 255).astype(np.uint8), np.stack(masks).astype(np.uint8), np.array(labels, dtype=np.int64)


Outline = list[tuple[float, float]]
Part = tuple[Outline, bool]  # filled, or cut out again


def _circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> Outline:
    angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _polar(radius: Callable[[float], float], points: int) -> Outline:
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(radius(a) * math.cos(a), radius(a) * math.sin(a)) for a in angles]


def _heart(angle: float) -> tuple[float, float]:
    x = 16 * math.sin(angle) ** 3
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return x / 16, -y / 16


# Name to its parts, drawn one after the other; any scale, turned and scaled when drawn.
SHAPES: Mapping[str, tuple[Part, ...]] = {
    "ring": ((_circle(), True), (_circle(0.52), False)),
    "star": ((_polar(lambda a: 1.0 if round(a * 5 / math.pi) % 2 == 0 else 0.45, 10), True),),
    "heart": (([_heart(2 * math.pi * i / 48) for i in range(48)], True),),
    "pair": ((_circle(0.55, -0.66), True), (_circle(0.55, 0.66), True)),  # two parts, one object
    "moon": ((_circle(), True), (_circle(0.82, 0.5), False)),
    "flower": ((_polar(lambda a: 0.78 + 0.22 * math.cos(6 * a), 72), True), (_circle(0.2), False)),
    "cross": (
        (
            [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)]
            + [(0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
            True,
        ),
    ),
    "arrow": (([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)], True),),
}
NAMES = tuple(SHAPES)

_SUPERSAMPLING = 4  # subpixels per side


@dataclass(frozen=True, eq=False)
class _Shape:
    """A shape on the canvas.

    Args:
        corner: x, y of the window's top left pixel, may lie outside the canvas.
        alpha: [h, w] float32 coverage in 0..1, with a margin of `_MARGIN` empty pixels.
        color: [3] float32 RGB.
        pattern: [h, w] float32 brightness factor.
        label: 0..K-1, -1 for a bar.
        extent: Longer side, pixels.
    """

    corner: tuple[int, int]
    alpha: np.ndarray
    color: np.ndarray
    pattern: np.ndarray
    label: int
    extent: float


_MARGIN = 4


def _draw_shape(
    random: np.random.Generator,
    size: int,
    classes: int,
    difficulty: Difficulty,
    backdrop: np.ndarray,
    last: _Shape | None,
) -> _Shape:
    """A shape at a random place, or against the last one."""
    low, high = difficulty.extent
    extent = size * math.exp(random.uniform(math.log(low), math.log(high)))
    beside = last is not None and random.random() < difficulty.touching
    if beside:
        assert last is not None
        label, extent = last.label, float(np.clip(last.extent * random.uniform(0.8, 1.2), size * low, size * high))
        color = (last.color * random.uniform(0.92, 1.08)).clip(0, 255)
    else:
        label, color = int(random.integers(classes)), _color_unlike(random, backdrop, difficulty.contrast)
    parts = _placed(random, SHAPES[NAMES[label]], extent, difficulty.stretch)
    alpha = _rasterise(parts)
    height, width = (side - 2 * _MARGIN for side in alpha.shape)
    if beside:
        assert last is not None
        last_height, last_width = (side - 2 * _MARGIN for side in last.alpha.shape)
        angle = random.uniform(0, 2 * math.pi)
        reach = 0.48 * (last.extent + extent)
        x = last.corner[0] + _MARGIN + last_width / 2 + reach * math.cos(angle) - width / 2
        y = last.corner[1] + _MARGIN + last_height / 2 + reach * math.sin(angle) - height / 2
    else:
        x, y = random.uniform(0, max(1, size - width)), random.uniform(0, max(1, size - height))
    x, y = min(max(x, 0), max(size - width, 0)), min(max(y, 0), max(size - height, 0))
    return _Shape((int(x) - _MARGIN, int(y) - _MARGIN), alpha, color, _pattern(random, alpha.shape), label, extent)


def _draw_bar(random: np.random.Generator, size: int) -> _Shape:
    """A thin bar right across the image."""
    angle, half = random.uniform(0, math.pi), size * random.uniform(0.015, 0.04)
    along = np.array([math.cos(angle), math.sin(angle)]) * size
    across = np.array([-math.sin(angle), math.cos(angle)]) * half
    middle = random.uniform(0.3, 0.7, 2) * size
    corners = [middle + along + across, middle + along - across, middle - along - across, middle - along + across]
    image = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    outline = [tuple(corner * _SUPERSAMPLING) for corner in corners]
    ImageDraw.Draw(image).polygon(outline, fill=255)
    alpha = np.pad(np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / 255, _MARGIN, mode="edge")
    color = _hsv(random.random(), 0.15, random.uniform(0.25, 0.9))
    return _Shape((-_MARGIN, -_MARGIN), alpha, color, _pattern(random, alpha.shape), -1, float(size))


def _placed(
    random: np.random.Generator, parts: Sequence[Part], extent: float, stretch: float
) -> list[tuple[np.ndarray, bool]]:
    """The parts stretched, turned and scaled so that the longer side of all of them is `extent` px, from 0, 0."""
    angle, ratio = random.uniform(0, 2 * math.pi), random.uniform(1 / stretch, stretch)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = [(np.array(outline) * [ratio, 1] @ turn.T, filled) for outline, filled in parts]
    everything = np.concatenate([outline for outline, filled in turned if filled])
    low, high = everything.min(0), everything.max(0)
    scale = extent / (high - low).max()
    return [((outline - low) * scale, filled) for outline, filled in turned]


def _rasterise(parts: Sequence[tuple[np.ndarray, bool]]) -> np.ndarray:
    """[h, w] float32 coverage in 0..1 of parts in pixels, with the margin around."""
    width, height = np.ceil(np.concatenate([outline for outline, filled in parts if filled]).max(0)).astype(int)
    grid = ((width + 2 * _MARGIN) * _SUPERSAMPLING, (height + 2 * _MARGIN) * _SUPERSAMPLING)
    image = Image.new("L", grid)
    draw = ImageDraw.Draw(image)
    for outline, filled in parts:
        draw.polygon(((outline + _MARGIN) * _SUPERSAMPLING).flatten().tolist(), fill=255 if filled else 0)
    return np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _paint(canvas: np.ndarray, shape: _Shape) -> None:
    """Lays a shape over the canvas: a soft shadow, then its colour, lit from the top left so that edges stand out.

    Args:
        canvas: [H, W, 3] float32 0..255, changed in place.
        shape: Whose window may go beyond the canvas.
    """
    soft = _blurred(shape.alpha)
    height, width = soft.shape
    shift = 3
    shadow = np.zeros_like(soft)
    shadow[shift:, shift:] = soft[:-shift, :-shift]
    slope = np.zeros_like(soft)
    slope[1:-1, 1:-1] = (soft[2:, 1:-1] - soft[:-2, 1:-1]) + (soft[1:-1, 2:] - soft[1:-1, :-2])
    fall = np.linspace(0.08, -0.08, height, dtype=np.float32)[:, None] + 0.0
    light = shape.pattern * (1 + fall + 0.55 * slope.clip(-0.6, 0.6))
    x, y = shape.corner
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, canvas.shape[1]), min(y + height, canvas.shape[0])
    window = (slice(top - y, bottom - y), slice(left - x, right - x))
    under = canvas[top:bottom, left:right]
    under *= 1 - 0.45 * shadow[window][..., None]
    under += shape.alpha[window][..., None] * (light[window][..., None] * shape.color - under)


def _background(random: np.random.Generator, size: int, color: np.ndarray) -> np.ndarray:
    """[size, size, 3] float32: clouds of a few near colours, with a weave of fine stripes or dots."""
    other = _hsv(random.random(), random.uniform(0.1, 0.5), random.uniform(0.3, 0.95))
    coarse = _noise(random, size, int(random.integers(3, 6)))
    fine = _noise(random, size, int(random.integers(12, 28)))
    mix = (0.35 * coarse + 0.12 * fine + 0.15).clip(0, 0.6)[..., None]
    canvas = color * (1 - mix) + other * mix
    canvas *= 1 + 0.12 * (fine[..., None] - 0.5) + 0.06 * _weave(random, (size, size))[..., None]
    return canvas.astype(np.float32)


def _noise(random: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """[size, size] float32 about 0..1, smooth over size / cells pixels."""
    small = Image.fromarray(random.random((cells, cells), dtype=np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _weave(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """[h, w] float32 in -1..1: stripes of random direction and width, or their product."""
    angle, period = random.uniform(0, math.pi), random.uniform(5, 12)
    x = np.arange(shape[1], dtype=np.float32) * np.float32(2 * math.pi / period)
    y = np.arange(shape[0], dtype=np.float32)[:, None] * np.float32(2 * math.pi / period)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    stripes = np.sin(cos * x + sin * y)
    return stripes if random.random() < 0.5 else stripes * np.sin(sin * x - cos * y)


def _pattern(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """[h, w] float32 brightness factor of an object's surface: plain or woven."""
    if random.random() < 0.5:
        return np.ones(shape, dtype=np.float32)
    return 1 + np.float32(0.13) * _weave(random, shape)


def _blurred(alpha: np.ndarray) -> np.ndarray:
    """Mean over 5 x 5 pixels; beyond the array it is empty."""
    padded = np.pad(alpha, 3)[:-1, :-1].cumsum(0).cumsum(1)
    return (padded[5:, 5:] - padded[:-5, 5:] - padded[5:, :-5] + padded[:-5, :-5]) / 25


def _color_unlike(random: np.random.Generator, backdrop: np.ndarray, contrast: float) -> np.ndarray:
    """A lively colour at least `contrast` away from the backdrop."""
    for _ in range(20):
        color = _hsv(random.random(), random.uniform(0.5, 0.9), random.uniform(0.6, 1.0))
        if np.abs(color - backdrop).max() >= 255 * contrast:
            break
    return color


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """[3] float32 RGB 0..255."""
    sector = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (255 * value * (1 - saturation + saturation * sector.clip(0, 1))).astype(np.float32)


def _full(window: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """[size, size] bool from a window that may go beyond."""
    mask = np.zeros((size, size), dtype=bool)
    x, y = corner
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + window.shape[1], size), min(y + window.shape[0], size)
    mask[top:bottom, left:right] = window[top - y : bottom - y, left - x : right - x]
    return mask


def _boxes(masks: np.ndarray) -> np.ndarray:
    """[G, 4] float32 exclusive xyxy of [G, H, W] masks, none of them empty."""
    columns, rows = masks.any(1), masks.any(2)
    sides = (columns.argmax(1), rows.argmax(1))
    ends = (columns.shape[1] - columns[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1))
    return np.stack((*sides, *ends), 1).astype(np.float32)
