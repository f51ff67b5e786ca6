"""Generated clips: videos of moving shapes, in memory or written in YouTube-VIS format.

The cases that tracking is compared on are all there: objects that cross and cover each other, touch and part again,
leave the picture and return, often of one class. Every clip is a function of (seed, split, number) alone.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from onestage.data.drawing import (
    MARGIN,
    MIN_AREA,
    NAMES,
    SHAPES,
    Part,
    Shape,
    background,
    boxes_of,
    color_unlike,
    overlap,
    paint,
    placed,
    rasterise,
    surface,
)
from onestage.data.validate import Video
from onestage.data.ytvis import Track, mean_area
from onestage.errors import UsageError
from onestage.structures import Target

EVENTS = ("cross", "touch", "return")  # what happens in a clip, by its number; each fourth clip has all of them
MOST_OBJECTS = 5
EXTENT = (0.14, 0.36)  # longer side of an object, in image sizes


class ClipsDataset:
    """Generated clips with the interface of `VideoDataset`; a frame is drawn when it is asked for.

    Every frame shows at least one object. Of objects behind others, and of those on their way out, a mask is what can
    be seen; with less than `MIN_AREA` pixels an object counts as absent.

    Args:
        num_clips: How many.
        split: Clips of `train` and `val` have nothing in common.
        seed: Of everything.
        size: Height and width, pixels.
        num_frames: Of every clip.
        classes: The first so many of `drawing.NAMES`.
    """

    def __init__(
        self,
        num_clips: int,
        *,
        split: Literal["train", "val"] = "train",
        seed: int = 0,
        size: int = 128,
        num_frames: int = 12,
        classes: int = 3,
    ):
        if not 1 <= classes <= len(NAMES):
            raise UsageError(f"{classes} classes of shapes; there are {len(NAMES)}", f"ask for 1 to {len(NAMES)}")
        if num_clips < 0 or num_frames < 1 or not 32 <= size <= 4096:
            raise UsageError(
                f"{num_clips} clips of {num_frames} frames of {size} px", "ask for at least 1 frame of 32 to 4096 px"
            )
        self.name = f"generated clips ({split}, seed {seed})"
        self.skipped: list[str] = []
        self.categories = tuple((number + 1, name) for number, name in enumerate(NAMES[:classes]))
        self.videos = tuple(
            Video(number + 1, (size, size), num_frames, number * num_frames + 1) for number in range(num_clips)
        )
        self._stream = (seed, 0 if split == "train" else 1)

    def __len__(self) -> int:
        return len(self.videos)

    def subset(self, indices: Sequence[int]) -> ClipsDataset:
        """The data set of these clips only, in this order."""
        part = copy.copy(self)
        part.videos = tuple(self.videos[index] for index in indices)
        return part

    def frame(self, video: int, number: int) -> Tensor:
        """[3, size, size] uint8 RGB."""
        pixels, _ = self._drawn(video, number)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def target(self, video: int, number: int) -> Target:
        """The objects to be seen in a frame, in image pixels, with `track_ids`."""
        _, masks = self._drawn(video, number)
        movers = self._clip(video).movers
        seen = [i for i, mask in enumerate(masks) if mask.sum() >= MIN_AREA]
        return Target(
            boxes=torch.from_numpy(boxes_of(masks[seen])),
            labels=torch.tensor([movers[i].label for i in seen], dtype=torch.int64),
            masks=torch.from_numpy(masks[seen]),
            iscrowd=torch.zeros(len(seen), dtype=torch.bool),
            image_id=self.videos[video].first + number,
            track_ids=torch.tensor([self._track_id(video, i) for i in seen], dtype=torch.int64),
        )

    def frames_with_objects(self, video: int) -> list[int]:
        """Numbers of the frames with an object: all of them."""
        return list(range(self.videos[video].num_frames))

    def tracks(self, video: int) -> list[Track]:
        """The objects that are to be seen in at least one frame. Draws every frame."""
        movers, length = self._clip(video).movers, self.videos[video].num_frames
        masks: list[list[dict[str, Any] | None]] = [[None] * length for _ in movers]
        for number in range(length):
            _, drawn = self._drawn(video, number)
            for i, mask in enumerate(drawn):
                if mask.sum() >= MIN_AREA:
                    masks[i][number] = coco_mask.encode(np.asfortranarray(mask))
        tracks = []
        for i, of_one in enumerate(masks):
            area = mean_area([float(coco_mask.area(rle)) for rle in of_one if rle is not None])
            if area:
                tracks.append(Track(self._track_id(video, i), movers[i].label, tuple(of_one), area))
        return tracks

    def ytvis_json(self, folder: Path | None = None) -> dict[str, Any]:
        """The annotations in YouTube-VIS format.

        Args:
            folder: Where frames are written as well, as `<clip>/<frame>.jpg`, if anywhere; it exists.
        """
        videos, annotations = [], []
        for index, video in enumerate(self.videos):
            height, width = video.size
            names = [f"{video.id:05d}/{number:05d}.jpg" for number in range(video.num_frames)]
            videos.append({"id": video.id, "file_names": names, "height": height, "width": width, "length": len(names)})
            for track in self.tracks(index):
                annotations.append(
                    {
                        "id": track.id,
                        "video_id": video.id,
                        "category_id": self.categories[track.label][0],
                        "iscrowd": 0,
                        "segmentations": [m and m | {"counts": m["counts"].decode("ascii")} for m in track.masks],
                        "bboxes": [m and coco_mask.toBbox(m).tolist() for m in track.masks],
                        "areas": [m and int(coco_mask.area(m)) for m in track.masks],
                    }
                )
            if folder is not None:
                (folder / f"{video.id:05d}").mkdir(exist_ok=True)
                for number, name in enumerate(names):
                    pixels, _ = self._drawn(index, number)
                    Image.fromarray(pixels).save(folder / name, quality=95, subsampling=0)
        categories = [{"id": key, "name": name, "supercategory": "shape"} for key, name in self.categories]
        info = {"description": self.name}
        return {"info": info, "videos": videos, "annotations": annotations, "categories": categories}

    def _clip(self, video: int) -> _Clip:
        entry = self.videos[video]
        return _clip(self._stream, entry.id - 1, entry.size[0], entry.num_frames, len(self.categories))

    def _drawn(self, video: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        entry = self.videos[video]
        return _drawn(self._stream, entry.id - 1, entry.size[0], entry.num_frames, len(self.categories), number)

    def _track_id(self, video: int, mover: int) -> int:
        return (self.videos[video].id - 1) * MOST_OBJECTS + mover + 1


def make_clips(
    folder: Path,
    *,
    clips: tuple[int, int] = (160, 40),
    seed: int = 0,
    size: int = 128,
    num_frames: int = 12,
    classes: int = 3,
) -> Path:
    """Writes a data set: `{train,valid}.json` and `{train,valid}/JPEGImages/<clip>/<frame>.jpg`.

    Args:
        folder: Where to; made if it is not there, files of the same name are replaced.
        clips: How many for train and for val.
        seed, size, num_frames, classes: As for `ClipsDataset`.

    Returns:
        The folder.
    """
    parts: tuple[tuple[Literal["train", "val"], str], ...] = (("train", "train"), ("val", "valid"))
    for (split, name), number in zip(parts, clips, strict=True):
        frames = folder / name / "JPEGImages"
        frames.mkdir(parents=True, exist_ok=True)
        dataset = ClipsDataset(number, split=split, seed=seed, size=size, num_frames=num_frames, classes=classes)
        (folder / f"{name}.json").write_text(json.dumps(dataset.ytvis_json(frames)), encoding="utf-8")
    return folder


@dataclass(frozen=True, eq=False)
class _Mover:
    """One object: what it looks like, and where its middle is in every frame.

    Args:
        parts: Outlines in pixels of a window of `window` (width, height).
        path: [T, 2] float x, y of the window's middle, pixels; may lie outside the picture.
        color, pattern, label: As in `Shape`.
    """

    parts: list[Part]
    window: tuple[int, int]
    path: np.ndarray
    color: np.ndarray
    pattern: np.ndarray
    label: int

    def at(self, number: int) -> Shape:
        """The shape in one frame; its outline keeps fractions of a pixel."""
        width, height = self.window
        x, y = (self.path[number] - np.array([width, height]) / 2).tolist()
        whole_x, whole_y = math.floor(x), math.floor(y)
        shifted = [(outline + [x - whole_x, y - whole_y], filled) for outline, filled in self.parts]
        alpha, soft = rasterise(shifted, width + 1, height + 1)
        corner = (whole_x - MARGIN, whole_y - MARGIN)
        return Shape(corner, alpha, soft, self.color, self.pattern, self.label, float(max(width, height)))


@dataclass(frozen=True, eq=False)
class _Clip:
    ground: np.ndarray  # [size, size, 3] float32 0..255
    movers: tuple[_Mover, ...]  # the last one is in front


@functools.lru_cache(maxsize=2)
def _drawn(
    stream: tuple[int, int], number: int, size: int, num_frames: int, classes: int, frame: int
) -> tuple[np.ndarray, np.ndarray]:
    """One frame: pixels [size, size, 3] uint8 RGB and what can be seen of each mover, [M, size, size] uint8."""
    clip = _clip(stream, number, size, num_frames, classes)
    canvas, owner = clip.ground.copy(), np.zeros((size, size), dtype=np.int64)
    for i, mover in enumerate(clip.movers):
        shape = mover.at(frame)
        on_canvas, in_window = overlap(shape, size)
        paint(canvas[on_canvas], shape, in_window)
        owner[on_canvas][shape.alpha[in_window] >= 0.5] = i + 1
    random = np.random.default_rng([*stream, number, frame])
    canvas += random.standard_normal((size, size, 1), dtype=np.float32) * 4
    masks = owner == np.arange(1, len(clip.movers) + 1)[:, None, None]
    return canvas.clip(0, 255).astype(np.uint8), masks.astype(np.uint8)


@functools.lru_cache(maxsize=2)
def _clip(stream: tuple[int, int], number: int, size: int, num_frames: int, classes: int) -> _Clip:
    """The ground and the movers of one clip."""
    random = np.random.default_rng([*stream, number])
    ground, backdrop = background(random, size)
    time = np.linspace(0, 1, num_frames)
    events = EVENTS if number % (len(EVENTS) + 1) == len(EVENTS) else (EVENTS[number % (len(EVENTS) + 1)],)
    paths: list[tuple[np.ndarray, float, int]] = []  # path, extent, label
    for event in events:
        low, high = size * EXTENT[0], size * EXTENT[1]
        first, second = (low * (high / low) ** random.random() for _ in range(2))
        label = int(random.integers(classes))
        alike = label if random.random() < 0.5 else int(random.integers(classes))
        if event == "return":
            paths.append((_leaving(random, time, size, first), first, label))
            if len(events) == 1:
                paths.append((_wandering(random, time, size, second), second, alike))
            continue
        moves = _crossing if event == "cross" else _touching
        there, here = moves(random, time, size, first, second)
        paths += [(there, first, label), (here, second, alike)]
    order = random.permutation(len(paths))
    movers = [_mover(random, paths[i], backdrop) for i in order]
    return _Clip(ground, tuple(movers))


def _mover(random: np.random.Generator, way: tuple[np.ndarray, float, int], backdrop: np.ndarray) -> _Mover:
    path, extent, label = way
    parts, width, height = placed(random, SHAPES[NAMES[label]], extent, stretch=1.15)
    pattern = surface(random, (height + 1 + 2 * MARGIN, width + 1 + 2 * MARGIN))
    return _Mover(parts, (width, height), path, color_unlike(random, backdrop, 0.4), pattern, label)


def _crossing(
    random: np.random.Generator, time: np.ndarray, size: int, first: float, second: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two paths through nearly one point at one time, from opposite sides."""
    meeting, when = size * random.uniform(0.42, 0.58, 2), random.uniform(0.4, 0.6)
    angle = random.uniform(0, 2 * math.pi)
    back = angle + math.pi + random.uniform(-0.7, 0.7)
    miss = random.uniform(-0.2, 0.2, 2) * min(first, second)
    paths = []
    for direction, start in ((angle, meeting), (back, meeting + miss)):
        velocity = size * random.uniform(0.65, 0.95) * np.array([math.cos(direction), math.sin(direction)])
        paths.append(start + velocity * (time - when)[:, None])
    return _inside(paths[0], size, first), _inside(paths[1], size, second)


