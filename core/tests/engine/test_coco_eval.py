"""AP and AR: pycocotools' numbers, silent, for what is written to a file."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from onestage.data.coco import CocoDataset, coco_object, locate
from onestage.data.synth import ShapesDataset
from onestage.engine.coco_eval import Backend, CocoEvaluator, evaluate_results_file, match_categories
from onestage.errors import DatasetError, MachineError
from onestage.masks import Masks
from onestage.structures import Detections

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
CATEGORIES = ((4, "dog"), (9, "cat"))


def square(x: int, y: int, side: int) -> torch.Tensor:
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[y : y + side, x : x + side] = True
    return mask


def ground_truth() -> COCO:
    """A dog of 10 x 10 px in image 3, nothing in image 8."""
    rle = Masks.from_bool(square(2, 2, 10)[None]).to_rle()[0]
    one = {"id": 1, "image_id": 3, "category_id": 4, "bbox": [2, 2, 10, 10], "area": 100, "iscrowd": 0}
    images = [{"id": key, "height": 20, "width": 20, "file_name": f"{key}.jpg"} for key in (3, 8)]
    return coco_object(images, [one | {"segmentation": rle}], CATEGORIES)


def found(*squares: tuple[int, int, int], scores: list[float], labels: list[int]) -> Detections:
    boxes = torch.tensor([[x, y, x + side, y + side] for x, y, side in squares], dtype=torch.float32).reshape(-1, 4)
    masks = torch.stack([square(*s) for s in squares]) if squares else torch.zeros(0, 20, 20)
    return Detections((20, 20), boxes, torch.tensor(scores), torch.tensor(labels), Masks.from_bool(masks))


def pycocotools_stats(gt: COCO, results: list[dict], iou_type: str) -> list[float]:
    """Of the results in the form that COCO's segm and bbox tasks ask for: masks without boxes, boxes without masks."""
    other = {"segm": "bbox", "bbox": "segmentation"}[iou_type]
    results = [{key: value for key, value in entry.items() if key != other} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(gt, gt.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_the_instance_itself_is_ap_1(capsys):
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    evaluator.add(3, found((2, 2, 10), scores=[0.9], labels=[0]))
    metrics = evaluator.summarize()
    assert [metrics[key] for key in ("segm/AP", "bbox/AP", "segm/APs", "segm/AR1")] == pytest.approx([1, 1, 1, 1])
    assert metrics["segm/APl"] == -1
    assert capsys.readouterr().out == ""


def test_a_better_scored_detection_on_an_image_without_instances_halves_precision():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    evaluator.add(3, found((2, 2, 10), scores=[0.9], labels=[0]))
    evaluator.add(8, found((2, 2, 10), scores=[0.95], labels=[0]))
    assert evaluator.summarize()["segm/AP"] == pytest.approx(0.5)


def test_packed_masks_are_counted_where_they_lie(monkeypatch):
    detections = found((2, 2, 10), (1, 2, 3), scores=[0.75, 0.5], labels=[0, 1])
    of_pixels, of_words = (CocoEvaluator(ground_truth(), CATEGORIES) for _ in range(2))
    of_pixels.add(3, detections)
    assert detections.masks is not None
    packed = Masks((20, 20), detections.masks.windows, detections.masks.words)
    monkeypatch.delattr(Masks, "to")  # on a GPU it would copy what run lengths make needless
    of_words.add(3, replace(detections, masks=packed))
    assert of_words.results() == of_pixels.results()


def test_a_results_file_ranks_masks_by_their_own_scores_where_it_has_them(tmp_path):
    detections = found((2, 2, 10), (1, 2, 3), scores=[0.5, 0.75], labels=[0, 0])
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    evaluator.add(3, replace(detections, mask_scores=torch.tensor([0.9, 0.1])))
    (tmp_path / "results.json").write_text(json.dumps(evaluator.results()))
    metrics = evaluate_results_file(tmp_path / "results.json", ground_truth())
    assert metrics == evaluator.summarize()
    assert (metrics["segm/AP"], metrics["bbox/AP"]) == pytest.approx((1, 0.5))


def test_results_are_plain_json_with_the_data_sets_ids():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    evaluator.add(8, found((1, 2, 3), scores=[0.5], labels=[1]))
    evaluator.add(3, found((2, 2, 10), scores=[0.75], labels=[0]))
    results = json.loads(json.dumps(evaluator.results()))
    assert [r["image_id"] for r in results] == [3, 8]
    rle = results[1].pop("segmentation")
    assert results[1] == {"image_id": 8, "category_id": 9, "bbox": [1, 2, 3, 3], "score": 0.5}
    assert rle == Masks.from_bool(square(1, 2, 3)[None]).to_rle()[0]


def test_no_detections_are_ap_0():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    evaluator.add(3, found(scores=[], labels=[]))
    metrics = evaluator.summarize(per_class=True)
    assert metrics["segm/AP"] == metrics["bbox/AP"] == metrics["segm/AR100"] == metrics["segm/AP/dog"] == 0
    assert metrics["segm/AP/cat"] == -1


def test_adding_an_image_again_replaces_it():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    evaluator.add(3, found((0, 0, 5), scores=[0.9], labels=[0]))
    evaluator.add(3, found((2, 2, 10), scores=[0.9], labels=[0]))
    assert len(evaluator.results()) == 1
    assert evaluator.summarize()["segm/AP"] == pytest.approx(1)


def test_labels_of_a_model_with_other_ids_are_matched_by_name():
    evaluator = CocoEvaluator(ground_truth(), ((0, "cat"), (1, "dog")))
    evaluator.add(3, found((2, 2, 10), scores=[0.9], labels=[1]))
    assert evaluator.results()[0]["category_id"] == 4
    assert evaluator.summarize()["segm/AP"] == pytest.approx(1)


def test_other_category_names_stop_and_list_both():
    with pytest.raises(DatasetError) as error:
        match_categories(((1, "person"),), CATEGORIES)
    assert error.value.what == "the model knows 1 categories (1 person), the data set has 2 categories (4 dog, 9 cat)"
    with pytest.raises(DatasetError):
        match_categories(((4, "hound"), (9, "cat")), CATEGORIES)


def test_equal_tables_keep_their_ids_even_if_a_name_occurs_twice():
    twice = ((1, "person"), (2, "person"))
    assert match_categories(twice, twice) == (1, 2)
    with pytest.raises(DatasetError):
        match_categories(((1, "person"), (3, "person")), twice)


def test_boxes_alone_can_be_counted():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES, ("bbox",))
    boxes = Detections((20, 20), torch.tensor([[2.0, 2, 12, 12]]), torch.tensor([0.9]), torch.tensor([0]))
    evaluator.add(3, boxes)
    assert evaluator.summarize()["bbox/AP"] == pytest.approx(1)
    assert "segmentation" not in evaluator.results()[0]


def test_mask_scores_rank_masks_and_box_scores_boxes():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES)
    right, wrong = (2, 2, 10), (9, 9, 10)
    both = found(right, wrong, scores=[0.9, 0.8], labels=[0, 0])
    evaluator.add(
        3,
        Detections(
            both.image_size, both.boxes, both.scores, both.labels, both.masks, mask_scores=torch.tensor([0.1, 0.7])
        ),
    )
    metrics = evaluator.summarize()
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert metrics["segm/AP"] == pytest.approx(0.5)
    assert [r["score"] for r in evaluator.results("segm")] == pytest.approx([0.1, 0.7])
    assert [r["score"] for r in evaluator.results()] == pytest.approx([0.9, 0.8])


