"""`python -m onestage.explore DATA --results FILE`: a page of what a model gets wrong, the worst first."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from onestage.cli.app import guard, set_up_log
from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from onestage.data.coco import CocoDataset
    from onestage.draw import Instances
    from onestage.engine.failures import Failures, Objects, Rules

PROGRAM = "python -m onestage.explore"
MAX_CARDS = 300  # pictures are inside the page: so many make about ten megabytes
MAX_SHOWN = 5  # detections around an object that was missed
CROP_WIDTH = 240  # px of one picture
MARGIN = 0.25  # of a crop's longer side, on each side of what it shows
LEAST_CROP = 48  # px

logger = logging.getLogger("onestage")


@dataclass(frozen=True, kw_only=True)
class Explore(Talk):
    """Shows what a model gets wrong: missed objects, false detections, masks that do not fit their boxes.

    Writes one page (index.html, with everything in it) and explore.json. Takes the results.json of `eval` or any COCO
    results file; with --weights it looks for objects itself. Nothing leaves this machine.
    """

    data: Positional[Path | None] = None  # folder in one of the layouts, its validation split; default: COCO_ROOT
    val_json: Path | None = None  # with --val-images, in place of DATA
    val_images: Path | None = None
    results: Path | None = None  # COCO results, as `eval` writes them
    weights: Path | None = None  # in place of --results: .safetensors or last.ckpt
    score_thr: float = 0.3  # detections below this score are left out
    iou_thr: float = 0.5  # from this IoU on a detection covers an object
    background_thr: float = 0.1  # below this IoU a detection has nothing to do with an object
    gap: float = 0.2  # between box IoU and mask IoU, from which on one is poor beside the other
    top: int = 8  # pictures of each kind of error
    per_category: int = 2  # further pictures of each kind and category, as long as there is room
    limit: int | None = None  # use the first N images only
    max_pixels: float = 100e6  # refuse larger images, height * width
    device: str = "auto"  # with --weights: auto, cpu, cuda, cuda:1
    output: Path | None = None  # run folder, default runs/onestage/explore/<time>
    overwrite: Switch = False  # write into an --output that is not empty


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 done, 2 usage, 3 the data or the results cannot be used, 4 the weights cannot, 5 the machine cannot.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(words, lambda: _explore(parse_flags(Explore, words, PROGRAM), words))


def _explore(flags: Explore, words: Sequence[str]) -> int:
    _check(flags)
    # The imports are here so that --help does not wait for torch.
    from onestage.cli.runs import open_run
    from onestage.data.coco import CocoDataset, locate
    from onestage.engine.failures import Rules, count, find_failures, listed
    from onestage.files import write_atomically

    set_up_log(words, "onestage")
    split = locate(flags.data, "val", json=flags.val_json, images=flags.val_images)
    dataset = CocoDataset(split.json, split.images, max_pixels=flags.max_pixels)
    if len(dataset) == 0:
        raise DatasetError(f"dataset '{split.json}' has no images", "check its images")
    results = None if flags.results is None else _read_results(flags.results, dataset)
    if flags.limit is not None:
        dataset = dataset.subset(range(min(flags.limit, len(dataset))))
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(flags).items()}
    record = {"package": "onestage", "verb": "explore", "flags": settings}
    with open_run("onestage", "explore", record, output=flags.output, overwrite=flags.overwrite) as run:
        source = str(flags.results or flags.weights)
        if results is None:
            results = _search(flags, dataset)
            write_atomically(run.folder / "results.json", json.dumps(results).encode())
        ids = set(dataset.image_ids)
        positions = [number for number, entry in enumerate(results) if entry["image_id"] in ids]
        masks = all("segmentation" in entry for entry in results)
        if not masks:
            logger.info("not every detection has a mask: boxes are matched, and masks not looked at")
        rules = Rules(flags.score_thr, flags.iou_thr, flags.background_thr, flags.gap, masks)
        failures = find_failures(dataset.coco_gt(), [results[number] for number in positions], rules)
        counts, lists = count(failures), listed(failures)
        cards = _draw_cards(_choose(lists, flags.top, flags.per_category), failures, dataset)
        page = run.folder / "index.html"
        write_atomically(page, _render(source, str(split.json), dataset, rules, counts, lists, cards).encode())
        about = {
            "data": str(split.json),
            "images": len(dataset),
            "results": source,
            "rules": asdict(rules),
            "matching": rules.matching(),
            "definitions": rules.definitions(),
        }
        content = about | {"counts": _named(counts, dataset), "errors": _plain(lists, dataset, positions)}
        write_atomically(run.folder / "explore.json", json.dumps(content).encode())
        total = counts["all"]
        kinds = ", ".join(f"{total[kind]} {kind}" for kind in rules.definitions())
        logger.info("%d of %d objects found; %s", total["found"], total["objects"], kinds)
        logger.info("page: %s", page.resolve())
        if flags.json:
            print(json.dumps({**total, "page": str(page), "run": str(run.folder), "seconds": round(run.seconds, 1)}))
    return 0


def _check(flags: Explore) -> None:
    """What can be told without looking at any file."""
    if (flags.results is None) == (flags.weights is None):
        raise UsageError(
            "--results and --weights are both given" if flags.results else "neither --results nor --weights is given",
            f"{PROGRAM} DATA --results results.json",
        )
    if flags.data is None and flags.val_json is None and not os.environ.get("COCO_ROOT"):
        raise UsageError("no DATA, and COCO_ROOT is not set", f"{PROGRAM} DATA --results results.json")
    if not 0 < flags.background_thr <= flags.iou_thr <= 1:
        raise UsageError(
            f"--background-thr is {flags.background_thr:g}, --iou-thr {flags.iou_thr:g}",
            "give numbers with 0 < background-thr <= iou-thr <= 1",
        )
    if not 0 < flags.gap <= 1:
        raise UsageError(f"--gap is {flags.gap:g}", "give a difference of IoUs, above 0 and at most 1")


def _read_results(path: Path, dataset: CocoDataset) -> list[dict[str, Any]]:
    from onestage.data.validate import read_json
    from onestage.engine.coco_eval import check_results

    content = read_json(path)
    entries = content if isinstance(content, list) else []
    if any(isinstance(entry, dict) and "video_id" in entry for entry in entries[:1]):
        raise DatasetError(f"results '{path}' are of videos; explore looks at images", "give results of images")
    masks = all(isinstance(entry, dict) and "segmentation" in entry for entry in entries)
    return check_results(content, dataset.coco_gt(), ("segm",) if masks else ("bbox",), f"results '{path}'")


def _search(flags: Explore, dataset: CocoDataset) -> list[dict[str, Any]]:
    """What the weights find in the images, as COCO results."""
    from onestage.engine.evaluate import evaluate
    from onestage.engine.predict import Predictor

    assert flags.weights is not None
    predictor = Predictor.from_weights(flags.weights, device=flags.device, score_threshold=flags.score_thr)
    progress = not flags.quiet
    return evaluate(predictor.model, dataset, categories=predictor.categories, progress=progress)[1]


@dataclass(frozen=True)
class _Card:
    """One error with pictures: its kind, its place in the kind's list, its entry; `further` comes after the worst."""

    kind: str
    place: int
    entry: Mapping[str, Any]
    further: bool


