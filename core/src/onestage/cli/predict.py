"""`predict`: instances in images and in the frames of videos, as pictures, COCO JSON and mask files."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from onestage.cli.app import config_record
from onestage.cli.flags import Call
from onestage.cli.runs import open_run
from onestage.cli.show import show, viewer
from onestage.data.coco import read_image
from onestage.data.frames import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    DrawnFrames,
    FrameSource,
    is_camera,
    is_image,
    open_source,
)
from onestage.engine.checkpoint import DECODE
from onestage.engine.predict import Predictor, Result
from onestage.engine.signals import Signals
from onestage.errors import DatasetError, UsageError, some
from onestage.files import write_atomically
from onestage.method import Method

logger = logging.getLogger("onestage")
WRITE_EVERY = 100  # images
# Flags that mean the same in tracking.
TRACKED = (
    *("weights", "score_thr", "max_dets", "stride", "limit", "max_pixels", "output", "overwrite", "device"),
    *("precision", "dry_run", "json", "quiet", "verbose"),
)


@dataclass(frozen=True)
class Source:
    """An image to look at: its file, and the name (without suffix) that what is written about it gets."""

    path: Path
    name: str


def run(method: Method, call: Call) -> dict[str, Any]:
    """Predicts and writes; returns what `--json` prints."""
    flags = call.flags
    if flags.weights is None:
        raise UsageError("--weights is missing", f"python -m {method.name}.predict IMAGE --weights best.safetensors")
    if flags.show:
        viewer()  # tells before anything is computed that there is none
    if flags.track:
        return _track(method, call)
    if len(flags.source) == 1 and is_video(flags.source[0]):
        return _run_video(method, call, flags.source[0])
    if "video" in flags.save:
        raise UsageError("--save video is for a video or a camera", "leave it away; --save image draws on images")
    _check_shown(flags, flags.save)
    sources = _share(find_sources(flags.source), flags)
    _check_apart(sources, flags.output)
    predictor = _predictor(method, flags)
    wanted = _labels(predictor.categories, flags.classes)
    if flags.dry_run:
        return {"dry_run": True, "images": len(sources)}
    keep, record = flags.skip_existing or flags.shard != "0/1", config_record(method, call)
    with open_run(method.name, "predict", record, output=flags.output, overwrite=flags.overwrite, keep=keep) as run:
        book = None
        if "json" in flags.save:
            book = _Book(run.folder / _json_name(flags.shard), predictor.categories, flags.mask_format == "polygon")
        todo = sources
        if flags.skip_existing:
            if book is not None:
                book.take_over()
            todo = [source for source in sources if not _is_done(source, run.folder, book, flags)]
        if keep:
            run.describe()
        bad: list[str] = []
        drawn: list[Path] = []
        num_images = num_instances = 0
        pace = 0.1 if sys.stderr.isatty() else 20  # seconds between updates of the bar: a log wants few
        bar = tqdm(todo, "predict", unit="image", disable=flags.quiet, leave=False, mininterval=pace)
        with bar, Signals() as signals:
            try:
                for source in bar:
                    if signals.number is not None:
                        break
                    try:
                        image = read_image(source.path, max_pixels=flags.max_pixels)
                    except DatasetError as error:
                        if len(sources) == 1:
                            raise
                        logger.warning("%s", error.what)
                        bad.append(str(source.path))
                        continue
                    result = _chosen(predictor(image), wanted)
                    if "image" in flags.save:
                        drawn.append(run.folder / "images" / f"{source.name}.jpg")
                        _save_picture(drawn[-1], image, result)
                    if _saves_masks(flags):
                        _save_masks(run.folder / "masks", source.name, result)
                    if book is not None:
                        book.add(source, image, result)
                    num_images, num_instances = num_images + 1, num_instances + len(result)
            finally:
                if book is not None:
                    book.write()
        logger.info("%d instances in %d images: %s", num_instances, num_images, run.folder)
        if signals.number is not None and num_images + len(bad) < len(todo):
            logger.info("stopped by signal %d; the same command with --skip-existing goes on", signals.number)
            raise SystemExit(128 + signals.number)
        if flags.show:
            show(drawn)
        if bad:
            raise DatasetError(
                f"{len(bad)} of {len(sources)} images could not be read: {some(bad)}",
                f"replace them; the others are done and in {run.folder}",
            )
        return {
            "images": len(todo),
            "skipped": len(sources) - len(todo),
            "instances": num_instances,
            "json": None if book is None else str(book.path),
            "run": str(run.folder),
        }


def _track(method: Method, call: Call) -> dict[str, Any]:
    """The method's own verb `track`, with the flags that it shares."""
    flags = call.flags
    if method.track is None:
        raise UsageError(
            f"--track: {method.name} finds instances image by image, and cannot follow objects",
            "leave --track away: each frame of a video is looked at by itself",
        )
    useless = sorted(call.given - {*TRACKED, "track", "show", "config"})
    if useless:
        raise UsageError(
            f"--track has no use for --{useless[0].replace('_', '-')}",
            f"leave it away, or see: python -m {method.name}.track --help",
        )
    if len(flags.source) > 1:
        raise UsageError(f"--track follows objects through one video, and {len(flags.source)} are named", "name one")
    settings = {name: getattr(flags, name) for name in TRACKED}
    result = method.track(source=flags.source[0] if flags.source else None, **settings)
    if flags.show and "run" in result:
        video = Path(result["run"], "tracked.mp4")
        show([video if video.is_file() else video.with_name("frames")])
    return result


