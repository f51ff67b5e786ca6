"""Everything that is wrong with a data set, and a clean copy of its annotations.

`clean` walks through an annotation file with the checks of `data.validate`, the loader's own, but does not stop at the
first problem: it counts all, by kind, and repairs or drops what has them. What the loader takes without a word and
a person would want to know (duplicates, boxes that do not fit their masks, pictures in train and val) is found here.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from onestage.data.coco import check_header, in_target, read_image
from onestage.data.validate import (
    MAX_PIXELS,
    TRACK,
    Video,
    annotation_problem,
    category_problem,
    clamped,
    entry_problem,
    frames_of,
    fresh_ids,
    image_id_problem,
    image_problem,
    is_of_videos,
    mask_of,
    packed,
    polygon_problem,
    read_json,
    track_problem,
    video_problem,
)
from onestage.errors import DatasetError, some

Effect = Literal["stops", "skips", "mends", "notes"]
Depth = Literal["none", "header", "decode"]
Size = tuple[int, int]  # height, width

EFFECTS: dict[Effect, str] = {
    "stops": "the loader stops at it",
    "skips": "the loader stops at it; with --on-bad-sample skip it leaves it out",
    "mends": "the loader copes with it",
    "notes": "the loader takes it as it is",
}

# Every kind of problem: what the loader does about it, and what becomes of the entry in a clean copy.
KINDS: dict[str, tuple[Effect, str]] = {
    "unusable file": ("stops", "no copy"),
    "bad category": ("stops", "dropped"),
    "category id twice": ("stops", "the second one dropped"),
    "image without id": ("stops", "dropped"),
    "image id twice": ("stops", "the second one dropped"),
    "no annotation": ("stops", "dropped"),
    "annotation id twice": ("stops", "the second one numbered anew"),
    "bad video": ("stops", "dropped with its tracks"),
    "bad track": ("stops", "dropped"),
    "bad file name": ("skips", "dropped with its annotations"),
    "image size": ("skips", "dropped with its annotations"),
    "image too large": ("skips", "dropped with its annotations"),
    "image missing": ("skips", "dropped with its annotations"),
    "image unreadable": ("skips", "dropped with its annotations"),
    "bad annotation id": ("skips", "numbered anew"),
    "unknown image": ("skips", "dropped"),
    "unknown category": ("skips", "dropped"),
    "no mask": ("skips", "dropped"),
    "bad RLE": ("skips", "dropped"),
    "flat polygon": ("skips", "made a list of polygons"),
    "short polygon": ("skips", "dropped; the annotation too if it was its last one"),
    "bad polygon": ("skips", "dropped; the annotation too if it was its last one"),
    "bad box": ("skips", "box of the mask"),
    "bad area": ("skips", "area of the mask"),
    "bad iscrowd": ("skips", "0 for null, else dropped"),
    "far polygon": ("mends", "drawn in to one image size around the image"),
    "box outside": ("mends", "clipped to the image"),
    "under a pixel": ("mends", "kept; the loader leaves it out of targets"),
    "no annotation id": ("mends", "numbered"),
    "no area": ("mends", "area of the mask"),
    "orientation applied": ("mends", "kept; only turned does the image fit its annotations"),
    "orientation ignored": ("notes", "kept; the annotations fit the image as it is stored"),
    "box off its mask": ("notes", "box of the mask"),
    "duplicate annotation": ("notes", "dropped"),
    "file name twice": ("notes", "kept"),
    "same picture twice": ("notes", "kept"),
    "in train and val": ("notes", "kept"),
    "category name twice": ("notes", "kept; results of other ids cannot be matched by name"),
    "category unused": ("notes", "kept"),
    "categories differ": ("notes", "kept; evaluation matches by name, and stops where names differ"),
}

EXAMPLES = 5  # kept of each kind


@dataclass
class Report:
    """What was found in one split, by kind.

    Args:
        counts: How often.
        examples: The first few in words.
        outcomes: Of each kind, how many entries a clean copy has `repaired`, `dropped` or `kept`.
        numbers: Images, annotations, categories and the like, before cleaning.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, what: str, outcome: Literal["repaired", "dropped", "kept"] = "kept") -> None:
        """Counts one problem; `what` is a line that names the entry."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        self.outcomes[kind][outcome] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(what)

    def with_effect(self, *effects: Effect) -> int:
        """How many problems the loader answers like this."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind][0] in effects)

    def to_json(self) -> dict[str, Any]:
        """Plain values: for each kind found its count, effect, examples, and what became of the entries."""
        kinds = {
            kind: {
                "count": self.counts[kind],
                "effect": KINDS[kind][0],
                "copy": KINDS[kind][1],
                "outcomes": dict(self.outcomes[kind]),
                "examples": self.examples[kind],
            }
            for kind in KINDS
            if kind in self.counts
        }
        return {"numbers": self.numbers, "problems": kinds}