def _choose(lists: Mapping[str, Sequence[Mapping[str, Any]]], top: int, per_category: int) -> list[_Card]:
    """The worst of each kind, then the worst of each kind and category, turn about, up to MAX_CARDS."""
    worst: list[_Card] = []
    further: list[tuple[int, _Card]] = []
    for kind, entries in lists.items():
        seen: Counter[int] = Counter()
        for place, entry in enumerate(entries):
            if place < top:
                worst.append(_Card(kind, place, entry, False))
            elif seen[entry["category_id"]] < per_category:
                further.append((seen[entry["category_id"]], _Card(kind, place, entry, True)))
                seen[entry["category_id"]] += 1
    further.sort(key=lambda pair: pair[0])
    return [*worst, *(card for _, card in further)][:MAX_CARDS]


def _draw_cards(cards: Sequence[_Card], failures: Failures, dataset: CocoDataset) -> dict[str, list[dict[str, Any]]]:
    """Of each kind the cards in order, as the template shows them; every image is read once."""
    by_image = defaultdict(list)
    for card in cards:
        by_image[card.entry["image_id"]].append(card)
    index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    names = dict(dataset.categories)
    drawn: dict[str, list[dict[str, Any]]] = {kind: [] for kind in failures.rules.definitions()}
    for image_id, group in by_image.items():
        index = index_of[image_id]
        image = dataset.image(index)
        for card in group:
            truth, found = _pictures(card, image, failures, dataset)
            text, numbers = _caption(card.kind, card.entry, names)
            view = {"place": card.place, "further": card.further, "text": text, "numbers": numbers}
            view |= {"truth": truth, "found": found, "image": f"{image_id}, {dataset.path(index).name}"}
            drawn[card.kind].append(view | {"category": names[card.entry["category_id"]]})
    return {kind: sorted(views, key=lambda view: view["place"]) for kind, views in drawn.items()}


