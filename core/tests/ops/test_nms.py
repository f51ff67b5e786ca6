"""Greedy NMS in a fixed number of rows: by hand, and against the formulation whose number of rows depends on values."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.ops.nms import greedy_nms, top_by_score, top_nms

# IoU of neighbours: 0.6; of the outer two: 1/3.
ROW = torch.tensor([[0.0, 0.0, 8.0, 8.0], [2.0, 0.0, 10.0, 8.0], [4.0, 0.0, 12.0, 8.0]])


def few(boxes, scores, labels=None, **how):
    rules = {"iou_threshold": 0.5, "max_detections": 3, "room": 5} | how
    number, count = top_nms(boxes, scores, labels, **rules)
    assert number.shape == (rules["room"],)
    return number.tolist(), int(count)


def test_rows_behind_the_count_are_zero():
    assert few(ROW, torch.tensor([[0.7], [0.8], [0.9]])) == ([2, 0, 0, 0, 0], 2)
    assert few(ROW, torch.tensor([[0.7], [0.8], [-1.0]])) == ([1, 0, 0, 0, 0], 1)


def test_no_candidates_give_zeros():
    assert few(ROW, torch.full((3, 2), -1.0)) == ([0] * 5, 0)
    assert few(ROW[:0], torch.zeros(0, 2)) == ([0] * 5, 0)


def test_numbers_count_boxes_and_classes():
    assert few(ROW[:1], torch.tensor([[0.3, 0.6]])) == ([1, 0, 0, 0, 0], 2)
    assert few(ROW[[0, 0]], torch.tensor([[0.3], [0.6]]), torch.tensor([5, 7])) == ([1, 0, 0, 0, 0], 2)
    assert few(ROW[[0, 0]], torch.tensor([[0.3], [0.6]]), torch.tensor([5, 5])) == ([1, 0, 0, 0, 0], 1)


def test_equals_of_the_last_need_room():
    apart = torch.arange(6.0)[:, None] * 20 + ROW[:1]
    scores = torch.tensor([[0.5], [0.9], [0.5], [0.5], [0.5], [0.4]])
    assert few(apart, scores, max_detections=2) == ([1, 0, 0, 0, 0], 2)
    assert few(apart, scores, max_detections=2, keep_ties=True) == ([1, 0, 2, 3, 4], 5)
    number, count = few(apart, scores, max_detections=2, keep_ties=True, room=4)
    assert number == [1, 0, 2, 3]
    assert count > 4


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(0, 50), st.integers(1, 3), st.integers(0, 12), st.integers(0, 4), st.booleans(), st.integers(0, 2**20)
)
def test_rows_are_those_of_greedy_nms_cut_to_the_best(num_boxes, num_classes, most, spare, legacy, seed):
    boxes, scores = candidates(num_boxes, num_classes, seed)
    index, labels = (scores >= 0).nonzero(as_tuple=True)
    keep = greedy_nms(boxes[index], scores[index, labels], labels, 0.5, legacy=legacy)
    for ties in (False, True):
        best = keep[top_by_score(scores[index, labels][keep], most, ties)]
        expected = (index[best] * num_classes + labels[best]).tolist()
        room = most + spare
        number, count = few(boxes, scores, max_detections=most, room=room, keep_ties=ties, legacy=legacy)
        assert number == (expected + [0] * room)[:room]
        assert count == len(expected) if len(expected) <= room else count > room


def candidates(num_boxes, num_classes, seed):
    """Boxes whose IoUs often are equal or exactly one half, and scores of which many are equal or none."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (num_boxes, 2), generator=generator).float()
    boxes = torch.cat((corner, corner + torch.randint(1, 12, (num_boxes, 2), generator=generator)), dim=1)
    scores = torch.randint(0, 9, (num_boxes, num_classes), generator=generator) / 8
    return boxes, torch.where(scores > 0.3, scores, -1.0)


def test_the_custom_op_is_what_the_compiler_needs():
    boxes, scores = candidates(20, 2, 0)
    torch.library.opcheck(torch.ops.onestage.top_nms.default, (boxes, scores, None, 0.5, 4, 6, True, False))
    compiled = torch.compile(top_nms, fullgraph=True, backend="aot_eager")
    how = {"iou_threshold": 0.5, "max_detections": 4, "room": 6}
    for ours, eager in zip(compiled(boxes, scores, None, **how), top_nms(boxes, scores, None, **how), strict=True):
        assert torch.equal(ours, eager)