@dataclass
class Checked:
    """A split after its check.

    Args:
        report: What was found.
        content: The clean annotations, ready to be written; None where the file cannot be used at all.
        files: Path of every image that is there.
    """

    report: Report
    content: dict[str, Any] | None
    files: list[Path]


def lint_split(json: Path, images: Path | None, *, depth: Depth = "header", max_pixels: float = MAX_PIXELS) -> Checked:
    """Finds all problems of one annotation file and its images; changes no file.

    Args:
        json: COCO or YouTube-VIS file, `.json` or `.json.gz`.
        images: Folder that file names are relative to; None looks at no image.
        depth: How far images are looked at: not at all, their headers, or all of their pixels.
        max_pixels: Largest height * width of an image.
    """
    report = Report()
    try:
        content = _readable(json)
        is_video = is_of_videos(content)
        if is_video:
            content["annotations"] = content.get("annotations") or []
        categories = _categories(content, report)
        if not categories:
            raise DatasetError(f"dataset '{json}' has no categories", "list at least one category")
    except DatasetError as error:
        report.add("unusable file", error.what, "dropped")
        return Checked(report, None, [])
    folder = images if depth != "none" else None
    if folder is not None and not folder.is_dir():
        report.add("unusable file", f"image folder '{folder}' does not exist", "kept")
        folder = None
    if is_video:
        files = _clean_videos(content, categories, folder, depth, max_pixels, report)
    else:
        files = _clean_images(content, categories, folder, depth, max_pixels, report)
    used = {entry["category_id"] for entry in content["annotations"]}
    for key, name in categories.items():
        if key not in used and content["annotations"]:
            report.add("category unused", f"category {key} '{name}' has no annotation")
    return Checked(report, content, files)


def compare_splits(train: Checked, val: Checked) -> Report:
    """What two splits should not have in common, and what they should: pictures and categories."""
    report = Report()
    ours, theirs = set(train.files), set(val.files)
    for group in same_pictures(ours | theirs):
        one, other = [path for path in group if path in ours], [path for path in group if path in theirs]
        if one and other:
            same = "" if one[0] == other[0] else f" is '{other[0]}'"
            report.add("in train and val", f"'{one[0]}'{same or ' is in both'}")
    if train.content is not None and val.content is not None:
        tables = [
            {entry["id"]: entry["name"] for entry in checked.content["categories"]}
            for checked in (train, val)
            if checked.content is not None
        ]
        if tables[0] != tables[1]:
            both = [some([f"{key} {name}" for key, name in sorted(set(table.items()))]) for table in tables]
            report.add("categories differ", f"train has {len(tables[0])} ({both[0]}), val {len(tables[1])} ({both[1]})")
    return report