def _touching(
    random: np.random.Generator, time: np.ndarray, size: int, first: float, second: float
) -> tuple[np.ndarray, np.ndarray]:
    """One path that comes up to another, side to side, and goes away again."""
    drift = random.uniform(-0.12, 0.12, 2) * size
    here = size * random.uniform(0.38, 0.62, 2) + drift * (time - 0.5)[:, None]
    angle = random.uniform(0, 2 * math.pi) + random.uniform(-0.5, 0.5) * (time - 0.5)
    when, gap = random.uniform(0.35, 0.65), size * random.uniform(0.6, 0.9)
    reach = 0.48 * (first + second) + gap * np.abs(time - when)
    there = here + reach[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
    return _inside(here, size, first), _inside(there, size, second)


def _leaving(random: np.random.Generator, time: np.ndarray, size: int, extent: float) -> np.ndarray:
    """A path out over one side of the picture and back in."""
    side, along = int(random.integers(4)), size * random.uniform(0.25, 0.75)
    start = random.uniform(0.2, 0.4) * size
    turn = random.uniform(0.4, 0.6)  # when it is farthest out
    way = np.where(time < turn, time / turn, (1 - time) / (1 - turn))
    depth = start - (start + 1.3 * extent) * np.sin(0.5 * math.pi * way)  # from that side inwards
    across = along + size * random.uniform(-0.2, 0.2) * (time - 0.5)
    x = depth if side < 2 else across
    y = across if side < 2 else depth
    path = np.stack((x, y), 1)
    return size - path if side % 2 else path


def _wandering(random: np.random.Generator, time: np.ndarray, size: int, extent: float) -> np.ndarray:
    """A slow curve inside the picture."""
    middle, swing = size * random.uniform(0.3, 0.7, 2), size * random.uniform(0.08, 0.25, 2)
    phase = random.uniform(0, 2 * math.pi, 2)
    return _inside(middle + swing * np.sin(2 * math.pi * time[:, None] + phase), size, extent)


def _inside(path: np.ndarray, size: int, extent: float) -> np.ndarray:
    return path.clip(extent / 2, size - extent / 2)