def _check_shown(flags: Any, save: Sequence[str]) -> None:
    if flags.show and not {"image", "video"} & {*save}:
        raise UsageError("--show opens pictures, and --save leaves them out", "add image to --save")


def _run_video(method: Method, call: Call, word: str) -> dict[str, Any]:
    """The same for the frames of a video or a camera, one after the other: memory does not grow with their number."""
    flags = call.flags
    if flags.shard != "0/1" or flags.skip_existing:
        raise UsageError("--shard and --skip-existing are for images", f"name '{word}' alone, or a folder of frames")
    save = flags.save if "save" in call.given else ("video", "json")
    _check_shown(flags, save)
    source = open_source(word, package=method.name, max_pixels=flags.max_pixels)
    predictor = _predictor(method, flags)
    wanted = _labels(predictor.categories, flags.classes)
    if flags.dry_run:
        return {"dry_run": True, "frames": source.num_frames}
    with open_run(
        method.name, "predict", config_record(method, call), output=flags.output, overwrite=flags.overwrite
    ) as run:
        result = _predict_frames(source, predictor, wanted, save, flags, run.folder)
        if result["interrupted"]:
            raise SystemExit(result["interrupted"])
        if flags.show:
            video = run.folder / "predicted.mp4"
            frames = run.folder / ("frames" if "video" in save else "images")
            show([video if video.is_file() else frames])
        return result | {"run": str(run.folder)}


def _predict_frames(
    source: FrameSource, predictor: Predictor, wanted: Tensor | None, save: Sequence[str], flags: Any, folder: Path
) -> dict[str, Any]:
    """To the end, or until told to stop; what was found until then is complete on disk either way."""
    drawn = DrawnFrames(folder / "predicted.mp4", source, stride=flags.stride) if "video" in save else None
    path = folder / "predictions.jsonl"
    bar = source.bar("predict", stride=flags.stride, limit=flags.limit, quiet=flags.quiet)
    num_frames = num_instances = 0  # a bar that is not shown does not count
    with open(path if "json" in save else os.devnull, "w", encoding="utf-8") as lines, bar, Signals() as signals:
        try:
            last = None if flags.limit is None else flags.limit * flags.stride
            for number, image in enumerate(islice(source, 0, last, flags.stride)):
                result = _chosen(predictor(image), wanted)
                frame = number * flags.stride
                name = f"{frame:06d}"
                if "json" in save:
                    entries = _entries(result, frame, polygons=flags.mask_format == "polygon")
                    lines.write(json.dumps({"frame": frame, "annotations": entries}) + "\n")
                if drawn is not None:
                    drawn.add(frame, result.draw(image))
                if "image" in save:
                    _save_picture(folder / "images" / f"{name}.jpg", image, result)
                if "masks" in save or flags.mask_format == "png":
                    _save_masks(folder / "masks", name, result)
                num_frames, num_instances = num_frames + 1, num_instances + len(result)
                bar.update()
                if signals.number is not None:
                    logger.info("stopped by signal %d; everything up to that frame is kept", signals.number)
                    break
        finally:
            if drawn is not None:
                drawn.close()
    logger.info("%d instances in %d frames: %s", num_instances, num_frames, folder)
    return {
        "frames": num_frames,
        "instances": num_instances,
        "json": str(path) if "json" in save else None,
        "interrupted": None if signals.number is None else 128 + signals.number,
    }


def _chosen(result: Result, wanted: Tensor | None) -> Result:
    """What has one of the wanted labels; None: all."""
    return result if wanted is None else result[torch.isin(result.labels, wanted)]


