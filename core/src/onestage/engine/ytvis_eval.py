"""YouTube-VIS average precision: AP and AR over tracks, and how often identities switch.

Two tracks overlap by the sum of their intersections over all frames, divided by the sum of their unions; a frame where
only one of them is counts in the union. Everything after that is pycocotools' own matching and accumulation, with a
video in the place of an image. Size ranges are the official ones: the mean area over frames, split at 128^2 and 256^2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from onestage.data.coco import coco_object
from onestage.data.validate import read_json
from onestage.data.ytvis import Videos, mean_area
from onestage.engine.coco_eval import match_categories, metrics_of, run_silently
from onestage.errors import DatasetError, some
from onestage.masks import rle_counts
from onestage.structures import Detections

AREA_RANGES = [[0, 1e5**2], [0, 128**2], [128**2, 256**2], [256**2, 1e5**2]]  # all, small, medium, large; pixels
SWITCH_SCORE = 0.3  # identities are counted on tracks that score at least this
SWITCH_IOU = 0.5  # a track follows an object in a frame where their masks overlap by at least this

RLE = dict[str, Any]


class VideoEvaluator:
    """Collects results video by video and counts AP, AR and identity switches.

    Every video of the data set counts, whether results were added for it or not.

    Args:
        dataset: Its videos and tracks are the ground truth.
        categories: (id, name) of the labels of the detections. Where they differ from the data set's, names decide.
        max_dets: How many tracks of a video AR looks at; AP takes the last.

    Raises:
        DatasetError: the categories do not fit.
    """

    def __init__(self, dataset: Videos, categories: Sequence[tuple[int, str]], max_dets: Sequence[int] = (1, 10, 100)):
        self.dataset = dataset
        self.max_dets = tuple(max_dets)
        self.category_ids = match_categories(categories, dataset.categories)
        self._by_video: dict[int, list[dict[str, Any]]] = {}

    def add(self, video: int, found: Iterable[Detections]) -> None:
        """Takes over what was found in one video.

        Args:
            video: Position in the data set.
            found: For each frame detections with `track_ids` and masks of the video's size.
        """
        entry = self.dataset.videos[video]
        self._by_video[entry.id] = track_results(entry.id, found, self.category_ids)

    def merge(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `results()` of another process's evaluator gave."""
        self._by_video |= {result["video_id"]: [] for result in results}
        for result in results:
            self._by_video[result["video_id"]].append(dict(result))

    def results(self) -> list[dict[str, Any]]:
        """All tracks in YouTube-VIS submission form, by video id; plain JSON values."""
        return [entry for video_id in sorted(self._by_video) for entry in self._by_video[video_id]]

    def summarize(self, per_class: bool = False) -> dict[str, float]:
        """`segm/AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`, `AR100` (for `max_dets`), `ARs`, `ARm`, `ARl`,
        with `per_class` also `segm/AP/<name>`: 0 to 1, -1 where there is no ground truth to count on. And what
        `identity_switches` counts.
        """
        return evaluate_tracks(self.dataset, self.results(), self.max_dets, per_class=per_class)