def noisy(dataset: ShapesDataset, random: np.random.Generator) -> CocoEvaluator:
    """Ground truth moved by some pixels, with random scores and some wrong labels."""
    evaluator = CocoEvaluator(dataset.coco_gt(), dataset.categories)
    for index in range(len(dataset)):
        image, target = dataset[index]
        shift = tuple(random.integers(-1, 2, 2).tolist())
        masks = torch.roll(target.masks, shift, (1, 2))
        labels = (target.labels + torch.from_numpy(random.random(len(target)) < 0.2)) % len(dataset.categories)
        boxes = target.boxes + torch.tensor([shift[1], shift[0]] * 2)
        scores = torch.from_numpy(random.random(len(target)).astype(np.float32))
        evaluator.add(
            target.image_id, Detections(tuple(image.shape[1:]), boxes, scores, labels, Masks.from_bool(masks))
        )
    return evaluator


def test_every_number_is_exactly_pycocotools_for_the_written_file(tmp_path):
    dataset = ShapesDataset(12, difficulty="medium", split="val")
    evaluator = noisy(dataset, np.random.default_rng(5))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(evaluator.results()))
    metrics = evaluator.summarize()
    for iou_type in ("bbox", "segm"):
        expected = pycocotools_stats(dataset.coco_gt(), json.loads(path.read_text()), iou_type)
        assert [metrics[f"{iou_type}/{name}"] for name in NAMES] == expected
    assert 0.1 < metrics["segm/AP"] < 0.9
    assert evaluate_results_file(path, dataset.coco_gt()) == metrics


