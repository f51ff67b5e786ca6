"""COCO average precision: pycocotools' numbers for exactly the results that are written to a file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from onestage.data.coco import coco_object
from onestage.data.validate import mask_of, read_json
from onestage.errors import DatasetError, MachineError, some
from onestage.masks import rle_counts
from onestage.structures import Detections

Backend = Literal["pycocotools", "faster-coco-eval"]  # the second: equal numbers from compiled code, an extra

IOU_TYPES = ("bbox", "segm")
_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}  # position among COCOeval's area ranges


class CocoEvaluator:
    """Collects detections image by image and counts AP and AR.

    Every image of the ground truth counts, whether detections were added for it or not.

    Args:
        gt: Ground truth (`dataset.coco_gt()`).
        categories: (id, name) of the labels of the detections. Where they differ from the ground truth's, names decide.
        iou_types: Any of `bbox`, `segm`; the second is left out once detections without masks are added.
        max_dets: How many detections of an image AR looks at; AP takes the last.
        backend: What counts.

    Raises:
        DatasetError: the categories do not fit.
        MachineError: the backend is not installed.
    """

    def __init__(
        self,
        gt: COCO,
        categories: Sequence[tuple[int, str]],
        iou_types: Sequence[str] = IOU_TYPES,
        max_dets: Sequence[int] = (1, 10, 100),
        backend: Backend = "pycocotools",
    ):
        self._counting = counting(backend)
        self.gt = gt
        self.iou_types = tuple(iou_types)
        self.max_dets = tuple(max_dets)
        self._category_ids = match_categories(categories, _categories_of(gt))
        self._by_image: dict[int, list[dict[str, Any]]] = {}

    def add(self, image_id: int, detections: Detections) -> None:
        """Takes over one image's detections; those added for it before are replaced.

        Args:
            detections: On any device: from a GPU only the run lengths of their masks are copied.
        """
        if detections.masks is None:
            self.iou_types = tuple(kind for kind in self.iou_types if kind != "segm")
        rles = detections.masks.to_rle() if detections.masks is not None and "segm" in self.iou_types else None
        detections = replace(detections, masks=None, soft_masks=None).to("cpu")
        boxes = detections.boxes.double()
        sizes = boxes[:, 2:] - boxes[:, :2]
        columns = {
            "category_id": [self._category_ids[label] for label in detections.labels.tolist()],
            "bbox": [corner + size for corner, size in zip(boxes[:, :2].tolist(), sizes.tolist(), strict=True)],
            "score": detections.scores.tolist(),
        }
        if rles is not None:
            columns["segmentation"] = rles
        if detections.mask_scores is not None:
            columns["mask_score"] = detections.mask_scores.tolist()
        rows = zip(*columns.values(), strict=True)
        self._by_image[image_id] = [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in rows]

    def merge(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `results()` of another process's evaluator gave."""
        replaced = {result["image_id"] for result in results}
        self._by_image |= {image_id: [] for image_id in replaced}
        for result in results:
            self._by_image[result["image_id"]].append(dict(result))
        self.iou_types = countable(results, self.iou_types)

    def results(self, iou_type: str | None = None) -> list[dict[str, Any]]:
        """All detections as COCO results, by image id, with the data set's category ids; plain JSON values.

        Args:
            iou_type: `segm` puts `mask_score`, where a method has one, in the place of `score`: the entries that segm
                is counted on. Otherwise it is an extra key that pycocotools ignores.
        """
        entries = [entry for image_id in sorted(self._by_image) for entry in self._by_image[image_id]]
        return entries if iou_type is None else ranked_for(entries, iou_type)

    def summarize(self, per_class: bool = False) -> dict[str, float]:
        """AP and AR of every IoU type.

        Returns:
            `bbox/AP`, `bbox/AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`, `AR100` (for `max_dets`), `ARs`, `ARm`,
            `ARl`, the same for `segm` where detections have masks, and with `per_class` also `segm/AP/<name>`; 0 to 1,
            -1 where there is no ground truth to count on.
        """
        metrics: dict[str, float] = {}
        for iou_type in self.iou_types:
            one = average_precision(
                self.gt, self.results(iou_type), iou_type, self.max_dets, per_class=per_class, counting=self._counting
            )
            metrics |= {f"{iou_type}/{key}": value for key, value in one.items()}
        return metrics


def countable(results: Sequence[Mapping[str, Any]], iou_types: Sequence[str]) -> tuple[str, ...]:
    """The IoU types but `segm`, if there are results and none of them has a mask."""
    maskless = bool(results) and not any("segmentation" in entry for entry in results)
    return tuple(kind for kind in iou_types if not (maskless and kind == "segm"))


