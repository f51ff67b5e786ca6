"""Video data sets in YouTube-VIS format: frames, tracks, and pairs of frames to train on.

`VideoDataset` is what evaluation walks through, `FramePairs` what training draws from; both also take generated clips
(`data.clips`), which have the same interface.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from onestage.data.coco import CocoDataset
from onestage.data.validate import MAX_PIXELS, OnBadSample, Video
from onestage.errors import DatasetError
from onestage.structures import Reference, Target, usable


@dataclass(frozen=True)
class Track:
    """One object of a video.

    Args:
        id: The data set's.
        label: 0..K-1.
        masks: For every frame of the video a compressed COCO RLE, or None where the object is not to be seen.
        area: Mean over the frames where it is, pixels; 0 if there is none.
        iscrowd: Ignored in evaluation.
    """

    id: int
    label: int
    masks: tuple[dict[str, Any] | None, ...]
    area: float
    iscrowd: bool = False


class Videos(Protocol):
    """What evaluation and `FramePairs` need of a set of V videos; frames of a video are numbered from 0."""

    name: str
    skipped: list[str]
    videos: tuple[Video, ...]

    def __len__(self) -> int: ...

    def subset(self, indices: Sequence[int]) -> Videos: ...

    @property
    def categories(self) -> tuple[tuple[int, str], ...]: ...

    def frame(self, video: int, number: int) -> Tensor: ...

    def target(self, video: int, number: int) -> Target: ...

    def frames_with_objects(self, video: int) -> list[int]: ...

    def tracks(self, video: int) -> list[Track]: ...


class VideoDataset:
    """Videos of one YouTube-VIS file. A file without annotations is legal: results can be made for it, no AP.

    Args:
        json: Annotation file.
        images: Folder that file names are relative to.
        on_bad_sample: `raise`, or `skip`: videos with a missing frame, and what is wrong with annotations, are left out
            and listed in `skipped`; a frame that turns out to be unreadable is replaced by the one before.
        max_pixels: Largest height * width of a frame.

    Raises:
        DatasetError: no such file, damaged, or in COCO format.
    """

    def __init__(
        self, json: Path, images: Path, *, on_bad_sample: OnBadSample = "raise", max_pixels: float = MAX_PIXELS
    ):
        self._frames = CocoDataset(json, images, on_bad_sample=on_bad_sample, max_pixels=max_pixels)
        self.name = self._frames.name
        self.on_bad_sample = on_bad_sample
        self.skipped = self._frames.skipped
        listed = self._frames.annotations.videos
        if not listed:
            raise DatasetError(
                f"dataset '{json}' has no 'videos': it is in COCO format, or empty",
                "give a data set in YouTube-VIS format, or train an image variant on this one",
            )
        self._index_of = {image_id: index for index, image_id in enumerate(self._frames.image_ids)}
        whole = [all(v.first + i in self._index_of for i in range(v.num_frames)) and v.num_frames > 0 for v in listed]
        self.videos = tuple(video for video, complete in zip(listed, whole, strict=True) if complete)
        left_out = [video.id for video, complete in zip(listed, whole, strict=True) if not complete]
        if left_out and on_bad_sample == "raise":
            raise DatasetError(
                f"dataset '{json}': video {left_out[0]} has no frames",
                "correct the file, or add --on-bad-sample skip to leave it out",
            )
        self.skipped += [f"video {key} lacks frames" for key in left_out]

    def __len__(self) -> int:
        return len(self.videos)

    def subset(self, indices: Sequence[int]) -> VideoDataset:
        """The data set of these videos only, in this order."""
        part = copy.copy(self)
        part.videos = tuple(self.videos[index] for index in indices)
        return part

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(id, name) of every label, sorted by id."""
        return self._frames.categories

    def frame(self, video: int, number: int) -> Tensor:
        """[3, H, W] uint8 RGB."""
        order = (number, *range(number - 1, -1, -1), *range(number + 1, self.videos[video].num_frames))
        for near in order:
            try:
                return self._frames.image(self._index(video, near))
            except DatasetError as error:
                if self.on_bad_sample == "raise":
                    raise
                if error.what not in self.skipped:
                    self.skipped.append(error.what)
        raise DatasetError(f"video {self.videos[video].id} of '{self.name}' has no readable frame", "check its files")

    def target(self, video: int, number: int) -> Target:
        """The objects to be seen in a frame, in image pixels, with `track_ids`."""
        return self._frames.target(self._index(video, number))

    def frames_with_objects(self, video: int) -> list[int]:
        """Numbers of the frames that training can learn from: with an instance of a pixel or more that is no crowd."""
        numbers = range(self.videos[video].num_frames)
        return [number for number in numbers if self._frames.num_instances(self._index(video, number))]

    def tracks(self, video: int) -> list[Track]:
        """The annotated objects, by id."""
        flat, size, length = self._frames.annotations, self.videos[video].size, self.videos[video].num_frames
        masks: dict[int, list[dict[str, Any] | None]] = {}
        areas: dict[int, list[float]] = {}
        labels: dict[int, tuple[int, bool]] = {}
        for number in range(length):
            for i in self._frames.annotations_of(self._index(video, number)):
                key, rle = int(flat.track_ids[i]), flat.rle(i, size)
                masks.setdefault(key, [None] * length)[number] = rle
                area = float(flat.areas[i])
                areas.setdefault(key, []).append(float(coco_mask.area(rle)) if np.isnan(area) else area)
                labels[key] = (int(flat.labels[i]), bool(flat.crowds[i]))
        return [
            Track(key, labels[key][0], tuple(masks[key]), mean_area(areas[key]), labels[key][1])
            for key in sorted(masks)
        ]

    def _index(self, video: int, number: int) -> int:
        """Position of a frame among all frames of the file."""
        return self._index_of[self.videos[video].first + number]


