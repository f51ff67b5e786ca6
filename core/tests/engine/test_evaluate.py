from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from onestage.engine.coco_eval import CocoEvaluator
from onestage.engine.evaluate import detect_twice, evaluate
from onestage.errors import DatasetError, UsageError
from onestage.masks import Masks
from onestage.structures import Detections


class Oracle(torch.nn.Module):
    """Finds exactly the bright square."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def detect(self, images, masks=True):
        assert not self.training
        assert not torch.is_grad_enabled()
        return [self.square(image[0] > 130) for image in images]

    def square(self, bright):
        rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
        x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        box = torch.cat([x1, y1, x2, y2]).float()[None]
        label = ((x1 + x2) / 2 > bright.shape[1] / 2).long()
        return Detections(tuple(bright.shape), box, torch.tensor([0.9]), label, Masks.from_bool(bright[None]))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 3), (2, 2)])
def test_perfect_detections_score_one(tiny, workers, batch_size):
    model = Oracle().train()
    metrics, results = evaluate(
        model, tiny.TinySet(7), workers=workers, batch_size=batch_size, per_class=True, progress=False
    )
    assert metrics["bbox/AP"] == metrics["segm/AP"] == metrics["segm/AP/left"] == pytest.approx(1)
    assert [entry["image_id"] for entry in results] == list(range(7))
    assert model.training


class LeftEye(Oracle):
    """Sees the left half of an image only; `config` says how mirror images are merged."""

    config = SimpleNamespace(inference=SimpleNamespace(iou_threshold=0.5, max_detections=3))

    def square(self, bright):
        bright = bright.clone()
        bright[:, bright.shape[1] // 2 :] = False
        nothing = Detections(tuple(bright.shape), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        found = super().square(bright) if bright.any() else replace(nothing, masks=Masks.from_bool(bright[None][:0]))
        return replace(found, labels=0 * found.labels)


@torch.no_grad()
def test_test_time_augmentation_maps_back_what_the_mirror_image_shows():
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)
    image[:, 2:6, 9:14] = 200
    model = LeftEye().eval()
    assert len(model.detect([image])[0]) == 0
    (found,) = detect_twice(model, [image])
    assert found.boxes.tolist() == [[9, 2, 14, 6]]
    assert torch.equal(found.masks.to_bool()[0], image[0] > 0)


@torch.no_grad()
def test_test_time_augmentation_keeps_the_better_of_two_that_overlap_and_at_most_so_many(tiny):
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)
    image[:, 2:6, 1:5] = 200
    image[:, 2:6, 12:15] = 200
    (found,) = detect_twice(LeftEye().eval(), [image])
    assert found.boxes.tolist() == [[1, 2, 5, 6], [12, 2, 15, 6]]  # one of each eye
    whole = Oracle()  # its class follows from the side: two equal boxes of two classes
    whole.config = LeftEye.config
    metrics, results = evaluate(whole, tiny.TinySet(12), tta=True, progress=False)
    assert len(results) == 2 * 12
    assert metrics["segm/AR100"] == pytest.approx(1)
    whole.config = SimpleNamespace(inference=SimpleNamespace(iou_threshold=0.5, max_detections=1))
    assert len(evaluate(whole, tiny.TinySet(12), tta=True, progress=False)[1]) == 12


def test_the_numbers_are_those_of_the_results(tiny):
    torch.manual_seed(0)
    model, data = tiny.TinyModel(tiny.TinyConfig()), tiny.TinySet(30)
    metrics, results = evaluate(model, data, progress=False)
    again = CocoEvaluator(data.coco_gt(), data.categories)
    again.merge(results)
    assert again.summarize() == metrics


def test_a_model_without_masks_has_no_mask_ap(tiny):
    class Boxes(Oracle):
        def square(self, bright):
            return replace(super().square(bright), masks=None)

    metrics, results = evaluate(Boxes(), tiny.TinySet(7), progress=False)
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert "segm/AP" not in metrics
    assert "segmentation" not in results[0]
    with pytest.raises(UsageError, match="finds boxes and no masks"):
        evaluate(Boxes(), tiny.TinySet(7), iou_types=("segm",), progress=False)


def test_the_ground_truth_is_made_once(tiny):
    class Counting(tiny.TinySet):
        made = 0

        def coco_gt(self):
            self.made += 1
            return super().coco_gt()

    data = Counting(3)
    evaluate(Oracle(), data, progress=False)
    assert data.made == 1


def test_no_images_is_an_error_not_a_zero(tiny):
    with pytest.raises(DatasetError, match="has no images"):
        evaluate(Oracle(), tiny.TinySet(0), progress=False)


def run_and_check(tiny):
    from onestage.engine import distributed

    distributed.start("cpu")
    torch.manual_seed(0)
    model, data = tiny.TinyModel(tiny.TinyConfig()), tiny.TinySet(7)
    metrics, results = evaluate(model, data, progress=False)
    distributed.stop()
    alone = evaluate(model, data, progress=False)
    assert metrics == alone[0]
    assert results == alone[1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_share_the_images_and_both_know_the_result(tiny, fork, monkeypatch):
    assert fork(run_and_check, tiny, processes=2) == [0, 0]


def test_unreadable_images_are_two_line_errors_from_workers_too(tiny):
    class Broken(tiny.TinySet):
        def __getitem__(self, index):
            raise DatasetError("image 'a.jpg' cannot be read", "replace the file")

        def subset(self, indices):
            return self

    for workers in (0, 1):
        with pytest.raises(DatasetError) as caught:
            evaluate(Oracle(), Broken(2), workers=workers, progress=False)
        assert str(caught.value) == "image 'a.jpg' cannot be read\n  fix: replace the file"