def track_results(video_id: int, found: Iterable[Detections], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One submission entry for every identity: score is the mean over its frames, category the most frequent one.

    Args:
        video_id: The data set's.
        found: For each frame detections with `track_ids` and masks.
        category_ids: The data set's id of each label.
    """
    masks: dict[int, dict[int, RLE]] = {}
    scores: dict[int, list[float]] = {}
    labels: dict[int, list[int]] = {}
    length = 0
    for number, detections in enumerate(found):
        length = number + 1
        assert detections.track_ids is not None
        assert detections.masks is not None
        rows = zip(
            detections.track_ids.tolist(),
            detections.scores.tolist(),
            detections.labels.tolist(),
            detections.masks.to_rle(),
            strict=True,
        )
        for key, score, label, rle in rows:
            masks.setdefault(key, {})[number] = rle
            scores.setdefault(key, []).append(score)
            labels.setdefault(key, []).append(label)
    return [
        {
            "video_id": video_id,
            "category_id": category_ids[majority(labels[key])],
            "score": float(np.mean(scores[key])),
            "segmentations": [masks[key].get(number) for number in range(length)],
        }
        for key in sorted(masks)
    ]


def majority(labels: Iterable[int]) -> int:
    """The most frequent label, of equally frequent ones the smallest."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def evaluate_tracks(
    dataset: Videos,
    results: Sequence[Mapping[str, Any]],
    max_dets: Sequence[int] = (1, 10, 100),
    *,
    per_class: bool = False,
) -> dict[str, float]:
    """AP, AR and identity switches of results that are known to be sound; as in `VideoEvaluator.summarize`."""
    annotations: list[dict[str, Any]] = []
    videos: list[dict[str, Any]] = []
    for index, video in enumerate(dataset.videos):
        videos.append({"id": video.id, "height": video.size[0], "width": video.size[1]})
        for track in dataset.tracks(index):
            entry = {"id": len(annotations) + 1, "image_id": video.id, "area": track.area, "masks": track.masks}
            entry |= {"category_id": dataset.categories[track.label][0], "iscrowd": int(track.iscrowd)}
            annotations.append(entry)
    detected = [
        {
            "id": number + 1,
            "image_id": result["video_id"],
            "category_id": result["category_id"],
            "score": result["score"],
            "area": mean_area([float(coco_mask.area(rle)) for rle in result["segmentations"] if rle is not None]),
            "iscrowd": 0,
            "masks": result["segmentations"],
        }
        for number, result in enumerate(results)
    ]
    evaluation = _TrackEval(
        coco_object(videos, annotations, dataset.categories), coco_object(videos, detected, dataset.categories), "bbox"
    )
    evaluation.params.maxDets = list(max_dets)
    evaluation.params.areaRng = AREA_RANGES
    run_silently(evaluation)
    metrics = {f"segm/{name}": value for name, value in metrics_of(evaluation, per_class=per_class).items()}
    return metrics | identity_switches(annotations, detected)


class _TrackEval(COCOeval):
    """pycocotools' evaluation with tracks in the place of boxes; what it looks up of a box are area and score."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        true, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not true or not found:
            return []
        order = np.argsort([-entry["score"] for entry in found], kind="mergesort")[: self.params.maxDets[-1]]
        return sequence_iou([found[i]["masks"] for i in order], [entry["masks"] for entry in true])


def sequence_iou(found: Sequence[Sequence[RLE | None]], true: Sequence[Sequence[RLE | None]]) -> np.ndarray:
    """Spatio-temporal IoU of tracks of one video.

    Args:
        found: D tracks, a COCO RLE or None for each frame.
        true: G tracks of the same frames.

    Returns:
        [D, G] float64 in 0..1; 0 where both have no pixel at all.
    """
    inter = np.zeros((len(found), len(true)))
    union = np.zeros_like(inter)
    for d, g, iou, d_areas, g_areas in _frames(found, true):
        union[d] += d_areas[:, None]
        union[:, g] += g_areas
        if len(d) and len(g):
            # Of whole numbers of pixels, so the intersection is exact: IoU = i / (a + b - i).
            both = np.rint(iou * (d_areas[:, None] + g_areas) / (1 + iou))
            inter[np.ix_(d, g)] += both
            union[np.ix_(d, g)] -= both
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def identity_switches(true: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How well tracks keep to the objects they follow.

    In each frame an object goes on with the track that followed it last, as long as they overlap by `SWITCH_IOU`; the
    others are matched greedily, best overlap first, within a category. An object that is matched to another track
    than the last time has switched. Tracks below `SWITCH_SCORE` and crowds do not count.

    Args:
        true: Tracks of the ground truth: `image_id`, `category_id`, `iscrowd`, `masks` for every frame.
        found: Tracks of the same form, with `score`.

    Returns:
        `identity_switches`; `objects`, of the ground truth; `frames_followed`, the share of the objects' frames in
        which some track follows them, -1 without objects.
    """
    switches = visible = followed = 0
    objects = [entry for entry in true if not entry["iscrowd"]]
    for video in sorted({entry["image_id"] for entry in objects}):
        here = [entry for entry in objects if entry["image_id"] == video]
        tracks = [entry for entry in found if entry["image_id"] == video and entry["score"] >= SWITCH_SCORE]
        last: dict[int, int] = {}
        for d, g, iou, _, _ in _frames([t["masks"] for t in tracks], [t["masks"] for t in here]):
            visible += len(g)
            fits = {
                (d[i], g[j]): iou[i, j]
                for i in range(len(d))
                for j in range(len(g))
                if iou[i, j] >= SWITCH_IOU and tracks[d[i]]["category_id"] == here[g[j]]["category_id"]
            }
            # Those that stay together first, then by overlap.
            for one, other in sorted(fits, key=lambda pair: (last.get(pair[1]) != pair[0], -fits[pair])):
                if (one, other) not in fits:
                    continue
                followed += 1
                switches += other in last and last[other] != one
                last[other] = one
                fits = {pair: value for pair, value in fits.items() if pair[0] != one and pair[1] != other}
    share = followed / visible if visible else -1.0
    return {"identity_switches": float(switches), "objects": float(len(objects)), "frames_followed": share}


