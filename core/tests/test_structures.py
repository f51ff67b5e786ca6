import pytest
import torch

from onestage import structures
from onestage.errors import MachineError, UsageError
from onestage.masks import Masks
from onestage.structures import Detections, ImageFrame, Target, training_targets, usable

BOX = [[1.0, 2.0, 5.0, 6.0]]


def _dict(**changes):
    return {"boxes": torch.tensor(BOX), "labels": torch.tensor([1]), "masks": torch.ones(1, 8, 8)} | changes


def _detections(count=3):
    masks = torch.zeros(count, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 1:4] = True
    scores = torch.linspace(0.9, 0.1, count)
    boxes = torch.tensor(BOX).repeat(count, 1)
    return Detections((8, 8), boxes, scores, torch.arange(count), Masks.from_bool(masks))


def test_a_public_target_is_completed():
    target = Target.from_dict(_dict(), (8, 8), 3)
    assert target.masks.dtype == torch.uint8
    assert target.iscrowd.tolist() == [False]
    assert target.image_id == -1


def test_masks_may_be_coco_rle():
    rle = _detections(1).masks.to_rle()
    target = Target.from_dict(_dict(masks=rle), (8, 8), 3)
    assert target.masks.sum() == 9


def test_no_instances_are_legal():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "masks": torch.zeros(0, 8, 8)}
    assert len(Target.from_dict(empty, (8, 8), 3)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([3])}, "1-based"),
        ({"labels": torch.tensor([7])}, r"label 7 is outside 0\.\.2"),
        ({"labels": torch.tensor([-1])}, "outside"),
        ({"labels": torch.tensor([0, 1])}, "1 boxes, 2 labels"),
        ({"boxes": torch.tensor([[5.0, 2.0, 1.0, 6.0]])}, "x2 < x1"),
        ({"boxes": torch.tensor([[float("nan"), 2.0, 1.0, 6.0]])}, "not finite"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        Target.from_dict(_dict(**changes), (8, 8), 3)


def test_a_missing_key_is_named():
    with pytest.raises(UsageError, match="no labels"):
        Target.from_dict({"boxes": torch.tensor(BOX), "masks": torch.ones(1, 8, 8)}, (8, 8), 3)


def test_crowds_and_boxes_under_a_pixel_do_not_train():
    boxes = torch.tensor([[0, 0, 10, 10], [5, 5, 5.5, 30], [0, 0, 40, 40]])
    target = Target(
        boxes,
        torch.tensor([0, 1, 2]),
        torch.zeros(3, 50, 50).byte(),
        torch.tensor([False, False, True]),
        polygons=(((1.0,),), None, None),
    )
    assert usable(target).labels.tolist() == [0]
    assert usable(target).polygons == (((1.0,),),)
    assert training_targets([target], [torch.zeros(3, 50, 50)], 3)[0].labels.tolist() == [0]


def test_boxes_return_to_the_image_by_both_factors_and_are_cut():
    frame = ImageFrame((64, 256), (128, 128), (128, 160), (2.0, 0.5))
    boxes = torch.tensor([[40.0, 40.0, 88.0, 80.0], [-3.0, 100.0, 140.0, 130.0]])
    assert frame.to_image(boxes).tolist() == [[80.0, 20.0, 176.0, 40.0], [0.0, 50.0, 256.0, 64.0]]


def test_detections_are_cut_and_indexed_with_their_masks():
    found = _detections()
    assert found[:2].scores.tolist() == pytest.approx([0.9, 0.5])
    assert len(found[found.scores > 0.4].masks) == 2
    assert found[torch.tensor([2])].labels.tolist() == [2]


def test_public_forms_of_masks():
    found = _detections()
    assert found.as_dict()["masks"].shape == (3, 8, 8)
    assert found.as_dict("rle")["masks"][0]["size"] == [8, 8]
    assert "masks" not in found.as_dict("none")
    with pytest.raises(UsageError, match="mask_output 'polygon' is unknown"):
        found.as_dict("polygon")


def test_a_dense_tensor_over_budget_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr(structures, "MASK_MEMORY", 100)
    with pytest.raises(MachineError, match="3 dense masks of 8 x 8 px"):
        _detections().as_dict()
    assert len(_detections().as_dict("rle")["masks"]) == 3


def test_training_without_targets_says_what_is_missing():
    with pytest.raises(UsageError, match="training needs targets"):
        training_targets(None, [torch.zeros(3, 4, 4)], 2)
