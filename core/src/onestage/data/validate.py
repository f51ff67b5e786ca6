"""Annotation JSON to flat arrays, checked: nothing unchecked reaches pycocotools or the file system.

pycocotools is C: an infinite or huge polygon crashes it and a short RLE makes it decode uninitialised memory. So every
number is looked at here once, and what is left is held in arrays that worker processes share.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from onestage.errors import DatasetError, some
from onestage.masks import rle_counts

MAX_PIXELS = 100_000_000  # of an image

OnBadSample = Literal["raise", "skip"]

_TRACK = "/track"  # key of the annotations made of YouTube-VIS tracks


@dataclass(frozen=True)
class Video:
    """One video of a YouTube-VIS file.

    Args:
        id: The file's.
        size: (height, width) of every frame, pixels.
        num_frames: How many it has.
        first: Image id of its first frame; the others count on from there.
    """

    id: int
    size: tuple[int, int]
    num_frames: int
    first: int


@dataclass(frozen=True, eq=False)
class Annotations:
    """A data set's annotations, sorted by image. I images, A annotations, Q polygons; all coordinates in image pixels.

    Args:
        source: The file, for messages.
        categories: (id, name), sorted by id; the position is the label.
        image_ids: [I] int64.
        image_sizes: [I, 2] int64 height, width.
        names: [all characters] uint8, the file names in UTF-8 one after the other.
        name_ends: [I + 1] int64, image i's name is `names[name_ends[i]:name_ends[i + 1]]`; the `_ends` below likewise.
        annotation_ends: [I + 1] int64, annotations of image i.
        ids: [A] int64.
        labels: [A] int64, 0..K-1.
        boxes: [A, 4] float64 x, y, width, height as in the file.
        areas: [A] float64 as in the file, NaN where it has none.
        crowds: [A] bool.
        polygon_ends: [A + 1] int64, polygons of annotation a; none where it is an RLE.
        point_ends: [Q + 1] int64, coordinates of polygon q.
        points: [all coordinates] float64 x, y, x, y, ...
        rle_ends: [A + 1] int64, compressed run lengths of annotation a; none where it has polygons.
        rles: [all characters] uint8.
        problems: What was left out, one line each.
        track_ids: [A] int64, the track that an annotation of a YouTube-VIS file belongs to; -1 in other files.
        videos: The videos of a YouTube-VIS file, whose frames are the images; none in other files.
    """

    source: str
    categories: tuple[tuple[int, str], ...]
    image_ids: np.ndarray
    image_sizes: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray
    annotation_ends: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    polygon_ends: np.ndarray
    point_ends: np.ndarray
    points: np.ndarray
    rle_ends: np.ndarray
    rles: np.ndarray
    problems: tuple[str, ...]
    track_ids: np.ndarray
    videos: tuple[Video, ...] = ()

    def file_name(self, image: int) -> str:
        return self.names[self.name_ends[image] : self.name_ends[image + 1]].tobytes().decode("utf-8")

    def of_image(self, image: int) -> range:
        """The annotations of the image at this position."""
        return range(int(self.annotation_ends[image]), int(self.annotation_ends[image + 1]))

    def polygons(self, annotation: int) -> list[list[float]] | None:
        """Flat x, y lists, or None where the annotation is an RLE."""
        first, end = self.polygon_ends[annotation : annotation + 2]
        if first == end:
            return None
        return [self.points[self.point_ends[q] : self.point_ends[q + 1]].tolist() for q in range(first, end)]

    def rle(self, annotation: int, size: tuple[int, int]) -> dict[str, Any]:
        """The annotation's mask as compressed COCO RLE; polygons are rasterised by pycocotools' rules."""
        polygons = self.polygons(annotation)
        if polygons is not None:
            return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
        counts = self.rles[self.rle_ends[annotation] : self.rle_ends[annotation + 1]].tobytes()
        return {"size": list(size), "counts": counts}


def read_annotations(
    path: Path, *, on_bad_sample: OnBadSample = "raise", max_pixels: float = MAX_PIXELS
) -> Annotations:
    """Reads and checks a COCO or YouTube-VIS file, `.json` or `.json.gz`.

    Args:
        path: The file.
        on_bad_sample: `raise` stops at images and annotations that cannot be used; `skip` leaves them out and lists
            them in `problems`.
        max_pixels: Largest height * width of an image.

    Raises:
        DatasetError: a file that is not such JSON, or what `on_bad_sample` says.
    """
    content = read_json(path, object_hook=_compact)
    source = f"dataset '{path}'"
    if isinstance(content, list):
        raise DatasetError(f"{source} is a list; is it a results file?", "give the annotation file of the data set")
    videos: tuple[Video, ...] = ()
    if isinstance(content, dict) and "videos" in content:
        content, videos = _frames_as_images(content, source)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DatasetError(f"{source} has no list '{key}'", "use COCO format: images, annotations, categories")
    categories = _check_categories(content["categories"], source)
    problems: list[str] = []
    images = _check_images(content["images"], source, max_pixels, problems)
    checked = _check_annotations(content["annotations"], categories, images, source, problems)
    if problems and on_bad_sample == "raise":
        more = f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise DatasetError(
            f"{source}: {problems[0]}{more}",
            "correct the file, or add --on-bad-sample skip to leave out what is broken",
        )
    names = [name.encode("utf-8") for name in images.names]
    return Annotations(
        source=source,
        categories=categories,
        image_ids=np.array(images.ids, dtype=np.int64),
        image_sizes=np.array(images.sizes, dtype=np.int64).reshape(-1, 2),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_ends=_ends([len(name) for name in names]),
        problems=tuple(problems),
        videos=videos,
        **checked,
    )


def read_json(path: Path, **options: Any) -> Any:
    """The content of a `.json` or `.json.gz` file; says what is wrong with one that cannot be read."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"file '{path}' does not exist", "check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DatasetError(f"file '{path}' cannot be read: {reason}", "check the path and the file") from None
    start = raw[:200].lstrip()
    if not start:
        raise DatasetError(f"file '{path}' is empty", "download or write it again")
    if start.startswith(b"<"):
        raise DatasetError(
            f"file '{path}' is an HTML or XML page, not JSON (a login or quota page saved by a browser or wget?)",
            "download the file itself",
        )
    try:
        text = raw.decode("utf-8-sig")
        del raw  # half a gigabyte for COCO
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"file '{path}' is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            "download or write it again; a cut-off download breaks at its end",
        ) from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise DatasetError(f"file '{path}' is not JSON text", "give a COCO annotation file") from None


