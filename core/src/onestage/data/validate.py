"""Annotation JSON to flat arrays, checked: nothing unchecked reaches pycocotools or the file system.

pycocotools is C: an infinite or huge polygon crashes it and a short RLE makes it decode uninitialised memory. So every
number is looked at here once, and what is left is held in arrays that worker processes share.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import re
import shlex
import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from onestage.errors import DatasetError, some
from onestage.masks import rle_counts

MAX_PIXELS = 100_000_000  # of an image

OnBadSample = Literal["raise", "skip"]

TRACK = "/track"  # key of the annotations made of YouTube-VIS tracks


@dataclass(frozen=True)
class Problem:
    """What is wrong with one entry of an annotation file.

    Args:
        kind: Which mistake; `data.lint.KINDS` says what becomes of the entry.
        what: A sentence, or the rest of one that begins with the entry's name.
        fix: What to do, where the reader stops.
    """

    kind: str
    what: str
    fix: str = ""


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
    if is_of_videos(content):
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
            f"python -m onestage.lint {shlex.quote(str(path))} lists all, and with --fix FOLDER writes a clean copy; "
            "or add --on-bad-sample skip to leave out what is broken",
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


def is_of_videos(content: Any) -> bool:
    """Whether a file's content is of YouTube-VIS format. COCO files may list videos beside images."""
    return isinstance(content, dict) and "videos" in content and not content.get("images")


def read_json(path: Path, **options: Any) -> Any:
    """The content of a `.json` or `.json.gz` file; says what is wrong with one that cannot be read."""
    try:
        raw = _unzipped(path) if path.suffix == ".gz" else path.read_bytes()
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