def _caption(kind: str, entry: Mapping[str, Any], names: Mapping[int, str]) -> tuple[str, list[tuple[str, str]]]:
    """What a card says: the categories, and the numbers."""
    text = names[entry["category_id"]]
    numbers: list[tuple[str, str]] = []
    if entry["object_category_id"] not in (None, entry["category_id"]):
        text += f", in truth {names[entry['object_category_id']]}"
    if entry.get("found_at") is not None:
        text += f", found at score {entry['found_at']:.2f} only"
    if entry["score"] is not None:
        nearest = f"nearest: {names[entry['detection_category_id']]}" if kind == "missed" else "score"
        numbers.append((nearest, f"{entry['score']:.2f}"))
    if entry["annotation"] is not None and entry["detection"] is not None:
        overlaps = [key for key in ("box_iou", "mask_iou") if key in entry]
        numbers += [(key.replace("_iou", " IoU"), f"{entry[key]:.2f}") for key in overlaps]
    return text, [*numbers, ("area", f"{entry['area']:,.0f} px, {entry['size']}")]


def _pictures(card: _Card, image: Any, failures: Failures, dataset: CocoDataset) -> tuple[str, str]:
    """Truth and detections in the same crop, as data URIs."""
    from onestage.draw import data_uri, draw

    truth, found, entry = failures.truth, failures.found, card.entry
    things = [] if entry["object"] is None else [entry["object"]]
    detections = [] if entry["detection"] is None else [entry["detection"]]
    if card.kind == "duplicate":  # beside the better one
        shown = (failures.matched == entry["object"]) & (found.scores >= failures.rules.score)
        detections += shown.nonzero()[0].tolist()
    window = _window([*(truth.boxes[i] for i in things), *(found.boxes[i] for i in detections)], image.shape[-2:])
    here = entry["image_id"]
    if not things:
        things = [i for i in (truth.images == here).nonzero()[0].tolist() if _meets(truth.boxes[i], window)]
    if card.kind == "missed":
        near = ((found.images == here) & (found.scores >= failures.rules.score)).nonzero()[0]
        near = near[(-found.scores[near]).argsort(kind="stable")].tolist()
        detections = [i for i in near if _meets(found.boxes[i], window)][:MAX_SHOWN]
    x0, y0, x1, y1 = window
    names = [name for _, name in dataset.categories]
    left, right = (
        data_uri(draw(image[:, y0:y1, x0:x1], instances, names, width=CROP_WIDTH, boxes=True))
        for instances in (
            _instances(truth, things, window, dataset, scores=False),
            _instances(found, detections, window, dataset, scores=True),
        )
    )
    return left, right


def _window(boxes: Iterable[Any], size: Sequence[int]) -> tuple[int, int, int, int]:
    """A square around the boxes (x, y, width, height), with a margin, moved into the image as far as it fits."""
    boxes = list(boxes)
    x0, y0 = min(box[0] for box in boxes), min(box[1] for box in boxes)
    x1, y1 = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    side = max((1 + 2 * MARGIN) * max(x1 - x0, y1 - y0), LEAST_CROP)
    ends = []
    for low, high, length in ((x0, x1, size[1]), (y0, y1, size[0])):
        start = min(max((low + high - side) / 2, 0), max(length - side, 0))
        first = int(min(start, length - 1))
        ends.append((first, max(int(min(start + side, length)), first + 1)))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def _meets(box: Any, window: tuple[int, int, int, int]) -> bool:
    x, y, width, height = box
    return bool(x < window[2] and y < window[3] and x + width > window[0] and y + height > window[1])


