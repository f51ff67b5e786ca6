"""What a model gets wrong, object by object: missed, doubled, misplaced, of another category, mask and box at odds.

Objects and detections are matched as COCO's evaluation matches them at one IoU; every detection without an object of
its own then gets one kind of error, after Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020. All IoUs are pycocotools'. G objects, D detections, P pairs of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from onestage.data.validate import mask_of
from onestage.engine.coco_eval import is_box, ranked_for

MISSED, WRONG_CLASS, DUPLICATE, MISPLACED, BOTH, BACKGROUND, POOR_MASK, POOR_BOX = KINDS = (
    "missed",
    "wrong class",
    "duplicate",
    "poor localisation",
    "wrong class and place",
    "background",
    "good box, poor mask",
    "good mask, poor box",
)
FALSE_POSITIVES = (WRONG_CLASS, DUPLICATE, MISPLACED, BOTH, BACKGROUND)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}  # COCO's, px
MAX_DETECTIONS = 100  # of an image and category that COCO's evaluation looks at


@dataclass(frozen=True)
class Rules:
    """Where errors begin.

    Args:
        score: Detections below it are left out.
        iou: From here on a detection covers an object.
        background: Below it a detection has nothing to do with an object.
        gap: Between box IoU and mask IoU, from which on one of them is poor beside the other.
        masks: Match by mask IoU; by box IoU otherwise.
    """

    score: float = 0.3
    iou: float = 0.5
    background: float = 0.1
    gap: float = 0.2
    masks: bool = True

    @property
    def iou_kind(self) -> str:
        """Which IoU decides, mask or box."""
        return "mask" if self.masks else "box"

    def definitions(self) -> dict[str, str]:
        """What each kind of error is, and the order of its list, as a reader is told."""
        cover, near = f"{self.iou:g} or more", f"{self.background:g} or more, but by less than {self.iou:g}"
        texts = {
            MISSED: "No detection is matched with the object. The largest first. Score and IoUs are those of the "
            f"detection with the highest {self.iou_kind} IoU, whatever its category.",
            WRONG_CLASS: f"It covers an object of another category ({self.iou_kind} IoU of {cover}).",
            DUPLICATE: f"It covers an object of its category ({cover}) that a better scored one is matched with.",
            MISPLACED: f"It overlaps an object of its category by {near}.",
            BOTH: f"It overlaps an object of another category by {near}.",
            BACKGROUND: f"It overlaps no object by {self.background:g}.",
        }
        if self.masks:
            pair = "A detection and the object it is matched with, by masks or else by boxes:"
            lower = f"lower by {self.gap:g} or more. The largest difference first."
            texts[POOR_MASK] = f"{pair} box IoU of {cover}, mask IoU {lower}"
            texts[POOR_BOX] = f"{pair} mask IoU of {cover}, box IoU {lower}"
        return texts

    def matching(self) -> str:
        """How objects and detections are matched, as a reader is told."""
        order = ", ".join((DUPLICATE, WRONG_CLASS, MISPLACED, BOTH, BACKGROUND))
        return (
            "Matched as COCO's evaluation does: in each image and category, detections take in order of their scores "
            f"the free object of highest {self.iou_kind} IoU, {self.iou:g} or more; the best {MAX_DETECTIONS} of an "
            f"image and category take part. Detections that score below {self.score:g} are left out. Detections on "
            "crowd regions of their category are ignored, and crowd regions are never missed. A detection without an "
            f"object is the first of these that fits: {order}; the highest score comes first. An object counts in the "
            "size that its annotation's area has, a false detection in that of its own area."
        )


@dataclass(frozen=True, eq=False)
class Objects:
    """N annotated objects or N detections; by image, in the order of their file.

    Args:
        entries: As in the file.
        images: [N] int64 image ids.
        categories: [N] int64 category ids.
        boxes: [N, 4] float64 x, y, width, height, pixels.
        areas: [N] float64, pixels.
        rles: COCO run lengths, or None where there are no masks.
        scores: [N] float64; 1 for annotations.
        crowds: [N] bool.
    """

    entries: list[Mapping[str, Any]]
    images: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    rles: list[dict[str, Any]] | None
    scores: np.ndarray
    crowds: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of a detection and an object of the same image that overlap, by detection, then object.

    Args:
        detections: [P] int64.
        objects: [P] int64.
        box_iou: [P] float64; with a crowd region the share of the detection that lies in it.
        mask_iou: [P] float64, the same for masks; zeros without masks.
    """

    detections: np.ndarray
    objects: np.ndarray
    box_iou: np.ndarray
    mask_iou: np.ndarray

    def position(self, detection: int, thing: int) -> int | None:
        """Where this pair is; None if the two do not overlap."""
        start, end = np.searchsorted(self.detections, [detection, detection + 1])
        found = start + np.searchsorted(self.objects[start:end], thing)
        return int(found) if found < end and self.objects[found] == thing else None