def test_a_mask_is_small_medium_or_large_by_its_own_area():
    mask = torch.zeros(1, 60, 60, dtype=torch.bool)
    mask[:, :50, :9] = mask[:, 41:50, :50] = True  # an L of 819 px, small, in a box of 50 x 50, medium
    dog = torch.zeros(1, 60, 60, dtype=torch.bool)
    dog[:, 10:30, 20:40] = True
    rle = Masks.from_bool(dog).to_rle()[0]
    one = {"id": 1, "image_id": 3, "category_id": 4, "bbox": [20, 10, 20, 20], "area": 400, "iscrowd": 0}
    images = [{"id": 3, "height": 60, "width": 60, "file_name": "3.jpg"}]
    evaluator = CocoEvaluator(coco_object(images, [one | {"segmentation": rle}], CATEGORIES), CATEGORIES)
    boxes = torch.tensor([[0.0, 0, 50, 50], [20, 10, 40, 30]])
    masks = Masks.from_bool(torch.cat([mask, dog]))
    evaluator.add(3, Detections((60, 60), boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), masks))
    metrics = evaluator.summarize()
    assert metrics["segm/APs"] == pytest.approx(0.5)  # the L is a false detection among the small ones
    assert metrics["bbox/APs"] == pytest.approx(1)


def test_class_aps_average_to_ap():
    dataset = ShapesDataset(12, split="val")
    metrics = noisy(dataset, np.random.default_rng(6)).summarize(per_class=True)
    classes = [metrics[f"segm/AP/{name}"] for _, name in dataset.categories]
    assert np.mean(classes) == pytest.approx(metrics["segm/AP"])


def test_processes_merge_to_the_whole():
    dataset = ShapesDataset(6, split="val")
    whole = noisy(dataset, np.random.default_rng(7))
    first, second = (CocoEvaluator(dataset.coco_gt(), dataset.categories) for _ in range(2))
    results = whole.results()
    first.merge([r for r in results if r["image_id"] % 2])
    second.merge([r for r in results if not r["image_id"] % 2])
    first.merge(second.results())
    first.merge(second.results())
    assert first.results() == results
    assert first.summarize() == whole.summarize()


def test_fewer_detections_per_image_can_count():
    evaluator = CocoEvaluator(ground_truth(), CATEGORIES, max_dets=(1, 2))
    evaluator.add(3, found((9, 9, 10), (2, 2, 10), scores=[0.9, 0.8], labels=[0, 0]))
    metrics = evaluator.summarize()
    assert metrics["segm/AR1"] == 0
    assert metrics["segm/AR2"] == 1
    assert "segm/AR100" not in metrics


RLE = {"size": [20, 20], "counts": [400]}
SQUARE = {"size": [20, 20], "counts": [42, *[10, 10] * 9, 10, 168]}  # 10 x 10 px at 2, 2
ENTRY = {"image_id": 3, "category_id": 4, "score": 0.5, "bbox": [2, 2, 10, 10], "segmentation": RLE}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"annotations": []}, "is not a list of detections"),
        ([5], "entry 0 is not an object"),
        ([ENTRY, ENTRY | {"image_id": 4}], "entry 1 has image_id 4, which the data set does not have"),
        ([ENTRY | {"image_id": "3"}], "has image_id '3'"),
        ([ENTRY | {"category_id": 1}], "has category_id 1; known are 4, 9"),
        ([ENTRY | {"score": None}], "has score None"),
        ([ENTRY | {"score": float("nan")}], "has score nan"),
        ([ENTRY | {"bbox": [1, 2, 3]}], "has bbox [1, 2, 3]"),
        ([ENTRY | {"bbox": [1, 2, float("inf"), 3]}], "finite x, y, width, height"),
        ([ENTRY | {"bbox": None}], "finite x, y, width, height"),
        ([ENTRY | {"segmentation": {"size": [20, 20], "counts": [399]}}], "RLE runs that sum to 399"),
        ([ENTRY | {"segmentation": {"size": [30, 20], "counts": [600]}}], "RLE size [30, 20]"),
        ([ENTRY | {"segmentation": [[1, 2, 3]]}], "not a COCO RLE"),
    ],
)
def test_foreign_results_are_checked_before_pycocotools_sees_them(tmp_path, content, why):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError) as error:
        evaluate_results_file(path, ground_truth())
    assert why in error.value.what
    assert str(path) in error.value.what


def test_masks_are_counted_with_or_without_boxes_beside_them_and_compressed_or_not(tmp_path):
    alone = {key: value for key, value in ENTRY.items() if key != "bbox"}
    path = tmp_path / "results.json"
    compressed = Masks.from_rle([SQUARE], (20, 20)).to_rle()[0]
    for first, second in ((ENTRY, alone), (alone, ENTRY), (alone, alone)):
        for rle in (SQUARE, compressed):
            path.write_text(json.dumps([first | {"segmentation": RLE, "score": 0.1}, second | {"segmentation": rle}]))
            assert evaluate_results_file(path, ground_truth(), ("segm",))["segm/AP"] == pytest.approx(1)