def _instances(
    things: Objects, chosen: Sequence[int], window: tuple[int, int, int, int], dataset: CocoDataset, *, scores: bool
) -> Instances:
    """What is drawn of objects or detections, in the pixels of the window."""
    import numpy as np
    import torch
    from pycocotools import mask as coco_mask

    from onestage.draw import Instances

    x0, y0, x1, y1 = window
    label_of = {key: label for label, (key, _) in enumerate(dataset.categories)}
    boxes = things.boxes[list(chosen)].reshape(-1, 4)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1) - [x0, y0, x0, y0]
    masks = np.zeros((len(boxes), y1 - y0, x1 - x0), dtype=bool)
    if things.rles is not None:
        for row, index in enumerate(chosen):
            masks[row] = coco_mask.decode(things.rles[index])[y0:y1, x0:x1]
    return Instances(
        torch.from_numpy(corners),
        torch.tensor([label_of[int(things.categories[i])] for i in chosen], dtype=torch.int64),
        torch.from_numpy(masks),
        torch.from_numpy(things.scores[list(chosen)]) if scores else None,
    )


def _render(
    source: str,
    data: str,
    dataset: CocoDataset,
    rules: Rules,
    counts: Mapping[str, Any],
    lists: Mapping[str, Sequence[Any]],
    cards: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    from onestage.draw import colour_of, template
    from onestage.engine.failures import FALSE_POSITIVES, MISSED, POOR_BOX, POOR_MASK, SIZES

    total, names = counts["all"], dict(dataset.categories)
    kinds = rules.definitions()
    columns = [("objects", "objects"), ("found", "found"), (MISSED, "missed"), ("untouched", "nothing near")]
    columns += [(kind, kind) for kind in FALSE_POSITIVES]
    columns += [(kind, kind.partition(", ")[2]) for kind in (POOR_MASK, POOR_BOX) if kind in kinds]
    columns += [(f"{kind}_iou", f"{kind} IoU") for kind in ("box", "mask") if f"{kind}_iou" in total]

    def row_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = ("-" if v is None else f"{v:.2f}" if type(v) is float else f"{v}" for v in (row[k] for k, _ in columns))
        return {"name": name, "cells": list(texts)}

    most_wrong = sorted(counts["categories"].items(), key=lambda pair: -sum(pair[1][kind] for kind in kinds))
    everything = row_of("all", total)
    return template("onestage", "explore.html").render(
        data=data,
        source=source,
        num_images=len(dataset),
        tiles=[
            ("images", f"{len(dataset):,}"),
            ("objects", f"{total['objects']:,}"),
            ("found", f"{total['found']:,}"),
            ("missed", f"{total[MISSED]:,}"),
            ("false detections", f"{sum(total[kind] for kind in FALSE_POSITIVES):,}"),
        ],
        kinds=[
            {
                "name": kind,
                "anchor": kind.replace(", ", "-").replace(" ", "-"),
                "count": len(lists[kind]),
                "definition": definition,
                "worst": [card for card in cards[kind] if not card["further"]],
                "further": _grouped(card for card in cards[kind] if card["further"]),
            }
            for kind, definition in kinds.items()
        ],
        matching=rules.matching(),
        background=rules.background,
        columns=[title for _, title in columns],
        by_category=[*(row_of(names[key], row) for key, row in most_wrong), everything],
        by_size=[*(row_of(size, counts["sizes"][size]) for size in SIZES), everything],
        legend=[(name, "rgb({}, {}, {})".format(*colour_of(k))) for k, name in enumerate(names.values())][:24],
        num_categories=len(names),
    )


def _grouped(cards: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    groups = defaultdict(list)
    for card in cards:
        groups[card["category"]].append(card)
    return sorted(groups.items())


def _named(counts: Mapping[str, Any], dataset: CocoDataset) -> dict[str, Any]:
    names = dict(dataset.categories)
    rows = [{"id": key, "name": names[key], **row} for key, row in counts["categories"].items()]
    return {**counts, "categories": rows}


def _plain(
    lists: Mapping[str, Sequence[Mapping[str, Any]]], dataset: CocoDataset, positions: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """The lists with file names, and with positions in the results file."""
    files = {image_id: dataset.path(index).name for index, image_id in enumerate(dataset.image_ids)}

    def plain(entry: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in entry.items() if name != "object"}
        at = entry["detection"]
        return {**kept, "file": files[entry["image_id"]], "detection": None if at is None else positions[at]}

    return {kind: [plain(entry) for entry in entries] for kind, entries in lists.items()}


if __name__ == "__main__":
    sys.exit(main())