def _entries(result: Result, image_id: int, *, polygons: bool) -> list[dict[str, Any]]:
    """Annotations in COCO format, with scores, but for their ids."""
    found = result.to_coco(image_id)
    if result.masks is None:
        return [{**entry, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0} for entry in found]
    areas = result.masks.area().tolist()
    entries = [{**entry, "area": area, "iscrowd": 0} for entry, area in zip(found, areas, strict=True)]
    if polygons:
        for entry, outlines in zip(entries, result.masks.to_polygons(), strict=True):
            entry["segmentation"] = outlines or entry["segmentation"]  # of an empty mask; no polygon is no COCO
    return entries


def is_video(word: str) -> bool:
    """Whether a SOURCE is a video or the number of a camera."""
    return is_camera(word) or (Path(word).suffix.lower() in VIDEO_SUFFIXES and not Path(word).is_dir())


def _predictor(method: Method, flags: Any) -> Predictor:
    """Of a weights file, or of a folder that `export` wrote."""
    limits = {"method": method, "score_threshold": flags.score_thr, "max_detections": flags.max_dets}
    if not (flags.weights / DECODE).is_file():
        return Predictor.from_weights(flags.weights, device=flags.device, precision=flags.precision, **limits)
    if flags.precision != "fp32":
        raise UsageError(f"--precision {flags.precision} is not for exported networks", "leave it away")
    return Predictor.from_export(flags.weights, device="cpu" if flags.device == "auto" else flags.device, **limits)


def find_sources(words: Sequence[str]) -> list[Source]:
    """The images that files, folders, patterns and `-` (a list on stdin) name, in order, each once.

    Raises:
        UsageError: nothing named, something that is not there, or a video among others.
    """
    if not words:
        raise UsageError("no SOURCE", "name image files, a folder, a pattern in quotes, or - for a list on stdin")
    sources: list[Source] = []
    names: set[str] = set()
    seen: set[str] = set()
    for path, name in _expand(words):
        place = os.path.abspath(path)
        if place in seen:
            continue
        seen.add(place)
        stem = name.with_suffix("").as_posix()
        if stem in names:  # a.jpg and a.png, or the same name from two folders
            stem = next(s for s in (f"{stem}-{number}" for number in range(2, 10**9)) if s not in names)
        names.add(stem)
        sources.append(Source(path, stem))
    return sources


def _expand(words: Iterable[str]) -> Iterable[tuple[Path, Path]]:
    """(file, name relative to what named it) of every image."""
    for word in words:
        path = Path(word)
        if word == "-":
            yield from _expand(line.strip() for line in sys.stdin if line.strip())
        elif path.is_dir():
            files = sorted(_images_in(path))
            if not files:
                raise UsageError(f"SOURCE '{word}' has no images", f"it may hold {some(sorted(IMAGE_SUFFIXES), 12)}")
            yield from ((file, file.relative_to(path)) for file in files)
        elif is_video(word):
            raise UsageError(f"SOURCE '{word}' is a video, and not the only SOURCE", "name it alone")
        elif path.is_file():
            yield path, Path(path.name)
        elif any(sign in word for sign in "*?["):
            matches = sorted(Path(match) for match in glob.glob(word, recursive=True))
            files = [match for match in matches if is_image(match)]
            if not files:
                raise UsageError(f"SOURCE '{word}' matches no image", "check the pattern, and quote it")
            yield from ((file, Path(file.name)) for file in files)
        else:
            raise UsageError(f"SOURCE '{word}' does not exist", "name an image, a folder, or a pattern in quotes")


def _images_in(folder: Path) -> Iterator[Path]:
    """The images of a folder and of those in it, links too, but nothing hidden; each folder is looked at once."""
    looked_at = {folder.resolve()}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        for name in list(folders):
            inner = Path(place, name).resolve()
            if inner in looked_at:
                folders.remove(name)
            looked_at.add(inner)
        yield from (file for file in map(Path(place).joinpath, files) if is_image(file))


def _share(sources: list[Source], flags: Any) -> list[Source]:
    """What --stride, --limit and --shard leave of the sources, in this order: shards share what a call without has."""
    index, _, count = flags.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard is '{flags.shard}'; expected I/N with I from 0 to N-1", "as in --shard 0/4")
    return sources[:: flags.stride][: flags.limit][int(index) :: int(count)]