def ranked_for(results: Sequence[Mapping[str, Any]], iou_type: str) -> list[dict[str, Any]]:
    """The results with the score that counts: for `segm` that is `mask_score`, where an entry has one."""
    if iou_type != "segm":
        return [dict(entry) for entry in results]
    return [{**entry, "score": entry.get("mask_score", entry["score"])} for entry in results]


def counting(backend: Backend) -> Callable[[COCO, COCO, str], COCOeval]:
    """What makes an evaluation of ground truth, results and an IoU type.

    Raises:
        MachineError: it is not installed.
    """
    if backend == "pycocotools":
        return COCOeval
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise MachineError(
            "--backend faster-coco-eval needs a library that is not installed", "pip install faster-coco-eval"
        ) from error
    return partial(COCOeval_faster, print_function=lambda *words: None)


def average_precision(
    gt: COCO,
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_dets: Sequence[int] = (1, 10, 100),
    *,
    per_class: bool = False,
    counting: Callable[[COCO, COCO, str], COCOeval] = COCOeval,
) -> dict[str, float]:
    """COCO's evaluation of results that are known to be sound.

    As in a results file of COCO's segm task, boxes are no part of what `segm` is counted on: a detection is small,
    medium or large by the area of its mask there.

    Args:
        gt: Ground truth.
        results: COCO results; none at all is AP 0.
        iou_type: `bbox` or `segm`.
        max_dets: Detections per image, ascending; the last one is AP's.
        per_class: Adds `AP/<name>` of every category.
        counting: As the function `counting` gives it.

    Returns:
        `AP`, `AP50`, ... as in `CocoEvaluator.summarize`, without the IoU type.
    """
    entries = [_counted(entry, iou_type) for entry in results]
    gt = _without_id_0(gt)
    with contextlib.redirect_stdout(io.StringIO()):
        found = gt.loadRes(entries) if entries else coco_object([], [], _categories_of(gt))
    evaluation = counting(gt, found, iou_type)
    evaluation.params.maxDets = list(max_dets)
    run_silently(evaluation)
    return metrics_of(evaluation, per_class=per_class)


def _counted(entry: Mapping[str, Any], iou_type: str) -> dict[str, Any]:
    """What `iou_type` is counted on, alone: pycocotools takes all entries for what other keys of the first one say.

    Run lengths are compressed: of others it cannot count the area.
    """
    key = "segmentation" if iou_type == "segm" else "bbox"
    counted = {name: entry[name] for name in ("image_id", "category_id", "score", key)}
    if iou_type == "segm" and isinstance(entry[key]["counts"], list):
        counted[key] = mask_of(entry[key], tuple(entry[key]["size"]))
    return counted


def _without_id_0(gt: COCO) -> COCO:
    """The same ground truth, numbered anew where an id is 0: pycocotools takes a match with that one for none."""
    if 0 not in gt.anns:
        return gt
    moved = [{**entry, "id": number + 1} for number, entry in enumerate(gt.dataset["annotations"])]
    return coco_object(gt.dataset["images"], moved, _categories_of(gt))


