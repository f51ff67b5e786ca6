"""Data sets in COCO format: where they lie, their images and their targets."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor

from onestage.data.validate import MAX_PIXELS, OnBadSample, read_annotations
from onestage.errors import DatasetError, UsageError, some
from onestage.masks import Masks
from onestage.structures import Target

LOG = logging.getLogger("onestage")

# Pillow warns at 89 megapixels; `max_pixels` is the limit here, and whoever sets it knows.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Split:
    """One part of a data set on disk.

    Args:
        json: Annotation file.
        images: Folder that file names are relative to.
        layout: Which layout it was recognised by, for the log.
    """

    json: Path
    images: Path
    layout: str


def locate(
    data: Path | None,
    split: Literal["train", "val"],
    *,
    json: Path | None = None,
    images: Path | None = None,
    variable: str = "COCO_ROOT",
) -> Split:
    """Finds the annotation file and the image folder of a split.

    Args:
        data: The data set's folder; None takes it from the environment.
        split: Which part.
        json: With `images`, the files themselves; `data` is then not looked at.
        images: With `json`.
        variable: The environment variable that names the folder: COCO_ROOT, or YTVIS_ROOT for videos.

    Raises:
        UsageError: nothing that says where the data is.
        DatasetError: no layout fits what is there.
    """
    if json is not None or images is not None:
        return _explicit(split, json, images)
    if data is None:
        root = os.environ.get(variable)
        if not root:
            generated = "shapes" if variable == "COCO_ROOT" else "clips --video"
            raise UsageError(
                f"no data set: --data is not given and {variable} is not set",
                f"give --data FOLDER; to try without data: python -m onestage.synth {generated}, then --data "
                + generated.split()[0],
            )
        data = Path(root)
    if not data.is_dir():
        what = "is a file" if data.exists() else "does not exist"
        raise DatasetError(
            f"dataset folder '{data}' {what}",
            f"give the folder that holds annotations and images, or --{split}-json FILE --{split}-images FOLDER",
        )
    for candidate in _layouts(data, split):
        if candidate.json.is_file() and candidate.images.is_dir():
            return candidate
    other = "val" if split == "train" else "train"
    only_other = any(c.json.is_file() and c.images.is_dir() for c in _layouts(data, other))
    raise DatasetError(
        f"dataset '{data}' has a {other} split but no {split} split"
        if only_other
        else f"dataset '{data}' is in no known layout; found there: {some(sorted(p.name for p in data.iterdir()))}",
        f"use annotations/instances_{split}.json with {split}/, "
        f"or {'train' if split == 'train' else 'valid'}/_annotations.coco.json beside its images, "
        f"or --{split}-json FILE --{split}-images FOLDER",
    )


class CocoDataset:
    """Images and targets of one annotation file.

    `dataset[i]` is (image [3, H, W] uint8 RGB, `Target` in image pixels). Boxes are clipped to the image; instances of
    less than one pixel in width, height or area are left out of targets, crowd regions are kept and marked. Indexing
    never changes anything, so worker processes share the arrays.

    Args:
        json: COCO or YouTube-VIS file (of the latter, every frame is an image of its own).
        images: Folder that file names are relative to.
        on_bad_sample: `raise`, or `skip`: bad annotations and images are left out and listed in `skipped`; an image
            that turns out to be unreadable is replaced by the next good one.
        drop_empty: Leaves out images without any instance that is no crowd.
        min_size: Leaves out images whose shorter side is below this, pixels.
        max_pixels: Largest height * width of an image.
        polygons: Targets carry polygons too.
    """

    def __init__(
        self,
        json: Path,
        images: Path,
        *,
        on_bad_sample: OnBadSample = "raise",
        drop_empty: bool = False,
        min_size: int = 0,
        max_pixels: float = MAX_PIXELS,
        polygons: bool = False,
    ):
        self.name = str(json)
        self.folder = Path(images)
        self.on_bad_sample = on_bad_sample
        self.max_pixels = max_pixels
        self.polygons = polygons
        self.annotations = read_annotations(Path(json), on_bad_sample=on_bad_sample, max_pixels=max_pixels)
        self.skipped: list[str] = list(self.annotations.problems)
        keep = self.annotations.image_sizes.min(axis=1, initial=2**62) >= min_size
        if drop_empty:
            ends = self.annotations.annotation_ends
            instances = np.concatenate(([0], np.cumsum(~self.annotations.crowds)))
            keep &= instances[ends[1:]] > instances[ends[:-1]]
        self._positions = self._existing(np.flatnonzero(keep))
        for line in self.skipped:
            LOG.warning("skipped: %s", line)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        index = range(len(self))[index]  # its IndexError ends a loop over the data set
        for step in range(len(self)):
            position = int(self._positions[(index + step) % len(self)])
            try:
                return self._image(position), self._target(position)
            except DatasetError as error:
                if self.on_bad_sample == "raise":
                    raise
                if error.what not in self.skipped:
                    self.skipped.append(error.what)
                    LOG.warning("skipped: %s", error.what)
        raise DatasetError(f"dataset '{self.name}' has no readable image", "check the images")

    def subset(self, indices: Sequence[int]) -> CocoDataset:
        """The data set of these images only, in this order."""
        part = copy.copy(self)
        part._positions = self._positions[list(indices)]
        return part

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(id, name) of every label, sorted by id."""
        return self.annotations.categories

    @property
    def image_ids(self) -> list[int]:
        return self.annotations.image_ids[self._positions].tolist()

    @property
    def image_sizes(self) -> np.ndarray:
        """[len, 2] int64 height, width in pixels."""
        return self.annotations.image_sizes[self._positions]

    @property
    def aspect_ratios(self) -> np.ndarray:
        """[len] float64 width / height."""
        return self.image_sizes[:, 1] / self.image_sizes[:, 0]

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8 RGB; a file that cannot be read is an error, whatever `on_bad_sample` says."""
        return self._image(int(self._positions[index]))

    def target(self, index: int) -> Target:
        """The image's target, without reading the image."""
        return self._target(int(self._positions[index]))

    def annotations_of(self, index: int) -> range:
        """Positions in `annotations` of what is annotated in the image."""
        return self.annotations.of_image(int(self._positions[index]))

    def num_instances(self, index: int) -> int:
        """How many instances of the image training can learn from: those of its target that are no crowds."""
        crowds = self.annotations.crowds[self.annotations_of(index)]
        return int((self._in_target(int(self._positions[index]))[0] & ~crowds).sum())

    def path(self, index: int) -> Path:
        """Where the image lies."""
        return self.folder / self.annotations.file_name(int(self._positions[index]))

    def coco_gt(self) -> COCO:
        """The checked annotations of these images as pycocotools' object, for evaluation."""
        flat, images, annotations = self.annotations, [], []
        for position in self._positions.tolist():
            size, image_id = self._size(position), int(flat.image_ids[position])
            name = flat.file_name(position)
            images.append({"id": image_id, "height": size[0], "width": size[1], "file_name": name})
            for i in flat.of_image(position):
                segmentation = flat.polygons(i) or flat.rle(i, size)
                area = float(flat.areas[i])
                annotations.append(
                    {
                        "id": int(flat.ids[i]),
                        "image_id": image_id,
                        "category_id": self.categories[flat.labels[i]][0],
                        "bbox": flat.boxes[i].tolist(),
                        "area": float(coco_mask.area(flat.rle(i, size))) if np.isnan(area) else area,
                        "iscrowd": int(flat.crowds[i]),
                        "segmentation": segmentation,
                    }
                )
        return coco_object(images, annotations, self.categories)

    def _existing(self, positions: np.ndarray) -> np.ndarray:
        """Those whose image file is there; the others are an error or skipped."""
        if not self.folder.is_dir():
            raise DatasetError(f"image folder '{self.folder}' does not exist", "check the path of the images")
        exists = np.array(
            [os.path.isfile(os.path.join(self.folder, self.annotations.file_name(p))) for p in positions], dtype=bool
        )
        missing = [f"'{self.annotations.file_name(p)}'" for p in positions[~exists]]
        if missing and self.on_bad_sample == "raise":
            raise DatasetError(
                f"dataset '{self.name}': {len(missing)} of {len(positions)} images are not in '{self.folder}': "
                f"{some(missing)}",
                "check the image folder, or add --on-bad-sample skip to leave them out",
            )
        self.skipped += [f"image file {name} is not in '{self.folder}'" for name in missing]
        return positions[exists]

    def _size(self, position: int) -> tuple[int, int]:
        height, width = self.annotations.image_sizes[position].tolist()
        return height, width

    def _image(self, position: int) -> Tensor:
        path = self.folder / self.annotations.file_name(position)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DatasetError(f"image '{path}' is a link out of its folder", "copy the file, or link the whole folder")
        return read_image(path, max_pixels=self.max_pixels, size=self._size(position))

    def _in_target(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Which annotations of an image become instances of its target, and the clipped boxes xyxy of all."""
        flat, all_of_it = self.annotations, self.annotations.of_image(position)
        here = slice(all_of_it.start, all_of_it.stop)
        return in_target(flat.boxes[here], flat.areas[here], self._size(position))

    def _target(self, position: int) -> Target:
        flat, size = self.annotations, self._size(position)
        all_of_it = flat.of_image(position)
        usable, boxes = self._in_target(position)
        chosen = [i for i, use in zip(all_of_it, usable, strict=True) if use]
        masks = Masks.from_rle([flat.rle(i, size) for i in chosen], size)
        polygons = None
        if self.polygons:
            parts = [flat.polygons(i) for i in chosen]
            polygons = tuple(None if p is None else tuple(tuple(polygon) for polygon in p) for p in parts)
        return Target(
            boxes=torch.from_numpy(boxes[usable].astype(np.float32)),
            labels=torch.from_numpy(flat.labels[chosen]),
            masks=masks.to_bool().view(torch.uint8),
            iscrowd=torch.from_numpy(flat.crowds[chosen]),
            image_id=int(flat.image_ids[position]),
            polygons=polygons,
            track_ids=torch.from_numpy(flat.track_ids[chosen]) if flat.videos else None,
        )


def in_target(boxes: np.ndarray, areas: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which annotations of an image become instances of its target: those of a pixel or more each way.

    Args:
        boxes: [A, 4] float64 x, y, width, height.
        areas: [A] float64, NaN where there is none.
        size: (height, width) of the image.

    Returns:
        [A] bool, and the boxes clipped to the image, [A, 4] xyxy.
    """
    height, width = size
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    clipped = corners.clip(0, [width, height, width, height])
    return (clipped[:, 2:] - clipped[:, :2] >= 1).all(1) & ~(areas <= 0), clipped


def read_image(path: Path, *, max_pixels: float = MAX_PIXELS, size: tuple[int, int] | None = None) -> Tensor:
    """Decodes an image file.

    Args:
        path: A picture in one of `FORMATS`; of several frames the first.
        max_pixels: Refused beyond this, from the header.
        size: (height, width) that an annotation file says it has. The orientation tag is then applied only if it
            makes the size fit; None applies it always.

    Returns:
        [3, H, W] uint8 RGB.

    Raises:
        DatasetError: no image, a damaged one, too large, or of another size.
    """
    with _opened(path, max_pixels, size) as (image, turn):
        upright = ImageOps.exif_transpose(image) if turn else image
        if size not in (None, (upright.height, upright.width)):  # a tag that turns by nothing
            raise _other_size(path, image, size)
        return torch.from_numpy(rgb_of(upright)).permute(2, 0, 1).contiguous()


def check_header(
    path: Path, *, max_pixels: float = MAX_PIXELS, size: tuple[int, int]
) -> Literal["applied", "ignored"] | None:
    """What `read_image` finds out before it decodes, with the same errors.

    Returns:
        Whether an orientation tag that turns or mirrors the image is applied, because only so its size fits, or
        ignored; None where there is none.
    """
    with _opened(path, max_pixels, size) as (image, turn):
        tag = Image.Image.getexif(image).get(_ORIENTATION, 1)  # PNG's own decodes the image to find it
        if turn and tag not in (5, 6, 7, 8):  # those that exchange height and width
            raise _other_size(path, image, size)
        if tag not in range(2, 9):
            return None
        return "applied" if turn else "ignored"


@contextlib.contextmanager
def _opened(path: Path, max_pixels: float, size: tuple[int, int] | None) -> Iterator[tuple[Image.Image, bool]]:
    """The image, not decoded yet, and whether its orientation tag is to be applied; for the errors of `read_image`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.filename = ""  # Pillow maps an uncompressed TIFF by its name, and then mixes up one that is turned
            if image.width * image.height > max_pixels:
                raise DatasetError(
                    f"image '{path}' has {image.width} x {image.height} px; the limit is {max_pixels / 1e6:g} "
                    "megapixels",
                    "make it smaller" + (", or raise --max-pixels" if size is None else ""),
                )
            stored = (image.height, image.width)
            if size not in (None, stored, stored[::-1]):
                raise _other_size(path, image, size)
            yield image, size != stored
    except FileNotFoundError:
        raise DatasetError(f"image '{path}' does not exist", "check the path") from None
    except Image.DecompressionBombError as error:
        raise DatasetError(f"image '{path}' is too large: {error}", "make it smaller") from None
    except _DECODING_ERRORS as error:
        raise DatasetError(
            f"image '{path}' cannot be read: {error}", "replace the file; is it complete, and an image?"
        ) from None


# Pillow also knows formats that start other programs (EPS) or are not meant for pictures; nobody trains on those.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
_ORIENTATION = 0x0112  # of EXIF
# What Pillow's decoders raise on files that somebody bent.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error),
    *(KeyError, IndexError, TypeError, AttributeError, ArithmeticError),
)


def _other_size(path: Path, image: Image.Image, size: tuple[int, int] | None) -> DatasetError:
    assert size is not None
    return DatasetError(
        f"image '{path}' is {image.height} x {image.width} px, its annotations say {size[0]} x {size[1]}",
        "give the images that the annotations were made on",
    )


def coco_object(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Sequence[tuple[int, str]]
) -> COCO:
    """pycocotools' object of these (checked) entries, without its prints."""
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in categories],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _explicit(split: str, json: Path | None, images: Path | None) -> Split:
    if json is None or images is None:
        raise UsageError(
            f"--{split}-json and --{split}-images belong together; one is missing",
            f"give both: --{split}-json FILE --{split}-images FOLDER",
        )
    if not json.is_file():
        raise DatasetError(f"annotation file '{json}' does not exist", f"check --{split}-json")
    if not images.is_dir():
        raise DatasetError(f"image folder '{images}' does not exist", f"check --{split}-images")
    return Split(json, images, "explicit files")


def _layouts(data: Path, split: str) -> list[Split]:
    """Where a split may lie, in the order it is looked for."""
    part = "train" if split == "train" else "valid"
    found = [
        Split(data / f"annotations/instances_{split}2017.json", data / f"{split}2017", "COCO 2017"),
        Split(data / f"annotations/instances_{split}.json", data / split, "COCO"),
        Split(data / part / "_annotations.coco.json", data / part, "annotations beside images"),
        Split(data / f"{part}.json", data / part / "JPEGImages", "YouTube-VIS"),
        Split(data / part / "instances.json", data / part / "JPEGImages", "YouTube-VIS"),
    ]
    files = sorted((data / "annotations").glob("instances_*.json"))
    named = [file for file in files if split in file.stem]
    alone = files if len(files) == 1 else []  # one file may serve both
    return found + [Split(file, data / "JPEGImages", "YouTube-VIS") for file in named or alone]


def rgb_of(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8."""
    if image.mode.startswith("I"):  # 16 bit grey, which Pillow would cut off at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