@dataclass(frozen=True, eq=False)
class Failures:
    """What was found to be wrong.

    Args:
        rules: Where errors begin.
        truth: G objects.
        found: D detections.
        pairs: Those that overlap.
        matched: [D] int64, the object (or crowd region) that a detection is matched with, -1: none.
        kinds: [D] int64, position among KINDS of the error that a detection is; -1: none, or below the score.
        partners: [D] int64, the object that decided about `kinds`; -1: none.
        missed: Objects without a detection, positions, the largest first.
        poor_masks: (detection, object) of good boxes with poor masks, the largest difference first.
        poor_boxes: The same for good masks with poor boxes.
    """

    rules: Rules
    truth: Objects
    found: Objects
    pairs: Pairs
    matched: np.ndarray
    kinds: np.ndarray
    partners: np.ndarray
    missed: list[int]
    poor_masks: list[tuple[int, int]]
    poor_boxes: list[tuple[int, int]]


def find_failures(gt: COCO, results: Sequence[Mapping[str, Any]], rules: Rules) -> Failures:
    """Matches results with the truth and says what is wrong with each.

    Args:
        gt: Ground truth (`dataset.coco_gt()`).
        results: COCO results that are known to be sound (`engine.coco_eval.check_results`); without any, every object
            is missed. With `rules.masks` every one has a mask; `mask_score`, where a method has one, then ranks them.
        rules: Where errors begin.
    """
    truth, found = _truth(gt, rules.masks), _found(gt, results, rules.masks)
    pairs = _overlaps(truth, found)
    iou = pairs.mask_iou if rules.masks else pairs.box_iou
    matched = match(pairs, iou, truth, found, rules.iou)
    shown = found.scores >= rules.score
    kinds, partners = _kinds_of(pairs, iou, truth, found, matched, rules)
    kinds[~shown] = -1
    covered = np.zeros(len(truth), dtype=bool)
    covered[matched[shown & (matched >= 0)]] = True
    missed = np.flatnonzero(~covered & ~truth.crowds)
    poor_masks, poor_boxes = _unequal(pairs, truth, found, matched, rules) if rules.masks else ([], [])
    largest_first = missed[np.argsort(-truth.areas[missed], kind="stable")].tolist()
    return Failures(rules, truth, found, pairs, matched, kinds, partners, largest_first, poor_masks, poor_boxes)


def match(pairs: Pairs, iou: np.ndarray, truth: Objects, found: Objects, threshold: float) -> np.ndarray:
    """The object that COCO's evaluation matches each detection with at one IoU.

    Ranks are worked off one after the other: the detections of one rank are of different images or categories, so they
    do not compete and all choose at once.

    Args:
        pairs: Detections and objects that overlap.
        iou: [P] which IoU counts.
        truth: G objects.
        found: D detections.
        threshold: Smallest IoU of a match.

    Returns:
        [D] int64 positions among the objects, -1 without one. A crowd region is taken only where no object is left, and
        by any number.
    """
    rank = _ranks(found)
    fits = truth.categories[pairs.objects] == found.categories[pairs.detections]
    fits &= (iou >= min(threshold, 1 - 1e-10)) & (rank[pairs.detections] < MAX_DETECTIONS)
    # Of each detection the best choice last: an object before a crowd region, then IoU; of equals COCO takes the last.
    detections, objects, overlap = pairs.detections[fits], pairs.objects[fits], iou[fits]
    order = np.lexsort((objects, overlap, ~truth.crowds[objects], detections, rank[detections]))
    detections, objects = detections[order], objects[order]
    matched = np.full(len(found), -1, dtype=np.int64)
    taken = np.zeros(len(truth), dtype=bool)
    for start, end in pairwise(np.searchsorted(rank[detections], np.arange(MAX_DETECTIONS + 1))):
        free = start + np.flatnonzero(~taken[objects[start:end]])
        choice = free[_ends_of_runs(detections[free])]
        matched[detections[choice]] = objects[choice]
        taken[objects[choice]] = ~truth.crowds[objects[choice]]
    return matched