def same_pictures(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Groups of files that are equal byte for byte; a path that stands in both splits is a group of its own."""
    counted = sorted(set(paths))
    groups: Iterable[list[Path]] = [counted]
    for key in (_size_of, _ends_of, _hash_of):  # each reads more of fewer files
        groups = [part for group in groups for part in _apart(group, key)]
    grouped = {path for group in groups for path in group}
    yield from groups
    yield from ([path] for path in counted if path not in grouped)


def _readable(json: Path) -> dict[str, Any]:
    """The file's content with polygons packed, if it has the lists of one of the two formats."""
    content = read_json(json, object_hook=packed)
    if isinstance(content, list):
        raise DatasetError(f"dataset '{json}' is a list; is it a results file?", "give an annotation file")
    wanted: tuple[str, ...] = ("images", "annotations", "categories")
    if is_of_videos(content):
        wanted = ("videos", "categories", *(["annotations"] if content.get("annotations") else []))
    missing = [key for key in wanted if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DatasetError(f"dataset '{json}' has no list '{missing[0]}'", "use COCO format")
    return content


def _categories(content: dict[str, Any], report: Report) -> dict[int, str]:
    table: dict[int, str] = {}
    kept = []
    for number, category in enumerate(content["categories"]):
        problem = category_problem(number, category, table)
        if problem:
            report.add(problem.kind, problem.what, "dropped")
            continue
        if category["name"] in table.values():
            report.add("category name twice", f"category {category['id']} is called '{category['name']}' as another is")
        table[category["id"]] = category["name"]
        kept.append(category)
    report.numbers["categories"] = len(content["categories"])
    content["categories"] = kept
    return table


def _clean_images(
    content: dict[str, Any],
    categories: Mapping[int, str],
    folder: Path | None,
    depth: Depth,
    max_pixels: float,
    report: Report,
) -> list[Path]:
    """Cleans images and annotations in place; returns the image files."""
    report.numbers |= {"images": len(content["images"]), "annotations": len(content["annotations"])}
    sizes: dict[int, Size | None] = {}  # by id; None for an image that cannot be used
    names: dict[int, str] = {}
    files: list[Path] = []
    kept = []
    for number, image in enumerate(content["images"]):
        problem = image_id_problem(number, image, sizes)
        if problem:
            report.add(problem.kind, problem.what, "dropped")
            continue
        key = image["id"]
        sizes[key], path = _check_image(image, folder, depth, max_pixels, report)
        if sizes[key] is not None:
            names[key] = image["file_name"]
            kept.append(image)
        if path is not None:
            files.append(path)
    for name, count in Counter(names.values()).items():
        if count > 1:
            report.add("file name twice", f"'{name}' is the file of {count} images")
    _note_same_pictures(files, report)
    content["images"] = kept
    content["annotations"] = _clean_annotations(content["annotations"], categories, sizes, names, report)
    report.numbers["images without annotations"] = len(kept) - len({a["image_id"] for a in content["annotations"]})
    return files


def _clean_videos(
    content: dict[str, Any],
    categories: Mapping[int, str],
    folder: Path | None,
    depth: Depth,
    max_pixels: float,
    report: Report,
) -> list[Path]:
    """Cleans videos and tracks in place, frame by frame; returns the frames' files."""
    report.numbers |= {"videos": len(content["videos"]), "tracks": len(content["annotations"])}
    videos: dict[int, Video] = {}
    kept_videos, kept_tracks, first = [], [], 1
    for number, video in enumerate(content["videos"]):
        problem = video_problem(number, video, videos)
        if problem:
            report.add(problem.kind, problem.what, "dropped")
            continue
        frames = len(video["file_names"])
        videos[video["id"]] = Video(video["id"], (video["height"], video["width"]), frames, first)
        first += frames
        kept_videos.append(video)
    tracks: dict[int, dict[str, Any]] = {}
    for number, track in enumerate(content["annotations"]):
        problem = track_problem(number, track, videos, tracks)
        if problem:
            report.add(problem.kind, problem.what, "dropped")
            continue
        tracks[track["id"]] = track
        kept_tracks.append(track)
    content |= {"videos": kept_videos, "annotations": kept_tracks}
    flat = frames_of(content, videos)
    report.numbers |= {"images": len(flat["images"]), "annotations": len(flat["annotations"])}

    sizes: dict[int, Size | None] = {}
    names: dict[int, str] = {}
    files: list[Path] = []
    for image in flat["images"]:
        names[image["id"]] = str(image["file_name"])
        sizes[image["id"]], path = _check_image(image, folder, depth, max_pixels, report)
        files += [] if path is None else [path]
    for video in list(kept_videos):  # a video is of use with all of its frames only
        entry = videos[video["id"]]
        if not entry.num_frames or any(sizes[entry.first + i] is None for i in range(entry.num_frames)):
            if not entry.num_frames:
                report.add("bad video", f"video {entry.id} has no frames", "dropped")
            kept_videos.remove(video)
            sizes |= {entry.first + i: None for i in range(entry.num_frames)}
            kept_tracks[:] = [track for track in kept_tracks if track["video_id"] != entry.id]
    for track in kept_tracks:
        length = videos[track["video_id"]].num_frames
        track |= {"segmentations": [None] * length, "bboxes": [None] * length, "areas": [None] * length}
    seen = set()
    for annotation in _clean_annotations(flat["annotations"], categories, sizes, names, report):
        track = tracks[annotation[TRACK]]
        seen.add(track["id"])
        frame = annotation["image_id"] - videos[track["video_id"]].first
        track["segmentations"][frame] = annotation["segmentation"]
        track["bboxes"][frame] = annotation["bbox"]
        track["areas"][frame] = annotation["area"]
        track["iscrowd"] = annotation.get("iscrowd", 0)
    kept_tracks[:] = [track for track in kept_tracks if track["id"] in seen]
    return files


def _check_image(
    image: Mapping[str, Any], folder: Path | None, depth: Depth, max_pixels: float, report: Report
) -> tuple[Size | None, Path | None]:
    """The size of a usable image, and its file where one was looked for and found."""
    problem = image_problem(image, max_pixels)
    if problem:
        report.add(problem.kind, f"image {image['id']} {problem.what}", "dropped")
        return None, None
    size = (image["height"], image["width"])
    if folder is None:
        return size, None
    path = folder / image["file_name"]
    if not os.path.isfile(path):  # unlike Path.is_file, it knows names too long to be one
        report.add("image missing", f"image {image['id']} '{image['file_name']}' is not in '{folder}'", "dropped")
        return None, None
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DatasetError(f"image '{path}' is a link out of its folder", "")
        tag = check_header(path, max_pixels=max_pixels, size=size)
        if depth == "decode":
            read_image(path, max_pixels=max_pixels, size=size)
    except DatasetError as error:
        report.add("image unreadable", f"image {image['id']}: {error.what}", "dropped")
        return None, None
    if tag is not None:
        report.add(f"orientation {tag}", f"image {image['id']} '{path}' has an orientation tag")
    return size, path


def _note_same_pictures(files: Sequence[Path], report: Report) -> None:
    for group in same_pictures(files):
        if len(group) > 1:
            report.add("same picture twice", f"'{group[0]}' is also {some([repr(str(path)) for path in group[1:]])}")


def _clean_annotations(
    annotations: list[Any],
    categories: Mapping[int, str],
    sizes: Mapping[int, Size | None],
    names: Mapping[int, str],
    report: Report,
) -> list[dict[str, Any]]:
    """The sound and repaired annotations in file order."""
    fresh = fresh_ids(annotations)
    seen: set[int] = set()
    of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    dropped: set[int] = set()
    with_lost_image = 0
    for number, annotation in enumerate(annotations):
        problem = entry_problem(number, annotation)
        if problem:
            report.add(problem.kind, problem.what, "dropped")
            continue
        if "id" not in annotation:
            annotation["id"] = next(fresh)
            report.add("no annotation id", f"annotations[{number}] has no id", "repaired")
        image = annotation.get("image_id")
        known = type(image) is int and image in sizes
        size = sizes[image] if known else None
        if known and size is None:
            with_lost_image += 1
            continue
        name = _name(annotation, names)
        if not _repaired(annotation, size, categories, name, fresh, report):
            continue
        if annotation["id"] in seen:
            report.add("annotation id twice", f"{name} has an id that another has", "repaired")
            annotation["id"] = next(fresh)
        seen.add(annotation["id"])
        of_image[annotation["image_id"]].append(annotation)
    for image, here in of_image.items():
        size = sizes[image]
        assert size is not None
        dropped |= _look_closer(here, size, names, report)
    if with_lost_image:
        report.numbers["annotations of images that cannot be used"] = with_lost_image
    ours = {id(annotation) for here in of_image.values() for annotation in here}
    return [a for a in annotations if id(a) in ours and a["id"] not in dropped]


def _repaired(
    annotation: dict[str, Any],
    size: Size | None,
    categories: Mapping[int, str],
    name: str,
    fresh: Iterator[int],
    report: Report,
) -> bool:
    """Repairs until the loader's check has nothing to say; False where it cannot be repaired."""
    tried: set[str] = set()
    while (problem := annotation_problem(annotation, size, categories)) is not None:
        done = problem.kind not in tried and _repair(annotation, size, problem.kind, fresh)
        report.add(problem.kind, f"{name} {problem.what}", "repaired" if done else "dropped")
        if not done:
            return False
        tried.add(problem.kind)
    return True


def _repair(annotation: dict[str, Any], size: Size | None, kind: str, fresh: Iterator[int]) -> bool:
    """Changes the annotation so that a problem of this kind is gone; False if nobody could."""
    segmentation: Any = annotation.get("segmentation")
    if kind == "bad annotation id":
        annotation["id"] = next(fresh)
    elif kind == "flat polygon":
        annotation["segmentation"] = [array("d", segmentation)]
    elif kind in ("short polygon", "bad polygon"):
        annotation["segmentation"] = [polygon for polygon in segmentation if polygon_problem(0, polygon) is None]
        return bool(annotation["segmentation"])
    elif kind == "bad iscrowd" and annotation["iscrowd"] is None:
        annotation["iscrowd"] = 0
    elif kind in ("bad box", "bad area"):  # the segmentation was checked before them
        assert size is not None
        mask = mask_of(segmentation, size)
        if kind == "bad box":
            annotation["bbox"] = coco_mask.toBbox(mask).tolist()
        else:
            annotation["area"] = float(coco_mask.area(mask))
    else:
        return False
    return True


def _look_closer(annotations: list[dict[str, Any]], size: Size, names: Mapping[int, str], report: Report) -> set[int]:
    """What the loader does not complain of in one image's annotations; returns the ids of duplicates."""
    dropped: set[int] = set()
    seen: dict[Any, int] = {}
    for annotation in annotations:
        name, segmentation = _name(annotation, names), annotation["segmentation"]
        whole = _identity(annotation)
        if whole in seen:
            report.add("duplicate annotation", f"{name} repeats annotation {seen[whole]}", "dropped")
            dropped.add(annotation["id"])
            continue
        seen[whole] = annotation["id"]
        if isinstance(segmentation, list):
            near = [clamped(polygon, size) for polygon in segmentation]
            if any(list(one) != list(other) for one, other in zip(near, segmentation, strict=True)):
                report.add("far polygon", f"{name} has coordinates more than an image size outside", "repaired")
                annotation["segmentation"] = near
        _check_box(annotation, size, name, report)
        if annotation.get("area") is None:
            annotation["area"] = float(coco_mask.area(mask_of(annotation["segmentation"], size)))
            report.add("no area", f"{name} has no area", "repaired")
    left = [annotation for annotation in annotations if annotation["id"] not in dropped]
    boxes = np.array([annotation["bbox"] for annotation in left], dtype=np.float64).reshape(-1, 4)
    usable, _ = in_target(boxes, np.array([annotation["area"] for annotation in left], dtype=np.float64), size)
    for annotation, use in zip(left, usable.tolist(), strict=True):
        if not use:
            x, y, width, height = annotation["bbox"]
            what = f"has {width:g} x {height:g} px at ({x:g}, {y:g}) and area {annotation['area']:g}"
            report.add("under a pixel", f"{_name(annotation, names)} {what}")
    return dropped


def _check_box(annotation: dict[str, Any], size: Size, name: str, report: Report) -> None:
    height, width = size
    x, y, w, h = annotation["bbox"]
    found = _extent(annotation["segmentation"], size)
    inside = _within((x, y, x + w, y + h), size)
    if found is not None and _far_apart(inside, found):
        hint = "; read as x1, y1, x2, y2 it would fit" if not _far_apart(_within((x, y, w, h), size), found) else ""
        shown = ", ".join(f"{value:g}" for value in (found[0], found[1], found[2] - found[0], found[3] - found[1]))
        what = f"has bbox {_rounded(annotation['bbox'])}, its mask [{shown}]{hint}"
        report.add("box off its mask", f"{name} {what}", "repaired")
        annotation["bbox"] = [found[0], found[1], found[2] - found[0], found[3] - found[1]]
    elif max(-x, -y, x + w - width, y + h - height) > 1:
        what = f"has bbox {_rounded(annotation['bbox'])} in an image of {height} x {width} px"
        report.add("box outside", f"{name} {what}", "repaired")
        annotation["bbox"] = [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]


def _extent(segmentation: Any, size: Size) -> tuple[float, float, float, float] | None:
    """Box xyxy of a mask inside the image, or None where nothing of it is there."""
    if isinstance(segmentation, dict):
        x, y, w, h = coco_mask.toBbox(mask_of(segmentation, size)).tolist()
        box = (x, y, x + w, y + h)
    else:
        xs = [(min(polygon[::2]), max(polygon[::2])) for polygon in segmentation]
        ys = [(min(polygon[1::2]), max(polygon[1::2])) for polygon in segmentation]
        corners = (min(xs)[0], min(ys)[0], max(x for _, x in xs), max(y for _, y in ys))
        box = _within(corners, size)
    return box if box[2] > box[0] and box[3] > box[1] else None


def _within(box: tuple[float, float, float, float], size: Size) -> tuple[float, float, float, float]:
    height, width = size
    x1, y1, x2, y2 = box
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)


def _far_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes overlap by less than half and some side is off by more than two pixels."""
    if all(abs(a - b) <= 2 for a, b in zip(one, other, strict=True)):
        return False
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    inter = max(width, 0) * max(height, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - inter
    return inter < 0.5 * union


def _identity(annotation: Mapping[str, Any]) -> Any:
    """Equal for annotations that say the same."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        mask: Any = counts if isinstance(counts, str) else tuple(counts)
    else:
        mask = tuple(polygon.tobytes() if isinstance(polygon, array) else tuple(polygon) for polygon in segmentation)
    return annotation["category_id"], tuple(annotation["bbox"]), mask, annotation.get("iscrowd", 0)


def _rounded(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def _name(annotation: Mapping[str, Any], names: Mapping[int, str]) -> str:
    image = annotation.get("image_id")
    file = names.get(image) if type(image) is int else None
    if TRACK in annotation:
        return f"annotation {annotation[TRACK]} (frame '{file}')"
    key = str(annotation["id"])[:60]
    return f"annotation {key}" if file is None else f"annotation {key} (image {image}, '{file}')"


def _apart(group: Sequence[Path], key: Any) -> list[list[Path]]:
    """The parts of a group, of two files or more, that agree in `key`."""
    parts: dict[Any, list[Path]] = defaultdict(list)
    for path in group:
        parts[key(path)].append(path)
    return [part for part in parts.values() if len(part) > 1]


def _size_of(path: Path) -> int:
    return path.stat().st_size


def _ends_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        head = file.read(2048)
        file.seek(max(0, path.stat().st_size - 2048))
        return head + file.read()


def _hash_of(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def as_json(value: Any) -> Any:
    """What `json` does not know in a clean file: packed polygons; whole numbers are written as such."""
    assert isinstance(value, array)
    return [int(number) if number.is_integer() and math.fabs(number) < 1e15 else number for number in value]