def file_name_problem(name: Any) -> str | None:
    """Why a file name may not be opened below the image folder, or None."""
    if not isinstance(name, str) or not name:
        return "is not a file name"
    if "\0" in name:
        return "has a NUL character"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "is an absolute path; it must be relative to the image folder"
    if ".." in re.split(r"[/\\]", name):
        return "has '..'; it must stay inside the image folder"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid text"
    return None


@dataclass
class _Images:
    ids: list[int]
    sizes: list[tuple[int, int]]
    names: list[str]
    position: dict[int, int]  # of the id; -1 for an image that was left out

    def position_of(self, image_id: Any) -> int | None:
        """None where no image has the id."""
        return self.position.get(image_id) if _whole(image_id) else None


def _compact(value: dict[str, Any]) -> dict[str, Any]:
    """Packs polygons and drops links while the file is parsed: as Python objects COCO's would take gigabytes."""
    for key in ("coco_url", "flickr_url", "license", "date_captured"):
        value.pop(key, None)
    polygons = value.get("segmentation")
    if isinstance(polygons, list):
        with contextlib.suppress(TypeError, OverflowError):  # not polygons; the check says so
            value["segmentation"] = [array("d", polygon) for polygon in polygons]
    return value


def _check_categories(categories: list[Any], source: str) -> tuple[tuple[int, str], ...]:
    table: dict[int, str] = {}
    for number, category in enumerate(categories):
        known = isinstance(category, dict) and _whole(category.get("id")) and isinstance(category.get("name"), str)
        if not known:
            raise DatasetError(
                f"{source}: categories[{number}] needs a whole-number 'id' and a 'name', found {_short(category)}",
                'write it as {"id": 1, "name": "person"}',
            )
        if category["id"] in table:
            raise DatasetError(
                f"{source}: category id {category['id']} occurs twice "
                f"('{table[category['id']]}' and '{category['name']}')",
                "give every category an id of its own",
            )
        table[category["id"]] = category["name"]
    if not table:
        raise DatasetError(f"{source} has no categories", "list at least one category")
    return tuple(sorted(table.items()))


def _check_images(images: list[Any], source: str, max_pixels: float, problems: list[str]) -> _Images:
    good = _Images([], [], [], {})
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not _whole(image.get("id")):
            raise DatasetError(
                f"{source}: images[{number}] needs a whole-number 'id', found {_short(image)}", "number the images"
            )
        key = image["id"]
        if key in good.position:
            raise DatasetError(f"{source}: image id {key} occurs twice", "give every image an id of its own")
        problem = _image_problem(image, max_pixels)
        if problem:
            problems.append(f"image {key} {problem}")
            good.position[key] = -1
            continue
        good.position[key] = len(good.ids)
        good.ids.append(key)
        good.sizes.append((image["height"], image["width"]))
        good.names.append(image["file_name"])
    return good