def _frames(
    found: Sequence[Sequence[RLE | None]], true: Sequence[Sequence[RLE | None]]
) -> Iterable[tuple[list[int], list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """For each frame: which tracks are there (d of D, g of G), their IoUs [d, g] and their areas [d], [g]."""
    for number in range(len((*found, *true)[0]) if found or true else 0):
        d = [i for i, track in enumerate(found) if track[number] is not None]
        g = [i for i, track in enumerate(true) if track[number] is not None]
        theirs, ours = [found[i][number] for i in d], [true[i][number] for i in g]
        # One by one: pycocotools 2.0.11 cannot take a list of 256.
        areas = [np.array([coco_mask.area(rle) for rle in part], dtype=np.float64) for part in (theirs, ours)]
        iou = coco_mask.iou(theirs, ours, [0] * len(g)) if d and g else np.zeros((len(d), len(g)))
        yield d, g, iou, areas[0], areas[1]


def evaluate_video_results_file(
    path: Path, dataset: Videos, max_dets: Sequence[int] = (1, 10, 100), *, per_class: bool = False
) -> dict[str, float]:
    """AP, AR and identity switches of a YouTube-VIS results file, whoever wrote it.

    Raises:
        DatasetError: no results, or entries that do not fit the data set or cannot be decoded.
    """
    results = check_video_results(read_json(path), dataset, f"results '{path}'")
    return evaluate_tracks(dataset, results, max_dets, per_class=per_class)


def check_video_results(results: Any, dataset: Videos, name: str) -> list[dict[str, Any]]:
    """The results, if every entry fits the data set and can be given to pycocotools; run lengths compressed.

    Args:
        results: What a results file holds.
        dataset: What they were made for.
        name: What an error calls the file.

    Raises:
        DatasetError: the first entry that is not sound.
    """
    if not isinstance(results, list):
        raise DatasetError(f"{name} is not a list of tracks", "give YouTube-VIS results: a list of video_id, ...")
    videos = {video.id: video for video in dataset.videos}
    known = [key for key, _ in dataset.categories]
    sound = []
    for number, entry in enumerate(results):
        where = f"{name}: entry {number}"
        if not isinstance(entry, dict):
            raise DatasetError(f"{where} is not an object", "give YouTube-VIS results")
        if type(entry.get("video_id")) is not int or entry["video_id"] not in videos:
            raise DatasetError(
                f"{where} has video_id {entry.get('video_id')!r}, which the data set does not have",
                "evaluate against the annotations that the results were made for",
            )
        if type(entry.get("category_id")) is not int or entry["category_id"] not in known:
            raise DatasetError(
                f"{where} has category_id {entry.get('category_id')!r}; known are {some([str(key) for key in known])}",
                "results use the data set's own category ids",
            )
        if type(entry.get("score")) not in (int, float) or not abs(entry["score"]) < 1e15:
            raise DatasetError(f"{where} has score {entry.get('score')!r}", "every entry needs a finite score")
        video, masks = videos[entry["video_id"]], entry.get("segmentations")
        if not isinstance(masks, list) or len(masks) != video.num_frames:
            count = len(masks) if isinstance(masks, list) else "no"
            raise DatasetError(
                f"{where} has {count} segmentations, video {video.id} has {video.num_frames} frames",
                "give one RLE or null for each frame",
            )
        checked = [
            None if rle is None else _checked(rle, video.size, f"{where}, frame {i}") for i, rle in enumerate(masks)
        ]
        sound.append({**entry, "segmentations": checked})
    return sound


def _checked(rle: RLE, size: tuple[int, int], name: str) -> RLE:
    runs = rle_counts(rle, size, name)
    if isinstance(rle["counts"], str):
        return rle
    compressed: RLE = coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)
    return compressed