def run_silently(evaluation: COCOeval) -> None:
    """Matches and accumulates, without pycocotools' prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()


def metrics_of(evaluation: COCOeval, *, per_class: bool = False) -> dict[str, float]:
    """`AP`, `AP50`, ... of an evaluation that has run, as `average_precision` returns them."""
    max_dets = evaluation.params.maxDets
    precision = evaluation.eval["precision"]  # [IoU thresholds, recall points, K, areas, max_dets]
    recall = evaluation.eval["recall"]  # [IoU thresholds, K, areas, max_dets]
    metrics = {"AP": _mean(precision[:, :, :, 0, -1])}
    metrics |= {f"AP{iou}": _mean(precision[(iou - 50) // 5, :, :, 0, -1]) for iou in (50, 75)}
    metrics |= {f"AP{name}": _mean(precision[:, :, :, area, -1]) for name, area in _AREAS.items() if name}
    metrics |= {f"AR{number}": _mean(recall[:, :, 0, i]) for i, number in enumerate(max_dets)}
    metrics |= {f"AR{name}": _mean(recall[:, :, area, -1]) for name, area in _AREAS.items() if name}
    if per_class:
        names = dict(_categories_of(evaluation.cocoGt))
        for k, category_id in enumerate(evaluation.params.catIds):
            metrics[f"AP/{names[category_id]}"] = _mean(precision[:, :, k, 0, -1])
    return metrics


def evaluate_results_file(
    path: Path,
    gt: COCO,
    iou_types: Sequence[str] = IOU_TYPES,
    max_dets: Sequence[int] = (1, 10, 100),
    *,
    per_class: bool = False,
    backend: Backend = "pycocotools",
) -> dict[str, float]:
    """AP and AR of a COCO results file, whoever wrote it.

    Args:
        path: The JSON list.
        gt: Ground truth (`dataset.coco_gt()`).
        iou_types: Any of `bbox`, `segm`. Beside `bbox`, `segm` is left out where no entry has a mask; otherwise those
            the file has no data for are an error.
        max_dets: As in `CocoEvaluator`.
        per_class: As in `CocoEvaluator.summarize`.
        backend: What counts.

    Raises:
        MachineError: the backend is not installed.
        DatasetError: no results, or entries that do not fit the data set or cannot be decoded.
    """
    evaluation = counting(backend)
    content = read_json(path)
    if "bbox" in iou_types and isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        iou_types = countable(content, iou_types)
    results = check_results(content, gt, iou_types, f"results '{path}'")
    metrics: dict[str, float] = {}
    for iou_type in iou_types:
        ranked = ranked_for(results, iou_type)
        one = average_precision(gt, ranked, iou_type, max_dets, per_class=per_class, counting=evaluation)
        metrics |= {f"{iou_type}/{key}": value for key, value in one.items()}
    return metrics


def check_results(results: Any, gt: COCO, iou_types: Sequence[str], name: str) -> list[dict[str, Any]]:
    """The results, if every entry fits the ground truth and can be given to pycocotools.

    Args:
        results: What a results file holds.
        gt: Ground truth.
        iou_types: What they are wanted for: `bbox` needs boxes, `segm` masks.
        name: What an error calls the file.

    Raises:
        DatasetError: the first entry that is not sound.
    """
    if not isinstance(results, list):
        raise DatasetError(
            f"{name} is not a list of detections", "give COCO results: a list of image_id, category_id, ..."
        )
    for number, entry in enumerate(results):
        where = f"{name}: entry {number}"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} is not an object", "give COCO results")
        if type(entry.get("image_id")) is not int or entry["image_id"] not in gt.imgs:
            raise DatasetError(
                f"{where} has image_id {entry.get('image_id')!r}, which the data set does not have",
                "evaluate against the annotations that the results were made for",
            )
        if type(entry.get("category_id")) is not int or entry["category_id"] not in gt.cats:
            known = some([str(key) for key in gt.cats])
            raise DatasetError(
                f"{where} has category_id {entry.get('category_id')!r}; known are {known}",
                "results use the data set's own category ids",
            )
        for key in ("score", *(["mask_score"] if "mask_score" in entry else [])):
            if not _all_finite([entry.get(key)]):
                raise DatasetError(f"{where} has {key} {entry.get(key)!r}", "every entry needs a finite score")
        if "bbox" in iou_types and not is_box(entry.get("bbox")):
            raise DatasetError(
                f"{where} has bbox {entry.get('bbox')!r}; finite x, y, width, height are needed",
                "correct the file, or evaluate --iou-types segm",
            )
        if "segm" in iou_types:
            image = gt.imgs[entry["image_id"]]
            rle_counts(entry.get("segmentation"), (image["height"], image["width"]), where)  # type: ignore[arg-type]
    return results


def match_categories(ours: Sequence[tuple[int, str]], theirs: Sequence[tuple[int, str]]) -> tuple[int, ...]:
    """The category id of a data set that each label means.

    Args:
        ours: (id, name) of labels 0..K-1, of a model or of the weights.
        theirs: (id, name) of the data set.

    Returns:
        K ids of the data set: the same ones where the tables are equal, else those of the same name.

    Raises:
        DatasetError: the names are not the same.
    """
    id_of = {name: key for key, name in theirs}
    if sorted(ours) == sorted(theirs):
        return tuple(key for key, _ in ours)
    same_names = sorted(id_of) == sorted(name for _, name in ours)
    if not same_names or len(id_of) < len(theirs):
        raise DatasetError(
            f"the model knows {_listed(ours)}, the data set has {_listed(theirs)}",
            "evaluate on a data set with the same category names",
        )
    return tuple(id_of[name] for _, name in ours)


def _categories_of(gt: COCO) -> list[tuple[int, str]]:
    return [(category["id"], category["name"]) for category in gt.dataset["categories"]]


def _listed(categories: Sequence[tuple[int, str]]) -> str:
    return f"{len(categories)} categories ({some([f'{key} {name}' for key, name in categories])})"


def _mean(values: np.ndarray) -> float:
    """COCOeval's: over what was counted, -1 where nothing was."""
    counted = values[values > -1]
    return float(np.mean(counted)) if len(counted) else -1.0


def _all_finite(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e15 for value in values)


def is_box(value: Any) -> bool:
    """Whether this is a list of finite x, y, width, height, the sizes not below 0."""
    return isinstance(value, list) and len(value) == 4 and _all_finite(value) and min(value[2:]) >= 0