def _image_problem(image: Mapping[str, Any], max_pixels: float) -> str | None:
    problem = file_name_problem(image.get("file_name"))
    if problem:
        return f"file_name {_short(image.get('file_name'))} {problem}"
    height, width = image.get("height", 0), image.get("width", 0)
    if not _whole(height) or not _whole(width) or height < 1 or width < 1:
        return f"('{image['file_name']}') needs whole numbers 'height' and 'width' above 0, found {height} and {width}"
    if height * width > max_pixels:
        return f"('{image['file_name']}') has {height} x {width} px; the limit is {max_pixels / 1e6:g} megapixels"
    return None


def _check_annotations(
    annotations: list[Any],
    categories: tuple[tuple[int, str], ...],
    images: _Images,
    source: str,
    problems: list[str],
) -> dict[str, np.ndarray]:
    """The flat arrays of `Annotations` that describe annotations. Empties the list: there is no memory for both."""
    label_of = {key: label for label, (key, _) in enumerate(categories)}
    where: list[int] = []  # position of the image
    ids: list[int] = []
    labels: list[int] = []
    numbers = array("d")  # x, y, width, height, area
    tracks: list[int] = []
    crowds: list[bool] = []
    polygon_counts: list[int] = []
    point_counts: list[int] = []
    points = array("d")
    rles: list[bytes] = []
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise DatasetError(f"{source}: annotations[{number}] is {_short(annotation)}", "use COCO format")
        annotation.setdefault("id", number + 1)
    annotations.sort(key=lambda annotation: images.position_of(annotation.get("image_id")) or 0)
    for number, annotation in enumerate(annotations):
        annotations[number] = None
        image = images.position_of(annotation.get("image_id"))
        if image == -1:
            continue
        problem = _annotation_problem(annotation, image, label_of)
        if problem:
            problems.append(f"{_named(annotation, image, images)} {problem}")
            continue
        assert image is not None
        size = images.sizes[image]
        segmentation, rle = annotation["segmentation"], b""
        if isinstance(segmentation, dict):
            try:
                rle = _checked_rle(segmentation, size, _named(annotation, image, images))
            except DatasetError as error:
                problems.append(error.what)
                continue
            segmentation = []
        where.append(image)
        ids.append(annotation["id"])
        labels.append(label_of[annotation["category_id"]])
        numbers.extend(annotation["bbox"])
        numbers.append(annotation.get("area", math.nan))
        crowds.append(bool(annotation.get("iscrowd", 0)))
        tracks.append(annotation.get(_TRACK, -1))
        polygon_counts.append(len(segmentation))
        for polygon in segmentation:
            point_counts.append(len(polygon))
            points.extend(_clamped(polygon, size))
        rles.append(rle)
    if len(set(ids)) < len(ids):
        twice = [str(key) for key, count in sorted(Counter(ids).items()) if count > 1]
        raise DatasetError(
            f"{source}: annotation ids occur twice: {some(twice)}", "give every annotation an id of its own"
        )
    table = np.array(numbers).reshape(-1, 5)
    return {
        "annotation_ends": _ends(np.bincount(np.array(where, dtype=np.int64), minlength=len(images.ids))),
        "ids": np.array(ids, dtype=np.int64),
        "labels": np.array(labels, dtype=np.int64),
        "boxes": table[:, :4],
        "areas": table[:, 4],
        "crowds": np.array(crowds, dtype=bool),
        "track_ids": np.array(tracks, dtype=np.int64),
        "polygon_ends": _ends(polygon_counts),
        "point_ends": _ends(point_counts),
        "points": np.array(points),
        "rle_ends": _ends([len(rle) for rle in rles]),
        "rles": np.frombuffer(b"".join(rles), dtype=np.uint8),
    }


