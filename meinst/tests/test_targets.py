from dataclasses import replace

import numpy as np
import torch

from meinst.config import R50
from meinst.model import RawOutput
from meinst.targets import assign_targets, box_masks, polygon_mask
from onestage.nn import fcos
from onestage.structures import Target

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]  # of a 128 x 128 input
SQUARE = (10.0, 20.0, 38.0, 20.0, 38.0, 48.0, 10.0, 48.0)  # 28 x 28


def _raw():
    nothing = torch.zeros(())
    return RawOutput(nothing, nothing, nothing, None, [], fcos.locations(SIZES), SIZES)


def _target(boxes, polygons=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 128, 128, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0 : (x0 + x1) // 2] = 1  # the left half
    labels = torch.arange(len(boxes)) % 3
    return Target(boxes, labels, masks, torch.zeros(len(boxes), dtype=torch.bool), polygons=polygons)


def test_a_polygon_that_fills_its_box_fills_the_grid():
    assert polygon_mask([SQUARE], np.array([10, 20, 38, 48], np.float32), 28).tolist() == [[1] * 28] * 28


def test_the_left_half_of_a_stretched_box_is_the_left_half_of_the_grid():
    half = (0.0, 0.0, 50.0, 0.0, 50.0, 30.0, 0.0, 30.0)
    mask = polygon_mask([half], np.array([0, 0, 100, 30], np.float32), 4)
    assert mask.tolist() == [[1, 1, 0, 0]] * 4


def test_parts_of_an_instance_are_joined_and_what_leaves_the_box_is_cut():
    left, right = (0.0, 0, 1, 0, 1, 4, 0, 4), (3.0, 0, 9, 0, 9, 4, 3, 4)
    mask = polygon_mask([left, right], np.array([0, 0, 4, 4], np.float32), 4)
    assert mask.tolist() == [[1, 0, 0, 1]] * 4


def test_a_box_without_width_is_taken_as_a_tenth_of_a_pixel():
    mask = polygon_mask([SQUARE], np.array([20, 20, 20, 48], np.float32), 4)
    assert mask.shape == (4, 4)


def test_polygons_count_where_there_are_some_and_bitmaps_elsewhere():
    target = _target([[10, 20, 38, 48], [60, 60, 88, 88]], polygons=((SQUARE,), None))
    whole, half = box_masks(target, 28)
    assert whole.all()
    assert half.tolist() == [[1] * 14 + [0] * 14] * 28
    assert torch.equal(box_masks(replace(target, polygons=None), 28)[1], half)


def test_every_positive_has_the_mask_of_the_instance_it_answers_for():
    targets = assign_targets([_target([[20, 20, 44, 44]]), _target([[8, 8, 60, 60], [70, 8, 120, 58]])], _raw(), R50)
    labels, index = targets.assignment.labels, targets.assignment.index
    assert len(targets.masks) == (labels >= 0).sum()
    assert set(index[1][index[1] >= 0].tolist()) == {0, 1}
    assert (targets.masks[:, :, :14] == 1).all()
    assert (targets.masks[:, :, 14:] == 0).all()


def test_images_without_instances_anywhere_in_the_batch_are_background():
    targets = assign_targets([_target([]), _target([[20, 20, 44, 44]]), _target([])], _raw(), R50)
    assert (targets.assignment.labels[[0, 2]] == -1).all()
    assert len(targets.masks) == (targets.assignment.labels[1] >= 0).sum() > 0
    assert assign_targets([_target([])], _raw(), R50).masks.shape == (0, 28, 28)


def test_level_limits_move_boxes_between_levels():
    box = _target([[20, 20, 60, 60]])
    first = assign_targets([box], _raw(), R50).assignment.labels[0] >= 0
    second = assign_targets([box], _raw(), replace(R50, level_limits=(16, 32, 64, 128))).assignment.labels[0] >= 0
    assert first.nonzero().max() < 256  # P3
    assert second.nonzero().min() >= 256


def test_the_detector_alone_needs_no_masks():
    targets = assign_targets([_target([[20, 20, 44, 44]])], _raw(), replace(R50, mask_branch=False))
    assert targets.masks.shape == (0, 28, 28)