def size_of(area: float) -> str:
    """Which of COCO's sizes an area in pixels is."""
    return next(name for name, (low, high) in SIZES.items() if low <= area < high)


def count(failures: Failures) -> dict[str, Any]:
    """How often what went wrong: in all, by category and by size.

    Returns:
        `all`, and under `categories` (by id) and `sizes` the same rows: `objects` (no crowds), `found` of them,
        `detections` that were looked at, each kind of error, `untouched` (missed objects that no detection overlaps by
        `rules.background`), `box_iou` and `mask_iou` (mean over the objects found, None without one).
    """
    truth, found, rules = failures.truth, failures.found, failures.rules
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(category: int, area: float, name: str, value: float = 1) -> None:
        for row in ("all", f"category {category}", f"size {size_of(area)}"):
            rows[row][name].append(value)

    def add_object(thing: int, name: str, value: float = 1) -> None:
        add(int(truth.categories[thing]), float(truth.areas[thing]), name, value)

    for thing in np.flatnonzero(~truth.crowds).tolist():
        add_object(thing, "objects")
    near = _nearest(failures)
    for thing in failures.missed:
        add_object(thing, MISSED)
        if thing not in near or near[thing][1] < rules.background:
            add_object(thing, "untouched")
    for index in np.flatnonzero(found.scores >= rules.score).tolist():
        thing, kind = int(failures.matched[index]), int(failures.kinds[index])
        if truth.crowds[thing] if thing >= 0 else kind < 0:  # ignored, as COCO does
            continue
        name = KINDS[kind] if kind >= 0 else "found"
        area = found.areas[index] if kind >= 0 else truth.areas[thing]
        add(int(found.categories[index]), float(area), name)
        add(int(found.categories[index]), float(area), "detections")
        if kind < 0:
            position = failures.pairs.position(index, thing)
            assert position is not None
            add_object(thing, "box_iou", float(failures.pairs.box_iou[position]))
            add_object(thing, "mask_iou", float(failures.pairs.mask_iou[position]))
    for name, unequal in ((POOR_MASK, failures.poor_masks), (POOR_BOX, failures.poor_boxes)):
        for _, thing in unequal:
            add_object(thing, name)
    kinds = tuple(rules.definitions())

    def row_of(name: str) -> dict[str, float | None]:
        row: dict[str, float | None] = {
            key: len(rows[name][key]) for key in ("objects", "found", "detections", *kinds, "untouched")
        }
        for key in ("box_iou", *(["mask_iou"] if rules.masks else [])):
            values = rows[name][key]
            row[key] = round(float(np.mean(values)), 4) if values else None
        return row

    categories = sorted({*truth.categories.tolist(), *found.categories.tolist()})
    return {
        "all": row_of("all"),
        "categories": {category: row_of(f"category {category}") for category in categories},
        "sizes": {size: row_of(f"size {size}") for size in SIZES},
    }


def listed(failures: Failures) -> dict[str, list[dict[str, Any]]]:
    """Every error of every kind, the worst first, as plain JSON values.

    Returns:
        For each kind entries with `image_id`, `category_id` (of the detection; of the object where it was missed),
        `area` and `size`, `annotation` (the object's id, None on the background) and `object` (its position),
        `object_category_id`, `detection` (position in the results, None without one), `detection_category_id`, `score`,
        `box_iou` and `mask_iou` of the two, and `found_at`, of a missed object: the score below the threshold at which
        it is found after all.
    """
    truth, found = failures.truth, failures.found
    lists: dict[str, list[dict[str, Any]]] = {kind: [] for kind in failures.rules.definitions()}
    near = _nearest(failures)
    late = {int(thing): index for index, thing in enumerate(failures.matched) if thing >= 0}
    for thing in failures.missed:
        entry = _entry(failures, near[thing][0] if thing in near else None, thing)
        entry |= {"category_id": int(truth.categories[thing]), "area": float(truth.areas[thing])}
        found_at = round(float(found.scores[late[thing]]), 4) if thing in late else None
        lists[MISSED].append(entry | {"size": size_of(entry["area"]), "found_at": found_at})
    best_first = np.argsort(-found.scores, kind="stable")
    for index in best_first[failures.kinds[best_first] >= 0].tolist():
        partner = int(failures.partners[index])
        lists[KINDS[failures.kinds[index]]].append(_entry(failures, index, partner if partner >= 0 else None))
    for kind, unequal in ((POOR_MASK, failures.poor_masks), (POOR_BOX, failures.poor_boxes)):
        for index, thing in unequal:
            entry = _entry(failures, index, thing)
            entry |= {"area": float(truth.areas[thing]), "size": size_of(float(truth.areas[thing]))}
            lists[kind].append(entry)
    return lists