def _annotation_problem(annotation: Mapping[str, Any], image: int | None, label_of: Mapping[int, int]) -> str | None:
    """What is wrong with everything but an RLE's runs, or None."""
    if not _whole(annotation["id"]):
        return "has an id that is not a whole number"
    if image is None:
        return f"belongs to image {_short(annotation.get('image_id'))}, which is not in 'images'"
    category = annotation.get("category_id")
    if not _whole(category) or category not in label_of:
        return f"has category_id {_short(category)}; known are {some([str(known) for known in label_of], 8)}"
    if not _numbers(annotation.get("bbox")) or len(annotation["bbox"]) != 4:
        return f"has bbox {_short(annotation.get('bbox'))}; four finite numbers x, y, width, height are needed"
    if annotation["bbox"][2] < 0 or annotation["bbox"][3] < 0:
        return f"has bbox {_short(annotation['bbox'])} with a negative size; it is x, y, width, height"
    if not _numbers([annotation.get("area", 0)]):
        return f"has area {_short(annotation['area'])}; a finite number is needed"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {_short(annotation['iscrowd'])}; 0 or 1 is needed"
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return "has no segmentation; polygons or an RLE are needed"
    if _numbers(segmentation):
        return "has a flat list as segmentation; a list of polygons is needed"
    for number, polygon in enumerate(segmentation):
        if not isinstance(polygon, array) and not _numbers(polygon):
            return f"polygon {number} is not a list of finite numbers"
        if len(polygon) % 2 or len(polygon) < 6:
            return f"polygon {number} has {len(polygon)} numbers; an even count of at least 6 is needed"
        if not math.isfinite(sum(polygon)):
            return f"polygon {number} has a coordinate that is not finite"
    return None


def _checked_rle(rle: dict[str, Any], size: tuple[int, int], name: str) -> bytes:
    runs = rle_counts(rle, size, name)
    counts = rle["counts"]
    if isinstance(counts, str):
        return counts.encode("ascii")
    return coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)["counts"]


def _clamped(polygon: Sequence[float], size: tuple[int, int]) -> Sequence[float]:
    """The polygon within one image size of the image: pycocotools walks along every edge pixel by pixel."""
    height, width = size
    if -min(size) <= min(polygon) and max(polygon) <= 2 * min(size):
        return polygon
    limits = (width, height)
    return [min(max(value, -limits[i % 2]), 2 * limits[i % 2]) for i, value in enumerate(polygon)]


def _ends(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64))).astype(np.int64)


def _frames_as_images(content: dict[str, Any], source: str) -> tuple[dict[str, Any], tuple[Video, ...]]:
    """A YouTube-VIS file as COCO: every frame an image, numbered from 1 in file order.

    A file without annotations, as the official one of the validation set, is one without objects.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    videos: dict[int, Video] = {}
    try:
        for number, video in enumerate(content["videos"]):
            key, names = video["id"], video["file_names"]
            if not _whole(key) or key in videos:
                raise _no_video_file(source, f"videos[{number}] has the id {_short(key)}, which is used or no number")
            height, width = video["height"], video["width"]
            videos[key] = Video(key, (height, width), len(names), len(images) + 1)
            images += [
                {"id": len(images) + 1 + i, "file_name": name, "height": height, "width": width}
                for i, name in enumerate(names)
            ]
        tracks: set[int] = set()
        for number, track in enumerate(content.get("annotations") or []):
            key, where = track["id"], f"annotations[{number}]"
            if not _whole(key) or key in tracks:
                raise _no_video_file(source, f"{where} has the id {_short(key)}, which is used or no number")
            tracks.add(key)
            if track["video_id"] not in videos:
                raise _no_video_file(source, f"{where} belongs to video {_short(track['video_id'])}, which it lacks")
            video = videos[track["video_id"]]
            masks, boxes = track["segmentations"], track["bboxes"]
            areas = track.get("areas") or [None] * video.num_frames
            if not len(masks) == len(boxes) == len(areas) == video.num_frames:
                lengths = f"{len(masks)} segmentations, {len(boxes)} bboxes and {len(areas)} areas"
                raise _no_video_file(source, f"{where} has {lengths}; video {video.id} has {video.num_frames} frames")
            for i, (mask, box, area) in enumerate(zip(masks, boxes, areas, strict=True)):
                if mask is not None:
                    one = {"id": len(annotations) + 1, "image_id": video.first + i, "category_id": track["category_id"]}
                    one |= {"segmentation": mask, "bbox": box, "iscrowd": track.get("iscrowd", 0), _TRACK: key}
                    annotations.append(one | ({} if area is None else {"area": area}))
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_video_file(source, repr(error)) from None
    coco = {"images": images, "annotations": annotations, "categories": content.get("categories")}
    return coco, tuple(videos.values())


def _no_video_file(source: str, why: str) -> DatasetError:
    return DatasetError(f"{source} is not a complete YouTube-VIS file: {why}", "write it again")


def _named(annotation: Mapping[str, Any], image: int | None, images: _Images) -> str:
    key = _short(annotation["id"])
    if image is None:
        return f"annotation {key}"
    if _TRACK in annotation:
        return f"annotation {annotation[_TRACK]} (frame '{images.names[image]}')"
    return f"annotation {key} (image {annotation['image_id']}, '{images.names[image]}')"


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _numbers(values: Any) -> bool:
    """Whether this is a list of finite numbers."""
    if not isinstance(values, (list, tuple)):
        return False
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:  # an int beyond float
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
