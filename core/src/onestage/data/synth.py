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
from PIL import Image, ImageDraw, ImageFilter
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
    canvas, backdrop = _background(random, size)
    owner = np.zeros((size, size), dtype=np.int64)  # number of the instance in front, 0 for none
    areas, visible, labels = [size * size], np.array([0]), [-1]  # by that number
    last: _Shape | None = None
    wanted = int(random.integers(difficulty.objects[0], difficulty.objects[1] + 1))
    num_bars = int(random.integers(difficulty.bars + 1))
    for turn in range(4 * wanted + num_bars):
        is_bar = turn >= 4 * wanted
        if not is_bar and len(labels) > wanted:
            continue
        shape = _draw_bar(random, size) if is_bar else _draw_shape(random, size, classes, difficulty, backdrop, last)
        on_canvas, in_window = _overlap(shape, size)
        mask = shape.alpha[in_window] >= 0.5
        left = visible - np.bincount(owner[on_canvas][mask], minlength=len(visible))
        if (left < difficulty.visible * np.array(areas))[1:].any() or (mask.sum() < MIN_AREA and not is_bar):
            continue
        _paint(canvas[on_canvas], shape, in_window)
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


Part = tuple[np.ndarray, bool]  # outline [points, 2] x, y; filled, or cut out again


def _circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    return np.stack((x + radius * np.cos(angles), y + radius * np.sin(angles)), 1)


def _star() -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, 10, endpoint=False)
    radius = np.where(np.arange(10) % 2, 0.45, 1.0)
    return np.stack((radius * np.cos(angles), radius * np.sin(angles)), 1)


def _flower() -> np.ndarray:
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    radius = 0.78 + 0.22 * np.cos(6 * angles)
    return np.stack((radius * np.cos(angles), radius * np.sin(angles)), 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((np.sin(t) ** 3, -y / 16), 1)


_CROSS = [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1)]
_CROSS += [(-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)]
_ARROW = [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]

# Name to its parts, drawn one after the other; any scale, turned and scaled when drawn.
SHAPES: Mapping[str, tuple[Part, ...]] = {
    "ring": ((_circle(), True), (_circle(0.52), False)),
    "star": ((_star(), True),),
    "heart": ((_heart(), True),),
    "pair": ((_circle(0.55, -0.66), True), (_circle(0.55, 0.66), True)),  # two parts, one object
    "moon": ((_circle(), True), (_circle(0.82, 0.5), False)),
    "flower": ((_flower(), True), (_circle(0.2), False)),
    "cross": ((np.array(_CROSS), True),),
    "arrow": ((np.array(_ARROW), True),),
}
NAMES = tuple(SHAPES)

# 0xRRGGBB of objects, and of what is behind and across them.
COLORS = (0xEF476F, 0xFF8A5B, 0xFFC53D, 0x7CCB5A, 0x06C79A, 0x19A7CE, 0x3A6EEA, 0x8E5BE8, 0xE85BB5, 0xF4E9CD, 0xD1453B)
BACKDROPS = (
    0x264653,
    0x3D405B,
    0x5C6B5A,
    0x8A8F7A,
    0xCB997E,
    0xD9C3A5,
    0xB7B7A4,
    0x4F7A5B,
    0x457B9D,
    0x8D99AE,
    0xDED7C4,
)

MIN_AREA = 12  # pixels of an object before others cover it

_SUPERSAMPLING = 4  # subpixels per side
_MARGIN = 4  # pixels around a shape, for its shadow


@dataclass(frozen=True, eq=False)
class _Shape:
    """A shape on the canvas.

    Args:
        corner: x, y of the window's top left pixel, may lie outside the canvas.
        alpha: [h, w] float32 coverage in 0..1, with a margin of `_MARGIN` empty pixels.
        soft: [h, w] float32, `alpha` blurred.
        color: [3] float32 RGB.
        pattern: [h, w] float32 brightness factor.
        label: 0..K-1, -1 for a bar.
        extent: Longer side, pixels.
    """

    corner: tuple[int, int]
    alpha: np.ndarray
    soft: np.ndarray
    color: np.ndarray
    pattern: np.ndarray
    label: int
    extent: float


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
    extent = size * low * (high / low) ** random.random() ** difficulty.large
    beside = last is not None and random.random() < difficulty.touching
    if beside:
        assert last is not None
        label, extent = last.label, float(np.clip(last.extent * random.uniform(0.8, 1.2), size * low, size * high))
        color = (last.color * random.uniform(0.92, 1.08)).clip(0, 255)
    else:
        label, color = int(random.integers(classes)), _color_unlike(random, backdrop, difficulty.contrast)
    parts, width, height = _placed(random, SHAPES[NAMES[label]], extent, difficulty.stretch)
    alpha, soft = _rasterise(parts, width, height)
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
    corner = (int(x) - _MARGIN, int(y) - _MARGIN)
    return _Shape(corner, alpha, soft, color, _pattern(random, alpha.shape), label, extent)


