from dataclasses import replace

import pytest
import torch

from onestage import structures
from onestage.errors import MachineError, UsageError
from onestage.masks import Masks
from onestage.ops import host
from onestage.structures import Detections, ImageFrame, Reference, Target, training_targets, usable

BOX = [[1.0, 2.0, 5.0, 6.0]]


def _dict(**changes):
    return {"boxes": torch.tensor(BOX), "labels": torch.tensor([1]), "masks": torch.ones(1, 8, 8)} | changes


def _detections(count=3):
    masks = torch.zeros(count, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 1:4] = True
    scores = torch.linspace(0.9, 0.1, count)
    boxes = torch.tensor(BOX).repeat(count, 1)
    return Detections((8, 8), boxes, scores, torch.arange(count), Masks.from_bool(masks))


def test_mirrored_detections_by_hand():
    found = replace(_detections(1), unrefined_boxes=torch.tensor(BOX) + 1, mask_scores=torch.tensor([0.5]))
    mirrored = found.mirrored()
    assert mirrored.boxes.tolist() == [[3.0, 2.0, 7.0, 6.0]]
    assert mirrored.unrefined_boxes.tolist() == [[2.0, 3.0, 6.0, 7.0]]
    assert mirrored.masks.windows.tolist() == [[4, 2, 7, 5]]
    assert mirrored.mask_scores.tolist() == [0.5]
    assert found.boxes.tolist() == BOX


def test_detections_of_an_image_can_be_joined_and_lose_what_only_some_have():
    first, second = replace(_detections(2), mask_scores=torch.ones(2)), _detections(1).mirrored()
    both = Detections.cat((first, second))
    assert len(both) == 3
    assert torch.equal(both.boxes, torch.cat((first.boxes, second.boxes)))
    assert torch.equal(both.masks.to_bool(), torch.cat((first.masks.to_bool(), second.masks.to_bool())))
    assert both.mask_scores is None


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_detections_travel_to_the_host_together(count, packed, monkeypatch):
    found = replace(_detections(count), embeddings=torch.rand(count, 5))
    if packed:
        found = replace(found, masks=Masks((8, 8), found.masks.windows, found.masks.words))
    waits = []
    monkeypatch.setattr(host, "keeps_fixed_shapes", lambda device: True)
    monkeypatch.setattr(host, "to_host", lambda *tensors: waits.append(len(tensors)) or tensors)
    arrived = found.to("cpu")
    assert waits == [6]
    for name in ("boxes", "scores", "labels", "embeddings"):
        assert torch.equal(getattr(arrived, name), getattr(found, name))
    assert arrived.masks.is_packed == packed
    assert torch.equal(arrived.masks.to_bool(), found.masks.to_bool())


def test_larger_masks_than_usual_are_waited_for_again(monkeypatch):
    full = Masks.from_bool(torch.ones(20, 40, 8))
    masks = Masks(full.size, full.windows, full.words)
    waits = []
    monkeypatch.setattr(host, "to_host", lambda *tensors: waits.append(len(tensors)) or tensors)
    arrived = masks.arrived(*masks.sent())
    assert waits == [1]
    assert torch.equal(arrived.to_bool(), full.to_bool())


def test_a_public_target_is_completed():
    target = Target.from_dict(_dict(), (8, 8), 3)
    assert target.masks.dtype == torch.uint8
    assert target.iscrowd.tolist() == [False]
    assert target.image_id == -1


def test_masks_may_be_coco_rle():
    rle = _detections(1).masks.to_rle()
    target = Target.from_dict(_dict(masks=rle), (8, 8), 3)
    assert target.masks.sum() == 9


def test_masks_may_hold_any_number_where_the_instance_is():
    mask = torch.eye(8)[None]
    for value in (255, 0.4):
        assert Target.from_dict(_dict(masks=mask * value), (8, 8), 3).masks.equal(mask.byte())


def test_no_instances_are_legal():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "masks": torch.zeros(0, 8, 8)}
    assert len(Target.from_dict(empty, (8, 8), 3)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([3])}, "1-based"),
        ({"labels": torch.tensor([7])}, r"label 7 is outside 0\.\.2"),
        ({"labels": torch.tensor([-1])}, "outside"),
        ({"labels": [-1, 2], "boxes": BOX * 2, "masks": torch.ones(2, 8, 8)}, "label -1 is outside"),
        ({"masks": torch.ones(1, 6, 8)}, r"masks are \(1, 6, 8\), the image is \(8, 8\)"),
        ({"labels": torch.tensor([0, 1])}, "1 boxes, 2 labels"),
        ({"boxes": torch.tensor([[5.0, 2.0, 1.0, 6.0]])}, "x2 < x1"),
        ({"boxes": torch.tensor([[float("nan"), 2.0, 1.0, 6.0]])}, "not finite"),
        ({"masks": torch.ones(1, 4, 16)}, r"masks are \(1, 4, 16\), the image is \(8, 8\)"),
        ({"iscrowd": [0, 1]}, "1 labels and 2 iscrowd"),
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
    packed = found.as_dict("packed")
    again = Masks.from_bits(packed["masks"], packed["windows"], found.image_size)
    assert torch.equal(again.to_bool(), found.masks.to_bool())
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


def test_each_image_has_a_target():
    with pytest.raises(UsageError, match="2 images and 1 targets"):
        training_targets([_dict()], [torch.zeros(3, 8, 8)] * 2, 3)


def _pair(**changes):
    reference = {
        "image": torch.zeros(3, 8, 8),
        "boxes": [[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.5, 6.0]],
        "track_ids": [7, 9],
    }
    return _dict(track_ids=[7], reference=reference | changes)


def test_a_pair_of_frames_keeps_its_reference_through_selection():
    target = Target.from_dict(_pair(), (8, 8), 3)
    assert target.track_ids.tolist() == [7]
    assert target.reference.track_ids.tolist() == [7, 9]
    none = target[torch.zeros(1, dtype=torch.bool)]
    assert none.track_ids.tolist() == []
    assert none.reference is target.reference
    assert target.to("cpu").reference.boxes.shape == (2, 4)


def test_reference_boxes_under_a_pixel_do_not_train():
    target = usable(Target.from_dict(_pair(), (8, 8), 3))
    assert target.reference.track_ids.tolist() == [7]
    assert target.reference.boxes.tolist() == [[0, 0, 4, 4]]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (_dict(track_ids=[1, 2]), "1 labels and 2 track_ids"),
        ({k: v for k, v in _pair().items() if k != "track_ids"}, "no track_ids"),
        (_dict(track_ids=[7], reference={"image": torch.zeros(3, 8, 8)}), "reference frame has no boxes, track_ids"),
        (_pair(image=torch.zeros(3, 9, 8)), r"reference frame is \(9, 8\)"),
        (_pair(track_ids=[7]), "2 boxes and 1 track_ids"),
    ],
)
def test_a_pair_that_cannot_be_meant_is_refused(target, message):
    with pytest.raises(UsageError, match=message):
        Target.from_dict(target, (8, 8), 3)


def test_embeddings_and_track_ids_go_with_their_detections():
    found = replace(_detections(), embeddings=torch.eye(3), track_ids=torch.tensor([4, -1, 6]))
    kept = found[found.track_ids >= 0].to("cpu")
    assert kept.track_ids.tolist() == [4, 6]
    assert kept.embeddings.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert kept.as_dict("none").keys() == {"boxes", "labels", "scores", "embeddings", "track_ids"}
    assert isinstance(Target.from_dict(_pair(), (8, 8), 3).reference, Reference)