def _entry(failures: Failures, index: int | None, thing: int | None) -> dict[str, Any]:
    """One detection, one object, and how they overlap; either may be none."""
    truth, found = failures.truth, failures.found
    source, at = (found, index) if index is not None else (truth, thing)
    assert at is not None
    position = None if index is None or thing is None else failures.pairs.position(index, thing)
    overlap = {"box_iou": failures.pairs.box_iou}
    if failures.rules.masks:
        overlap["mask_iou"] = failures.pairs.mask_iou
    area = float(source.areas[at])
    return {
        "image_id": int(source.images[at]),
        "category_id": int(source.categories[at]),
        "area": area,
        "size": size_of(area),
        "annotation": None if thing is None else int(truth.entries[thing]["id"]),
        "object": thing,
        "object_category_id": None if thing is None else int(truth.categories[thing]),
        "detection": index,
        "detection_category_id": None if index is None else int(found.categories[index]),
        "score": None if index is None else round(float(found.scores[index]), 4),
        **{name: 0.0 if position is None else round(float(iou[position]), 4) for name, iou in overlap.items()},
    }


def _truth(gt: COCO, masks: bool) -> Objects:
    entries = gt.dataset["annotations"]
    return _objects(
        entries,
        areas=[entry["area"] for entry in entries],
        rles=[gt.annToRLE(entry) for entry in entries] if masks else None,
        boxes=[entry["bbox"] for entry in entries],
        scores=[1.0] * len(entries),
        crowds=[bool(entry.get("iscrowd", 0)) for entry in entries],
    )


def _found(gt: COCO, results: Sequence[Mapping[str, Any]], masks: bool) -> Objects:
    sizes = {key: (image["height"], image["width"]) for key, image in gt.imgs.items()}
    rles = [mask_of(entry["segmentation"], sizes[entry["image_id"]]) for entry in results] if masks else None
    boxes: list[Any] = [entry.get("bbox") for entry in results]
    for index, box in enumerate(boxes):
        if not is_box(box):  # as pycocotools completes them
            assert rles is not None
            boxes[index] = coco_mask.toBbox(rles[index]).tolist()
    areas = [width * height for _, _, width, height in boxes]
    if rles is not None:
        areas = [coco_mask.area(rle) for rle in rles]  # one by one: a list of 256 overflows in pycocotools 2.0.11
    return _objects(
        results,
        areas=areas,
        rles=rles,
        boxes=boxes,
        scores=[entry["score"] for entry in ranked_for(results, "segm" if masks else "bbox")],
        crowds=[False] * len(results),
    )


def _objects(
    entries: Sequence[Mapping[str, Any]], areas: Any, rles: Any, boxes: Any, scores: Any, crowds: Any
) -> Objects:
    return Objects(
        entries=list(entries),
        images=np.array([entry["image_id"] for entry in entries], dtype=np.int64),
        categories=np.array([entry["category_id"] for entry in entries], dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        areas=np.array(areas, dtype=np.float64),
        rles=rles,
        scores=np.array(scores, dtype=np.float64),
        crowds=np.array(crowds, dtype=bool),
    )


def _overlaps(truth: Objects, found: Objects) -> Pairs:
    """Every detection with every object of its image, where boxes or masks overlap."""
    objects_of, detections_of = _by_image(truth), _by_image(found)
    parts = []
    for image in sorted(objects_of.keys() & detections_of.keys()):
        things, detections = objects_of[image], detections_of[image]
        crowd = truth.crowds[things].astype(np.uint8).tolist()
        box = _ious(found.boxes[detections], truth.boxes[things], crowd)
        mask = np.zeros_like(box)
        if found.rles is not None and truth.rles is not None:
            mask = _ious([found.rles[i] for i in detections], [truth.rles[i] for i in things], crowd)
        rows, columns = np.nonzero((box > 0) | (mask > 0))
        parts.append((detections[rows], things[columns], box[rows, columns], mask[rows, columns]))
    if not parts:
        none = np.zeros(0)
        return Pairs(none.astype(np.int64), none.astype(np.int64), none, none)
    detections, things, box, mask = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((things, detections))
    return Pairs(detections[order], things[order], box[order], mask[order])


def _by_image(things: Objects) -> dict[int, np.ndarray]:
    order = np.argsort(things.images, kind="stable")
    images, starts = np.unique(things.images[order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, starts[1:]), strict=True)) if len(images) else {}