class FramePairs:
    """Training samples of a video model: each frame with an object, and another one of its video beside it.

    `pairs[i]` is (image [3, H, W] uint8 RGB, `Target` with `track_ids` and `reference`), image pixels. The reference is
    drawn from torch's CPU generator: uniform over the other frames with objects, however far away; the frame itself
    where there is no other. The interface is that of `CocoDataset`, without evaluation.

    Args:
        videos: Where frames come from.
        min_size: Leaves out videos whose shorter side is below this, pixels.
    """

    def __init__(self, videos: Videos, *, min_size: int = 0):
        self.name = videos.name
        self.skipped = videos.skipped
        self.videos_of_frames = videos
        self._others = [
            videos.frames_with_objects(v) if min(video.size) >= min_size else []
            for v, video in enumerate(videos.videos)
        ]
        self._items = np.array(
            [(v, number) for v, numbers in enumerate(self._others) for number in numbers], dtype=np.int64
        ).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        videos = self.videos_of_frames
        video, number = self._items[index].tolist()
        others = [other for other in self._others[video] if other != number] or [number]
        other = others[int(torch.randint(len(others), ()))]
        there = usable(videos.target(video, other))
        assert there.track_ids is not None
        reference = Reference(videos.frame(video, other), there.boxes, there.track_ids)
        return videos.frame(video, number), replace(videos.target(video, number), reference=reference)

    def subset(self, indices: Sequence[int]) -> FramePairs:
        """The samples of these frames only, in this order; references still come from the whole videos."""
        part = copy.copy(self)
        part._items = self._items[list(indices)]
        return part

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(id, name) of every label, sorted by id."""
        return self.videos_of_frames.categories

    @property
    def image_ids(self) -> list[int]:
        """Running numbers of the frames in the whole set, from 1."""
        return [self.videos_of_frames.videos[video].first + number for video, number in self._items.tolist()]

    @property
    def image_sizes(self) -> np.ndarray:
        """[len, 2] int64 height, width in pixels."""
        sizes = np.array([video.size for video in self.videos_of_frames.videos], dtype=np.int64).reshape(-1, 2)
        return sizes[self._items[:, 0]]

    @property
    def aspect_ratios(self) -> np.ndarray:
        """[len] float64 width / height."""
        return self.image_sizes[:, 1] / self.image_sizes[:, 0]

    def own_videos(self) -> Videos:
        """The videos that the samples are from."""
        return self.videos_of_frames.subset(sorted(set(self._items[:, 0].tolist())))


def mean_area(areas: Sequence[float]) -> float:
    """What decides whether a track is small, medium or large: the mean over frames with an area, 0 without one."""
    seen = [area for area in areas if area]
    return float(np.mean(seen)) if seen else 0.0
