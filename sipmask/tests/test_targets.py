from dataclasses import replace

import torch

from onestage.nn import fcos
from onestage.structures import Target
from sipmask.config import R50, SipMaskConfig
from sipmask.model import RawOutput
from sipmask.targets import assign_targets

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]  # of a 128 x 128 input


def _raw() -> RawOutput:
    nothing = torch.zeros(())
    return RawOutput(nothing, nothing, nothing, None, [], nothing, fcos.locations(SIZES), SIZES)


def _target(boxes: list[list[float]], labels: list[int]) -> Target:
    count = len(boxes)
    return Target(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.zeros(count, 128, 128, dtype=torch.uint8),
        torch.zeros(count, dtype=torch.bool),
    )


def _assign(targets: list[Target], raw: RawOutput, config: SipMaskConfig) -> fcos.Assignment:
    return assign_targets(targets, raw, config).assigned


def test_a_small_box_is_answered_by_the_cells_around_its_centre():
    targets = _assign([_target([[20.0, 20.0, 44.0, 44.0]], [2])], _raw(), R50)
    positive = (targets.labels[0] >= 0).nonzero().flatten()
    # Centre 32, radius 1.5 x 8 = 12: x and y strictly in (20, 44) on the grid 4, 12, 20, 28, 36, 44.
    points = _raw().points[positive]
    assert sorted(map(tuple, points.tolist())) == [(28, 28), (28, 36), (36, 28), (36, 36)]
    assert targets.labels[0, positive].tolist() == [2] * 4
    assert targets.ltrb[0, positive[0]].tolist() == [8.0, 8.0, 16.0, 16.0]


def test_the_smaller_of_two_boxes_wins():
    target = _target([[10.0, 10.0, 54.0, 54.0], [22.0, 22.0, 42.0, 42.0]], [0, 1])
    targets = _assign([target], _raw(), R50)
    at = (_raw().points == torch.tensor([28.0, 28.0])).all(1).nonzero()[0, 0]
    assert targets.index[0, at] == 1


def test_without_centre_sampling_the_whole_box_answers():
    box = _target([[8.0, 8.0, 56.0, 56.0]], [0])
    centred = _assign([box], _raw(), R50)
    whole = _assign([box], _raw(), replace(R50, center_radius=None))
    assert (whole.labels >= 0).sum() > (centred.labels >= 0).sum()


def test_an_image_without_instances_is_all_background():
    targets = _assign([_target([], [])], _raw(), R50)
    assert (targets.labels == -1).all()
    assert (targets.index == -1).all()