def test_only_what_is_counted_has_to_be_sound(tmp_path):
    path = tmp_path / "results.json"
    for kind, unused in (("segm", {"bbox": []}), ("segm", {"bbox": None}), ("bbox", {"segmentation": [[1, 1, 5, 1]]})):
        path.write_text(json.dumps([ENTRY | unused]))
        assert evaluate_results_file(path, ground_truth(), (kind,))[f"{kind}/AP"] >= 0


def test_other_keys_of_an_entry_change_nothing(tmp_path):
    plain = [entry | {"segmentation": SQUARE} for entry in (ENTRY, ENTRY | {"image_id": 8})]
    metrics = []
    for results in (plain, [entry | {"caption": "a dog"} for entry in plain]):
        (tmp_path / "results.json").write_text(json.dumps(results))
        metrics.append(evaluate_results_file(tmp_path / "results.json", ground_truth()))
    assert metrics[0] == metrics[1]
    assert metrics[0]["bbox/AP"] == pytest.approx(1)


@pytest.mark.parametrize("backend", get_args(Backend))
def test_annotations_may_be_numbered_from_0(backend):
    if backend != "pycocotools":
        pytest.importorskip("faster_coco_eval")
    gt = ground_truth()
    gt = coco_object(gt.dataset["images"], [{**gt.dataset["annotations"][0], "id": 0}], CATEGORIES)
    evaluator = CocoEvaluator(gt, CATEGORIES, backend=backend)
    evaluator.add(3, found((2, 2, 10), scores=[0.9], labels=[0]))
    metrics = evaluator.summarize()
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert metrics["segm/AP"] == pytest.approx(1)
    assert list(gt.anns) == [0]


def test_boxes_without_masks_have_no_mask_ap(tmp_path):
    boxes = Detections((20, 20), torch.tensor([[2.0, 2, 12, 12]]), torch.tensor([0.9]), torch.tensor([0]))
    evaluator, other = (CocoEvaluator(ground_truth(), CATEGORIES) for _ in range(2))
    evaluator.add(3, boxes)
    metrics = evaluator.summarize(per_class=True)
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert not [name for name in metrics if name.startswith("segm")]
    other.merge(evaluator.results())
    assert other.summarize(per_class=True) == metrics
    path = tmp_path / "results.json"
    path.write_text(json.dumps(evaluator.results()))
    assert evaluate_results_file(path, ground_truth(), per_class=True) == metrics
    with pytest.raises(DatasetError, match="not a COCO RLE"):
        evaluate_results_file(path, ground_truth(), ("segm",))


def test_an_empty_results_file_is_ap_0(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    assert evaluate_results_file(tmp_path / "results.json", ground_truth())["segm/AP"] == 0


@pytest.mark.parametrize("name", ["coco_dev", "pennfudan"])
def test_real_ground_truth_against_itself_is_ap_1(shared, name):
    split = locate(shared / "data" / name, "val")
    dataset = CocoDataset(split.json, split.images)
    gt = dataset.coco_gt()
    evaluator = CocoEvaluator(gt, dataset.categories)
    evaluator.merge(
        [
            {
                "image_id": one["image_id"],
                "category_id": one["category_id"],
                "bbox": one["bbox"],
                "score": 1.0,
                "segmentation": gt.annToRLE(one),
            }
            for one in gt.anns.values()
            if not one["iscrowd"]
        ]
    )
    metrics = evaluator.summarize()
    for iou_type in ("bbox", "segm"):
        assert [metrics[f"{iou_type}/{key}"] for key in ("AP", "AP50", "AR100")] == [1, 1, 1]


def test_both_backends_count_the_same(capsys):
    pytest.importorskip("faster_coco_eval")
    images = ShapesDataset(30, split="val", size=64)
    evaluators = [CocoEvaluator(images.coco_gt(), images.categories, backend=b) for b in get_args(Backend)]
    generator = torch.Generator().manual_seed(0)
    for index, image_id in enumerate(images.image_ids):
        _, target = images[index]
        moved = target.masks.bool().roll(tuple(torch.randint(-2, 3, (2,), generator=generator).tolist()), (1, 2))
        scores = torch.rand(len(target), generator=generator).sort(descending=True).values
        labels = torch.where(torch.rand(len(target), generator=generator) < 0.2, 0, target.labels)
        for evaluator in evaluators:
            evaluator.add(image_id, Detections((64, 64), target.boxes + 1, scores, labels, Masks.from_bool(moved)))
    one, other = (evaluator.summarize(per_class=True) for evaluator in evaluators)
    assert 0 < one["segm/AP"] < 1
    assert other == pytest.approx(one, abs=1e-12)  # sums in another order
    assert capsys.readouterr().out == ""


def test_a_backend_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MachineError) as caught:
        CocoEvaluator(ground_truth(), CATEGORIES, backend="faster-coco-eval")
    assert caught.value.fix == "pip install faster-coco-eval"