def _check_apart(sources: Sequence[Source], output: Path | None) -> None:
    """Refuses sources that lie where pictures are drawn to: the first run would replace them, and lose them."""
    drawn = [] if output is None else [(output / name).resolve() for name in ("images", "masks")]
    for source in sources:
        if any(source.path.resolve().is_relative_to(folder) for folder in drawn):
            raise UsageError(
                f"source '{source.path}' lies where --output '{output}' gets its pictures", "name another --output"
            )


def _labels(categories: Sequence[tuple[int, str]], names: Sequence[str]) -> Tensor | None:
    """Labels of the categories to keep; None keeps all."""
    known = [name for _, name in categories]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--classes: the weights do not know {some(unknown)}", f"they know {some(known, 20)}")
    return torch.tensor([label for label, name in enumerate(known) if name in names]) if names else None


def _json_name(shard: str) -> str:
    return "predictions.json" if shard == "0/1" else f"predictions-{shard.replace('/', '-of-')}.json"


def _saves_masks(flags: Any) -> bool:
    return "masks" in flags.save or flags.mask_format == "png"


def _is_done(source: Source, folder: Path, book: _Book | None, flags: Any) -> bool:
    """Whether everything that --save writes of the image is there."""
    done = []
    if book is not None:
        done.append(source.path.as_posix() in book.files)
    if "image" in flags.save:
        done.append((folder / "images" / f"{source.name}.jpg").is_file())
    if _saves_masks(flags):
        done.append(_has_masks(folder / "masks" / source.name))
    return bool(done) and all(done)


def _has_masks(target: Path) -> bool:
    """Whether an image's folder is there; of one without instances it is empty."""
    inside = list(target.iterdir()) if target.is_dir() else [target]
    return not inside or any(path.is_file() for path in inside)


class _Book:
    """Collects predictions as a data set in COCO format whose annotations carry scores.

    Now and then it is written, so that little is lost with the process: after each WRITE_EVERY images, and after a
    tenth more than are written, which keeps writing cheap however many there are.
    """

    def __init__(self, path: Path, categories: Sequence[tuple[int, str]], polygons: bool):
        self.path = path
        self.polygons = polygons
        self.num_written = 0  # images
        self.files: set[str] = set()
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "categories": [{"id": number, "name": name} for number, name in categories],
            "annotations": [],
        }

    def take_over(self) -> None:
        """Starts from what an earlier run wrote."""
        if not self.path.is_file():
            return
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if known["categories"] != self.content["categories"]:
                raise ValueError("its categories are others")
            self.content = {key: known[key] for key in self.content}
            self.files = {entry["file_name"] for entry in self.content["images"]}
            self.num_written = len(self.files)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"'{self.path}' is not what predict wrote with these weights: {error}", "remove it, or --overwrite"
            ) from None

    def add(self, source: Source, image: Tensor, result: Result) -> None:
        """Takes what was found in an image, unless it is known already."""
        if source.path.as_posix() in self.files:  # only its picture or its masks were missing
            return
        images, annotations = self.content["images"], self.content["annotations"]
        image_id = len(images) + 1
        height, width = image.shape[-2:]
        images.append({"id": image_id, "file_name": source.path.as_posix(), "height": height, "width": width})
        self.files.add(source.path.as_posix())
        for entry in _entries(result, image_id, polygons=self.polygons):
            annotations.append({"id": len(annotations) + 1, **entry})
        if len(images) - self.num_written >= max(WRITE_EVERY, self.num_written // 10):
            self.write()

    def write(self) -> None:
        write_atomically(self.path, json.dumps(self.content).encode())
        self.num_written = len(self.content["images"])


def _save_picture(path: Path, image: Tensor, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    to_pil_image(result.draw(image)).save(part, format="JPEG", quality=92)
    part.replace(path)


def _part(path: Path) -> Path:
    """Where something is made until it is whole: --skip-existing takes what is there for done.

    Not named like it, whose name may be as long as names can be.
    """
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part")


def _save_masks(folder: Path, name: str, result: Result) -> None:
    """One black-and-white PNG for each instance: `<image>/<number>-<category>-<score>.png`."""
    if result.masks is None:
        raise UsageError("the model finds boxes and no masks", "leave masks and png away")
    target = folder / name
    part = _part(target)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for index, mask in enumerate(result.masks.to_bool()):
        category = "".join(c if c.isalnum() else "_" for c in result.names[index])
        file = part / f"{index:03d}-{category}-{float(result.scores[index]):.2f}.png"
        to_pil_image(mask.to(torch.uint8)[None] * 255).save(file)
    if not target.exists():
        part.replace(target)
        return
    for file in part.iterdir():  # made before, or it holds the masks of a folder of images that has the image's name
        file.replace(target / file.name)
    part.rmdir()