def _ious(found: Any, truth: Any, crowd: list[int]) -> np.ndarray:
    """[D, G] of one image; of two empty ones 0."""
    return np.nan_to_num(np.asarray(coco_mask.iou(found, truth, crowd), dtype=np.float64))


def _ranks(found: Objects) -> np.ndarray:
    """[D] place of each detection among those of its image and category, by score, 0 the best."""
    order = np.lexsort((-found.scores, found.categories, found.images))
    images, categories = found.images[order], found.categories[order]
    begins = np.append(True, (np.diff(images) != 0) | (np.diff(categories) != 0))[: len(order)]
    places = np.arange(len(order))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = places - np.maximum.accumulate(np.where(begins, places, 0))
    return rank


def _ends_of_runs(values: np.ndarray) -> np.ndarray:
    """Positions at which runs of equal values end."""
    return np.flatnonzero(np.append(np.diff(values), 1)[: len(values)])


def _kinds_of(
    pairs: Pairs, iou: np.ndarray, truth: Objects, found: Objects, matched: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray]:
    """[D] which error a detection is, -1 for none, and [D] the object that says so, -1 for none."""
    same = truth.categories[pairs.objects] == found.categories[pairs.detections]
    crowd = truth.crowds[pairs.objects]
    own, own_object = _best(pairs, iou, same & ~crowd, len(found))
    other, other_object = _best(pairs, iou, ~same & ~crowd, len(found))
    wrong = (matched < 0) & (_ranks(found) < MAX_DETECTIONS)
    cases = (
        (DUPLICATE, own >= rules.iou, own_object),
        (WRONG_CLASS, other >= rules.iou, other_object),
        (MISPLACED, own >= rules.background, own_object),
        (BOTH, other >= rules.background, other_object),
        (BACKGROUND, np.ones(len(found), dtype=bool), np.full(len(found), -1)),
    )
    conditions = [wrong & condition for _, condition, _ in cases]
    kinds = np.select(conditions, [np.int64(KINDS.index(kind)) for kind, _, _ in cases], np.int64(-1))
    return kinds, np.select(conditions, [partner for _, _, partner in cases], np.int64(-1))


def _best(pairs: Pairs, iou: np.ndarray, usable: np.ndarray, num_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each detection the largest IoU among the usable pairs, 0 without one, and its object, -1 without one."""
    detections, things, iou = pairs.detections[usable], pairs.objects[usable], iou[usable]
    order = np.lexsort((-things, iou, detections))
    last = order[_ends_of_runs(detections[order])]
    best, thing = np.zeros(num_detections), np.full(num_detections, -1, dtype=np.int64)
    best[detections[last]], thing[detections[last]] = iou[last], things[last]
    return best, thing


def _unequal(
    pairs: Pairs, truth: Objects, found: Objects, matched: np.ndarray, rules: Rules
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs whose boxes fit much better than their masks, and the other way round."""
    by_boxes = match(pairs, pairs.box_iou, truth, found, rules.iou)
    partner = np.where(matched >= 0, matched, by_boxes)[pairs.detections]
    together = (partner == pairs.objects) & ~truth.crowds[pairs.objects]
    together &= found.scores[pairs.detections] >= rules.score
    gap = pairs.box_iou - pairs.mask_iou
    lists = []
    for good, difference in ((pairs.box_iou, gap), (pairs.mask_iou, -gap)):
        chosen = np.flatnonzero(together & (good >= rules.iou) & (difference >= rules.gap))
        chosen = chosen[np.argsort(-difference[chosen], kind="stable")]
        lists.append(list(zip(pairs.detections[chosen].tolist(), pairs.objects[chosen].tolist(), strict=True)))
    return lists[0], lists[1]


def _nearest(failures: Failures) -> dict[int, tuple[int, float]]:
    """Of each missed object the detection that overlaps it best, of those that score enough, and that IoU."""
    pairs = failures.pairs
    iou = pairs.mask_iou if failures.rules.masks else pairs.box_iou
    usable = np.flatnonzero(failures.found.scores[pairs.detections] >= failures.rules.score)
    usable = usable[np.argsort(iou[usable], kind="stable")]
    nearest: dict[int, tuple[int, float]] = {}
    for thing, index, overlap in zip(
        pairs.objects[usable].tolist(), pairs.detections[usable].tolist(), iou[usable].tolist(), strict=True
    ):
        nearest[thing] = (index, overlap)  # the last one is the best
    return nearest
