"""Drawing of generated data: outlines, colours, and shapes laid over textured ground.

Everything is a function of the random generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
MARGIN = 4  # pixels around a shape, for its shadow


@dataclass(frozen=True, eq=False)
class Shape:
    """A shape on the canvas.

    Args:
        corner: x, y of the window's top left pixel, may lie outside the canvas.
        alpha: [h, w] float32 coverage in 0..1, with a margin of `MARGIN` empty pixels.
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


def placed(
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


def rasterise(parts: Sequence[tuple[np.ndarray, bool]], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of parts in pixels of a width x height window, plain and blurred, with the margin around.

    Returns:
        Two [height + 2 * MARGIN, width + 2 * MARGIN] float32 in 0..1.
    """
    grid = ((width + 2 * MARGIN) * _SUPERSAMPLING, (height + 2 * MARGIN) * _SUPERSAMPLING)
    image = Image.new("L", grid)
    draw = ImageDraw.Draw(image)
    for outline, filled in parts:
        draw.polygon(((outline + MARGIN) * _SUPERSAMPLING).flatten().tolist(), fill=255 if filled else 0)
    image = image.reduce(_SUPERSAMPLING)
    soft = image.filter(ImageFilter.BoxBlur(2))
    return tuple(np.asarray(layer, dtype=np.float32) * np.float32(1 / 255) for layer in (image, soft))


def paint(under: np.ndarray, shape: Shape, in_window: tuple[slice, slice]) -> None:
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


def background(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Clouds of two colours with a weave of fine stripes.

    Returns:
        [size, size, 3] float32 0..255, and [3] float32, its main colour.
    """
    color, other = jittered(random, BACKDROPS), jittered(random, BACKDROPS)
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


def surface(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """[h, w] float32 brightness factor of an object's surface: plain or woven."""
    if random.random() < 0.5:
        return np.ones(shape, dtype=np.float32)
    return 1 + np.float32(0.13) * _weave(random, shape)


def color_unlike(random: np.random.Generator, backdrop: np.ndarray, contrast: float) -> np.ndarray:
    """A lively colour that is, if a few tries find one, at least `contrast` away from the backdrop."""
    for _ in range(8):
        color = jittered(random, COLORS)
        if np.abs(color - backdrop).max() >= 255 * contrast:
            break
    return color


def jittered(random: np.random.Generator, palette: Sequence[int]) -> np.ndarray:
    """[3] float32 RGB 0..255 near one of the palette's 0xRRGGBB."""
    code = palette[int(random.integers(len(palette)))]
    color = np.array([code >> 16, code >> 8 & 255, code & 255], dtype=np.float32)
    return (color + random.uniform(-18, 18, 3).astype(np.float32)).clip(0, 255)


def overlap(shape: Shape, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Rows and columns where the shape's window and the canvas meet: in the canvas, in the window; maybe none."""
    x, y = shape.corner
    left, top = max(x, 0), max(y, 0)
    right = max(left, min(x + shape.alpha.shape[1], size))
    bottom = max(top, min(y + shape.alpha.shape[0], size))
    return (slice(top, bottom), slice(left, right)), (slice(top - y, bottom - y), slice(left - x, right - x))


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """[G, 4] float32 exclusive xyxy of [G, H, W] masks, none of them empty."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    sides = (columns.argmax(1), rows.argmax(1))
    ends = (columns.shape[1] - columns[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1))
    return np.stack((*sides, *ends), 1).astype(np.float32)