def _draw_bar(random: np.random.Generator, size: int) -> _Shape:
    """A thin bar right across the image."""
    angle, half = random.uniform(0, math.pi), size * random.uniform(0.015, 0.04)
    along = np.array([math.cos(angle), math.sin(angle)]) * size
    across = np.array([-math.sin(angle), math.cos(angle)]) * half
    middle = random.uniform(0.3, 0.7, 2) * size
    outline = [middle + along + across, middle + along - across, middle - along - across, middle - along + across]
    alpha, soft = _rasterise([(np.array(outline), True)], size, size)
    color = _jittered(random, BACKDROPS)
    return _Shape((-_MARGIN, -_MARGIN), alpha, soft, color, _pattern(random, alpha.shape), -1, float(size))


def _placed(
    random: np.random.Generator, parts: Sequence[Part], extent: float, stretch: float
) -> tuple[list[tuple[np.ndarray, bool]], int, int]:
    """The parts stretched, turned and scaled so that the longer side of all of them is `extent` px; width, height."""
    angle, ratio = random.uniform(0, 2 * math.pi), random.uniform(1 / stretch, stretch)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = [(outline * [ratio, 1] @ turn.T, filled) for outline, filled in parts]
    everything = np.concatenate([outline for outline, filled in turned if filled])
    low, high = everything.min(0), everything.max(0)
    scale = extent / (high - low).max()
    width, height = np.ceil((high - low) * scale).astype(int).tolist()
    return [((outline - low) * scale, filled) for outline, filled in turned], width, height


def _rasterise(parts: Sequence[tuple[np.ndarray, bool]], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of parts in pixels of a width x height window, plain and blurred, with the margin around.

    Returns:
        Two [height + 2 * _MARGIN, width + 2 * _MARGIN] float32 in 0..1.
    """
    grid = ((width + 2 * _MARGIN) * _SUPERSAMPLING, (height + 2 * _MARGIN) * _SUPERSAMPLING)
    image = Image.new("L", grid)
    draw = ImageDraw.Draw(image)
    for outline, filled in parts:
        draw.polygon(((outline + _MARGIN) * _SUPERSAMPLING).flatten().tolist(), fill=255 if filled else 0)
    image = image.reduce(_SUPERSAMPLING)
    soft = image.filter(ImageFilter.BoxBlur(2))
    return tuple(np.asarray(layer, dtype=np.float32) * np.float32(1 / 255) for layer in (image, soft))


def _paint(under: np.ndarray, shape: _Shape, in_window: tuple[slice, slice]) -> None:
    """Lays a shape over the canvas: a soft shadow, then its colour, lit from the top left so that edges stand out.

    Args:
        under: [h, w, 3] float32 0..255, the part of the canvas below the shape's window; changed in place.
        shape: What to lay there.
        in_window: The part of the shape's window that is on the canvas.
    """
    soft, shift = shape.soft, 3
    shadow = np.zeros_like(soft)
    shadow[shift:, shift:] = soft[:-shift, :-shift]
    slope = np.zeros_like(soft)
    slope[1:-1, 1:-1] = soft[2:, 1:-1] - soft[:-2, 1:-1] + soft[1:-1, 2:] - soft[1:-1, :-2]
    light = shape.pattern * (1 + np.float32(0.55) * slope.clip(-0.6, 0.6))
    under *= 1 - np.float32(0.45) * shadow[in_window][..., None]
    under += shape.alpha[in_window][..., None] * (light[in_window][..., None] * shape.color - under)


def _background(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Clouds of two colours with a weave of fine stripes.

    Returns:
        [size, size, 3] float32 0..255, and [3] float32, its main colour.
    """
    color, other = _jittered(random, BACKDROPS), _jittered(random, BACKDROPS)
    coarse = _noise(random, size, int(random.integers(3, 6)))
    fine = _noise(random, size, int(random.integers(12, 28)))
    mix = (0.35 * coarse + 0.12 * fine + 0.05).clip(0, 0.5)
    light = 0.94 + 0.12 * fine + 0.05 * _weave(random, (size, size))
    return light[..., None] * (color + mix[..., None] * (other - color)), color


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


def _color_unlike(random: np.random.Generator, backdrop: np.ndarray, contrast: float) -> np.ndarray:
    """A lively colour that is, if a few tries find one, at least `contrast` away from the backdrop."""
    for _ in range(8):
        color = _jittered(random, COLORS)
        if np.abs(color - backdrop).max() >= 255 * contrast:
            break
    return color


def _jittered(random: np.random.Generator, palette: Sequence[int]) -> np.ndarray:
    """[3] float32 RGB 0..255 near one of the palette's 0xRRGGBB."""
    code = palette[int(random.integers(len(palette)))]
    color = np.array([code >> 16, code >> 8 & 255, code & 255], dtype=np.float32)
    return (color + random.uniform(-18, 18, 3).astype(np.float32)).clip(0, 255)


def _overlap(shape: _Shape, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Rows and columns where the shape's window and the canvas meet: in the canvas, in the window."""
    x, y = shape.corner
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + shape.alpha.shape[1], size), min(y + shape.alpha.shape[0], size)
    return (slice(top, bottom), slice(left, right)), (slice(top - y, bottom - y), slice(left - x, right - x))


def _boxes(masks: np.ndarray) -> np.ndarray:
    """[G, 4] float32 exclusive xyxy of [G, H, W] masks, none of them empty."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    sides = (columns.argmax(1), rows.argmax(1))
    ends = (columns.shape[1] - columns[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1))
    return np.stack((*sides, *ends), 1).astype(np.float32)
