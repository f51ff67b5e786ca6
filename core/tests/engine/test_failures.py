"""Kinds of errors: by hand, and matching against pycocotools' own."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from onestage.data.coco import coco_object
from onestage.engine.failures import KINDS, Failures, Rules, count, find_failures, listed, match

CATEGORIES = ((3, "dog"), (7, "cat"))
SIDE = 100  # px of every image


def rle(x: float, y: float, width: float, height: float) -> dict:
    """Mask of a rectangle."""
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[round(y) : round(y + height), round(x) : round(x + width)] = 1
    made = coco_mask.encode(mask)
    return {"size": made["size"], "counts": made["counts"].decode("ascii")}


def truth(*objects: tuple, images: int = 1) -> COCO:
    """Objects as (image, category, box), with a fourth entry crowds."""
    annotations = [
        {
            "id": 100 + number,
            "image_id": image,
            "category_id": category,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": int(bool(crowd)),
            "segmentation": rle(*box),
        }
        for number, (image, category, box, *crowd) in enumerate(objects)
    ]
    entries = [{"id": n + 1, "height": SIDE, "width": SIDE, "file_name": f"{n}.jpg"} for n in range(images)]
    return coco_object(entries, annotations, CATEGORIES)


def detection(image: int, category: int, box: tuple, score: float, mask: tuple | None = None) -> dict:
    """A detection whose mask is the box, or another rectangle."""
    where = {"image_id": image, "category_id": category, "bbox": list(box), "score": score}
    return where | {"segmentation": rle(*(mask or box))}


def kinds_of(failures: Failures) -> list[str]:
    return [KINDS[kind] if kind >= 0 else "" for kind in failures.kinds]


BOX = (10, 10, 40, 40)


def test_each_kind_by_hand():
    gt = truth((1, 3, BOX), (1, 7, (60, 60, 20, 20)))
    results = [
        detection(1, 3, BOX, 0.9),  # the dog
        detection(1, 3, (10, 10, 40, 38), 0.8),  # again
        detection(1, 7, (10, 10, 38, 40), 0.7),  # as a cat
        detection(1, 7, (70, 60, 20, 20), 0.6),  # IoU 1/3 with the cat
        detection(1, 3, (70, 62, 20, 20), 0.5),  # and as a dog
        detection(1, 3, (0, 80, 10, 10), 0.4),  # nothing
        detection(1, 3, (0, 90, 10, 10), 0.2),  # nothing, but hardly claimed
    ]
    failures = find_failures(gt, results, Rules())
    assert kinds_of(failures) == [
        *("", "duplicate", "wrong class", "poor localisation", "wrong class and place", "background", "")
    ]
    assert failures.missed == [1]  # the cat
    lists = listed(failures)
    assert {kind: len(entries) for kind, entries in lists.items()} == dict.fromkeys(KINDS, 1) | {
        "good box, poor mask": 0,
        "good mask, poor box": 0,
    }
    wrong = lists["wrong class"][0]
    assert (wrong["category_id"], wrong["object_category_id"], wrong["annotation"]) == (7, 3, 100)
    assert (wrong["detection"], wrong["score"], wrong["mask_iou"]) == (2, 0.7, 0.95)
    missed = lists["missed"][0]
    assert (missed["annotation"], missed["category_id"], missed["area"], missed["size"]) == (101, 7, 400, "small")
    assert (missed["detection"], missed["score"], missed["mask_iou"]) == (3, 0.6, 0.3333)


def test_box_and_mask_errors_are_listed_by_their_difference():
    gt = truth((1, 3, BOX), (1, 7, (50, 50, 40, 40)), (2, 3, BOX), images=2)
    results = [
        detection(1, 3, BOX, 0.9, mask=(10, 10, 40, 30)),  # box 1, mask 3/4
        detection(1, 7, (50, 50, 40, 20), 0.8, mask=(50, 50, 40, 40)),  # box 1/2, mask 1
        detection(2, 3, BOX, 0.7, mask=(10, 10, 40, 10)),  # box 1, mask 1/4: not matched by masks
    ]
    lists = listed(find_failures(gt, results, Rules()))
    poor_masks, poor_boxes = lists["good box, poor mask"], lists["good mask, poor box"]
    assert [(entry["detection"], entry["box_iou"], entry["mask_iou"]) for entry in poor_masks] == [
        (2, 1.0, 0.25),
        (0, 1.0, 0.75),
    ]
    assert [(entry["detection"], entry["box_iou"], entry["mask_iou"]) for entry in poor_boxes] == [(1, 0.5, 1.0)]
    assert [entry["detection"] for entry in lists["poor localisation"]] == [2]
    stricter = listed(find_failures(gt, results, Rules(gap=0.3)))
    assert [entry["detection"] for entry in stricter["good box, poor mask"]] == [2]


def test_a_crowd_region_is_never_missed_and_forgives_any_number_of_detections():
    gt = truth((1, 3, (0, 0, 60, 60), True), (1, 3, (80, 80, 10, 10)))
    inside = [detection(1, 3, (5 * n, 5, 10, 10), 0.9 - n / 10) for n in range(3)]
    failures = find_failures(gt, [*inside, detection(1, 7, (20, 20, 10, 10), 0.8)], Rules())
    assert kinds_of(failures) == ["", "", "", "background"]
    assert failures.missed == [1]
    row = count(failures)["all"]
    assert (row["objects"], row["found"], row["missed"], row["detections"], row["background"]) == (1, 0, 1, 1, 1)


def test_an_object_found_below_the_score_is_missed_and_says_at_what_score_it_is_found():
    gt = truth((1, 3, BOX), (1, 3, (60, 60, 20, 20)))
    lists = listed(find_failures(gt, [detection(1, 3, BOX, 0.25)], Rules()))
    assert [(entry["annotation"], entry["found_at"]) for entry in lists["missed"]] == [(100, 0.25), (101, None)]
    assert [entry["detection"] for entry in lists["missed"]] == [None, None]


def test_counts_by_category_and_size():
    gt = truth((1, 3, BOX), (1, 7, (60, 60, 20, 20)), (2, 7, (0, 0, 99, 99)), images=2)
    failures = find_failures(gt, [detection(1, 3, BOX, 0.9), detection(2, 3, (40, 40, 20, 20), 0.8)], Rules())
    counts = count(failures)
    assert counts["all"] | {"objects": 3, "found": 1, "missed": 2, "untouched": 2, "background": 1} == counts["all"]
    assert counts["all"]["mask_iou"] == 1
    assert [counts["categories"][key]["missed"] for key in (3, 7)] == [0, 2]
    assert counts["categories"][3]["background"] == 1
    assert counts["categories"][7]["mask_iou"] is None
    assert [counts["sizes"][size]["missed"] for size in ("small", "medium", "large")] == [1, 0, 1]
    assert counts["sizes"]["small"]["background"] == 1


@pytest.mark.parametrize("masks", [True, False])
def test_without_results_every_object_is_missed(masks):
    failures = find_failures(truth((1, 3, BOX), (1, 7, (60, 60, 20, 20))), [], Rules(masks=masks))
    assert [entry["annotation"] for entry in listed(failures)["missed"]] == [100, 101]  # the larger one first
    assert count(failures)["all"]["missed"] == 2


def test_without_objects_everything_is_background():
    failures = find_failures(truth(), [detection(1, 3, BOX, 0.9)], Rules())
    assert kinds_of(failures) == ["background"]
    assert count(failures)["sizes"]["medium"]["background"] == 1


def test_results_without_masks_are_matched_by_boxes():
    results = [{"image_id": 1, "category_id": 3, "bbox": list(BOX), "score": 0.5}]
    failures = find_failures(truth((1, 3, BOX)), results, Rules(masks=False))
    assert failures.missed == []
    assert "good box, poor mask" not in listed(failures)


def test_results_without_boxes_take_those_of_their_masks():
    results = [{"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": rle(*BOX)}]
    failures = find_failures(truth((1, 3, BOX)), results, Rules())
    assert count(failures)["all"]["box_iou"] == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_matching_is_pycocotools(seed, masks, threshold):
    random = np.random.default_rng(seed)

    def box() -> tuple[int, int, int, int]:
        x, y = random.integers(0, 40, 2).tolist()
        return (x, y, *random.integers(20, 60, 2).tolist())

    gt = truth(*((n % 3 + 1, (3, 7)[n % 2], box(), random.random() < 0.2) for n in range(40)), images=4)
    results = [
        detection(int(random.integers(1, 5)), int(random.choice([3, 7])), box(), float(random.integers(1, 20)) / 20)
        for _ in range(300)  # many of equal score
    ]
    failures = find_failures(gt, results, Rules(iou=threshold, masks=masks))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(gt, gt.loadRes([dict(entry) for entry in results]), "segm" if masks else "bbox")
        evaluation.params.iouThrs = np.array([threshold])
        evaluation.evaluate()
    theirs = {}
    for image in filter(None, evaluation.evalImgs):
        if image["aRng"] == evaluation.params.areaRng[0]:
            theirs |= dict(zip(image["dtIds"], image["dtMatches"][0].astype(int).tolist(), strict=True))
    ids = [annotation["id"] for annotation in gt.dataset["annotations"]]
    ours = {number + 1: ids[thing] if thing >= 0 else 0 for number, thing in enumerate(failures.matched)}
    assert ours == theirs
    assert sum(number > 0 for number in ours.values()) > 20


def test_a_detection_takes_part_among_the_best_hundred_of_its_image_and_category_only():
    gt = truth((1, 3, BOX))
    results = [detection(1, 3, (80, 80, 5, 5), 0.9)] * 100 + [detection(1, 3, BOX, 0.8)]
    failures = find_failures(gt, results, Rules())
    assert failures.missed == [0]
    assert kinds_of(failures)[-1] == ""
    assert count(failures)["all"]["background"] == 100
    assert match(failures.pairs, failures.pairs.mask_iou, failures.truth, failures.found, 0.5).max() == -1