def _unzipped(path: Path) -> bytes:
    limit = _SMALL + _MOST_EXPANDED * path.stat().st_size
    with gzip.open(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise DatasetError(
            f"file '{path}' unpacks to more than {limit / 1e6:,.0f} MB, which no annotations of its size do",
            "if you trust it, unpack it and give the .json",
        )
    return raw


_SMALL, _MOST_EXPANDED = 1 << 20, 200  # bytes; annotations of many equal objects shrink to a hundredth


@dataclass
class _Images:
    ids: list[int]
    sizes: list[tuple[int, int]]
    names: list[str]
    position: dict[int, int]  # of the id; -1 for an image that was left out

    def append(self, image: Mapping[str, Any]) -> None:
        self.position[image["id"]] = len(self.ids)
        self.ids.append(image["id"])
        self.sizes.append((image["height"], image["width"]))
        self.names.append(image["file_name"])

    def position_of(self, image_id: Any) -> int | None:
        """None where no image has the id."""
        return self.position.get(image_id) if _whole(image_id) else None


def packed(value: dict[str, Any]) -> dict[str, Any]:
    """Packs polygons while a file is parsed: as Python objects COCO's would take gigabytes."""
    polygons = value.get("segmentation")
    if isinstance(polygons, list):
        with contextlib.suppress(TypeError, OverflowError):  # not polygons; the check says so
            value["segmentation"] = [array("d", polygon) for polygon in polygons]
    return value


def _compact(value: dict[str, Any]) -> dict[str, Any]:
    """Packs polygons and drops links."""
    for key in ("coco_url", "flickr_url", "license", "date_captured"):
        value.pop(key, None)
    return packed(value)


def _check_categories(categories: list[Any], source: str) -> tuple[tuple[int, str], ...]:
    table: dict[int, str] = {}
    for number, category in enumerate(categories):
        _stop_at(category_problem(number, category, table), source)
        table[category["id"]] = category["name"]
    if not table:
        raise DatasetError(f"{source} has no categories", "list at least one category")
    return tuple(sorted(table.items()))


def category_problem(number: int, category: Any, table: Mapping[int, str]) -> Problem | None:
    """What is wrong with `categories[number]`, if `table` has the names of those before by id; stops the reader."""
    if not isinstance(category, dict) or not _whole(category.get("id")) or not isinstance(category.get("name"), str):
        return Problem(
            "bad category",
            f"categories[{number}] needs a whole-number 'id' and a 'name', found {_short(category)}",
            'write it as {"id": 1, "name": "person"}',
        )
    if category["id"] in table:
        return Problem(
            "category id twice",
            f"category id {category['id']} occurs twice ('{table[category['id']]}' and '{category['name']}')",
            "give every category an id of its own",
        )
    return None


def _check_images(images: list[Any], source: str, max_pixels: float, problems: list[str]) -> _Images:
    good = _Images([], [], [], {})
    for number, image in enumerate(images):
        _stop_at(image_id_problem(number, image, good.position), source)
        problem = image_problem(image, max_pixels)
        if problem:
            problems.append(f"image {image['id']} {problem.what}")
            good.position[image["id"]] = -1
            continue
        good.append(image)
    return good


def image_id_problem(number: int, image: Any, known: Container[int]) -> Problem | None:
    """Why `images[number]` cannot be referred to, if the images before have the ids `known`; stops the reader."""
    if not isinstance(image, dict) or not _whole(image.get("id")):
        what = f"images[{number}] needs a whole-number 'id', found {_short(image)}"
        return Problem("image without id", what, "number the images")
    if image["id"] in known:
        return Problem("image id twice", f"image id {image['id']} occurs twice", "give every image an id of its own")
    return None


def image_problem(image: Mapping[str, Any], max_pixels: float) -> Problem | None:
    """Why an image that has an id cannot be used."""
    problem = file_name_problem(image.get("file_name"))
    if problem:
        return Problem("bad file name", f"file_name {_short(image.get('file_name'))} {problem}")
    name, height, width = image["file_name"], image.get("height", 0), image.get("width", 0)
    if not _whole(height) or not _whole(width) or height < 1 or width < 1:
        found = f"{_short(height)} and {_short(width)}"
        return Problem("image size", f"('{name}') needs whole numbers 'height' and 'width' above 0, found {found}")
    if height * width > max_pixels:
        limit = f"the limit is {max_pixels / 1e6:g} megapixels"
        return Problem("image too large", f"('{name}') has {height} x {width} px; {limit}")
    return None


def _stop_at(problem: Problem | None, source: str) -> None:
    if problem is not None:
        raise DatasetError(f"{source}: {problem.what}", problem.fix)


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
        _stop_at(entry_problem(number, annotation), source)
    fresh = fresh_ids(annotations)
    for annotation in annotations:
        if "id" not in annotation:
            annotation["id"] = next(fresh)
    annotations.sort(key=lambda annotation: images.position_of(annotation.get("image_id")) or 0)
    for number, annotation in enumerate(annotations):
        annotations[number] = None
        image = images.position_of(annotation.get("image_id"))
        if image == -1:
            continue
        size = (0, 0) if image is None else images.sizes[image]
        problem = annotation_problem(annotation, None if image is None else size, label_of)
        if problem:
            problems.append(f"{_named(annotation, image, images)} {problem.what}")
            continue
        assert image is not None
        segmentation, rle = annotation["segmentation"], b""
        if isinstance(segmentation, dict):
            rle, segmentation = _compressed(segmentation, size), []
        where.append(image)
        ids.append(annotation["id"])
        labels.append(label_of[annotation["category_id"]])
        numbers.extend(annotation["bbox"])
        numbers.append(annotation.get("area", math.nan))
        crowds.append(bool(annotation.get("iscrowd", 0)))
        tracks.append(annotation.get(TRACK, -1))
        polygon_counts.append(len(segmentation))
        for polygon in segmentation:
            point_counts.append(len(polygon))
            points.extend(clamped(polygon, size))
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


def entry_problem(number: int, annotation: Any) -> Problem | None:
    """Why `annotations[number]` is no annotation at all; stops the reader."""
    if isinstance(annotation, dict):
        return None
    return Problem("no annotation", f"annotations[{number}] is {_short(annotation)}", "use COCO format")


def fresh_ids(annotations: Sequence[Any]) -> Iterator[int]:
    """Numbers from 1 that no annotation has, for those without an id."""
    used = {a["id"] for a in annotations if isinstance(a, dict) and type(a.get("id")) is int}
    return (number for number in itertools.count(1) if number not in used)


def annotation_problem(
    annotation: Mapping[str, Any], size: tuple[int, int] | None, label_of: Mapping[int, Any]
) -> Problem | None:
    """Why an annotation cannot be used.

    Args:
        annotation: Of COCO format, with an `id`; polygons may be packed.
        size: (height, width) of its image; None where the file has no such image.
        label_of: The known category ids.
    """
    if not _whole(annotation["id"]):
        return Problem("bad annotation id", "has an id that is not a whole number")
    if size is None:
        what = f"belongs to image {_short(annotation.get('image_id'))}, which is not in 'images'"
        return Problem("unknown image", what)
    category = annotation.get("category_id")
    if not _whole(category) or category not in label_of:
        known = some([str(key) for key in label_of], 8)
        return Problem("unknown category", f"has category_id {_short(category)}; known are {known}")
    problem = segmentation_problem(annotation.get("segmentation"), size)
    if problem:
        return problem
    if not _numbers(annotation.get("bbox")) or len(annotation["bbox"]) != 4:
        what = f"has bbox {_short(annotation.get('bbox'))}; four finite numbers x, y, width, height are needed"
        return Problem("bad box", what)
    if annotation["bbox"][2] < 0 or annotation["bbox"][3] < 0:
        what = f"has bbox {_short(annotation['bbox'])} with a negative size; it is x, y, width, height"
        return Problem("bad box", what)
    if not _numbers([annotation.get("area", 0)]):
        return Problem("bad area", f"has area {_short(annotation['area'])}; a finite number is needed")
    if annotation.get("iscrowd", 0) not in (0, 1):
        return Problem("bad iscrowd", f"has iscrowd {_short(annotation['iscrowd'])}; 0 or 1 is needed")
    return None


def segmentation_problem(segmentation: Any, size: tuple[int, int]) -> Problem | None:
    """Why polygons or an RLE cannot be given to pycocotools."""
    if isinstance(segmentation, dict):
        try:
            rle_counts(segmentation, size, "")
        except DatasetError as error:
            return Problem("bad RLE", error.what.strip())
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return Problem("no mask", "has no segmentation; polygons or an RLE are needed")
    if _numbers(segmentation):
        return Problem("flat polygon", "has a flat list as segmentation; a list of polygons is needed")
    problems = (polygon_problem(number, polygon) for number, polygon in enumerate(segmentation))
    return next((problem for problem in problems if problem), None)


def polygon_problem(number: int, polygon: Any) -> Problem | None:
    """What is wrong with polygon `number` of an annotation."""
    if not isinstance(polygon, array) and not _numbers(polygon):
        return Problem("bad polygon", f"polygon {number} is not a list of finite numbers")
    if len(polygon) % 2 or len(polygon) < 6:
        what = f"polygon {number} has {len(polygon)} numbers; an even count of at least 6 is needed"
        return Problem("short polygon", what)
    if not math.isfinite(sum(polygon)) and not all(map(math.isfinite, polygon)):
        return Problem("bad polygon", f"polygon {number} has a coordinate that is not finite")
    return None


def mask_of(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A sound segmentation as compressed COCO RLE."""
    if isinstance(segmentation, dict):
        return {"size": list(size), "counts": _compressed(segmentation, size)}
    polygons = [list(clamped(polygon, size)) for polygon in segmentation]
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))


def _compressed(rle: dict[str, Any], size: tuple[int, int]) -> bytes:
    counts = rle["counts"]
    if isinstance(counts, str):
        return counts.encode("ascii")
    runs = np.array(counts, dtype=np.int64)
    return coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)["counts"]


def clamped(polygon: Sequence[float], size: tuple[int, int]) -> Sequence[float]:
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
    videos: dict[int, Video] = {}
    first = 1
    for part, entries in (("videos", content["videos"]), ("annotations", content.get("annotations") or [])):
        if not isinstance(entries, list):
            raise _no_video_file(source, f"'{part}' is not a list")
    for number, video in enumerate(content["videos"]):
        problem = video_problem(number, video, videos)
        if problem:
            raise _no_video_file(source, problem.what)
        frames = len(video["file_names"])
        videos[video["id"]] = Video(video["id"], (video["height"], video["width"]), frames, first)
        first += frames
    tracks: set[int] = set()
    for number, track in enumerate(content.get("annotations") or []):
        problem = track_problem(number, track, videos, tracks)
        if problem:
            raise _no_video_file(source, problem.what)
        tracks.add(track["id"])
    return frames_of(content, videos), tuple(videos.values())


def video_problem(number: int, video: Any, known: Container[int]) -> Problem | None:
    """Why `videos[number]` of a YouTube-VIS file is none, if those before have the ids `known`; stops the reader."""
    if not isinstance(video, dict) or not _whole(video.get("id")) or video["id"] in known:
        key = _short(video.get("id") if isinstance(video, dict) else video)
        return Problem("bad video", f"videos[{number}] has the id {key}, which is used or no number")
    missing = [key for key in ("file_names", "height", "width") if key not in video]
    if missing or not isinstance(video["file_names"], list):
        return Problem("bad video", f"videos[{number}] has no {some(missing) or 'list file_names'}")
    return None


def track_problem(number: int, track: Any, videos: Mapping[int, Video], known: Container[int]) -> Problem | None:
    """Why `annotations[number]` of a YouTube-VIS file is no track of one of the `videos`; stops the reader."""
    where = f"annotations[{number}]"
    if not isinstance(track, dict) or not _whole(track.get("id")) or track["id"] in known:
        key = _short(track.get("id") if isinstance(track, dict) else track)
        return Problem("bad track", f"{where} has the id {key}, which is used or no number")
    if not _whole(track.get("video_id")) or track["video_id"] not in videos:
        return Problem("bad track", f"{where} belongs to video {_short(track.get('video_id'))}, which it lacks")
    video = videos[track["video_id"]]
    parts: dict[str, Any] = {
        "segmentations": track.get("segmentations"),
        "bboxes": track.get("bboxes"),
        "areas": track.get("areas") or [None] * video.num_frames,
    }
    missing = [name for name, part in parts.items() if not isinstance(part, list)]
    if missing or "category_id" not in track:
        return Problem("bad track", f"{where} has no " + (f"list {missing[0]}" if missing else "category_id"))
    if not all(len(part) == video.num_frames for part in parts.values()):
        masks, boxes, areas = map(len, parts.values())
        lengths = f"{masks} segmentations, {boxes} bboxes and {areas} areas"
        return Problem("bad track", f"{where} has {lengths}; video {video.id} has {video.num_frames} frames")
    return None


def frames_of(content: dict[str, Any], videos: Mapping[int, Video]) -> dict[str, Any]:
    """Sound videos and tracks as images and annotations of COCO format, annotations in the order of tracks."""
    images: list[dict[str, Any]] = []
    for video in content["videos"]:
        height, width = videos[video["id"]].size
        images += [
            {"id": len(images) + 1 + i, "file_name": name, "height": height, "width": width}
            for i, name in enumerate(video["file_names"])
        ]
    annotations: list[dict[str, Any]] = []
    for track in content.get("annotations") or []:
        first = videos[track["video_id"]].first
        areas = track.get("areas") or [None] * len(track["bboxes"])
        for i, (mask, box, area) in enumerate(zip(track["segmentations"], track["bboxes"], areas, strict=True)):
            if mask is not None:
                one = {"id": len(annotations) + 1, "image_id": first + i, "category_id": track["category_id"]}
                one |= {"segmentation": mask, "bbox": box, "iscrowd": track.get("iscrowd", 0), TRACK: track["id"]}
                annotations.append(one | ({} if area is None else {"area": area}))
    return {"images": images, "annotations": annotations, "categories": content.get("categories")}


def _no_video_file(source: str, why: str) -> DatasetError:
    return DatasetError(f"{source} is not a complete YouTube-VIS file: {why}", "write it again")


def _named(annotation: Mapping[str, Any], image: int | None, images: _Images) -> str:
    key = _short(annotation["id"])
    if image is None:
        return f"annotation {key}"
    if TRACK in annotation:
        return f"annotation {annotation[TRACK]} (frame '{images.names[image]}')"
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
