"""Greedy and fast NMS against their definitions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.boxes import iou_matrix
from onestage.nn.nms import Kept, class_wise_nms, fast_nms, pair_nms, settled
from onestage.ops import host
from onestage.ops.nms import greedy_nms, top_by_score
from onestage.structures import Detections

# IoU of neighbours: 0.6; of the outer two: 1/3.
ROW = torch.tensor([[0.0, 0.0, 8.0, 8.0], [2.0, 0.0, 10.0, 8.0], [4.0, 0.0, 12.0, 8.0]])
SCORES = torch.tensor([0.9, 0.8, 0.7])


def test_greedy_keeps_what_only_a_removed_box_overlaps():
    assert greedy_nms(ROW, SCORES, None, 0.5).tolist() == [0, 2]


def test_fast_removes_what_a_removed_box_overlaps():
    kept = fast_nms(ROW, SCORES[:, None], iou_threshold=0.5, score_threshold=0.1, max_detections=10)
    assert kept.index.tolist() == [0]


def test_fast_looks_further_down_until_enough_survive():
    boxes = torch.cat((ROW[:1].expand(100, 4), ROW[:1] + 50))  # a crowd of equals, then one apart
    scores = torch.linspace(0.9, 0.2, 101)[:, None]
    kept = fast_nms(boxes, scores, iou_threshold=0.5, score_threshold=0.1, max_detections=2)
    assert kept.index.tolist() == [0, 100]


def test_greedy_threshold_is_exclusive():
    half = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]])  # IoU 0.5 exactly
    assert greedy_nms(half, SCORES[:2], None, 0.5).tolist() == [0, 1]
    assert greedy_nms(half, SCORES[:2], None, 0.49).tolist() == [0]


def test_legacy_geometry_overlaps_more():
    pair = torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0]])  # IoU 1/3, with + 1: 4/8
    assert greedy_nms(pair, SCORES[:2], None, 0.4).tolist() == [0, 1]
    assert greedy_nms(pair, SCORES[:2], None, 0.4, legacy=True).tolist() == [0]


def test_labels_do_not_compete_even_at_negative_coordinates():
    # As torchvision moves classes apart, the second would meet the first: offset by 1 x (largest coordinate + 1).
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [-9.0, -9.0, -1.0, -1.0]])
    assert greedy_nms(boxes, SCORES[:2], torch.tensor([0, 1]), 0.5).tolist() == [0, 1]
    assert greedy_nms(ROW[[0, 0]], SCORES[:2], torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_score_threshold_comes_before_the_factors():
    scores = torch.tensor([[0.06, 0.04]])
    rules = {"iou_threshold": 0.5, "score_threshold": 0.05, "max_detections": 10}
    kept = class_wise_nms(ROW[:1], scores, factors=torch.tensor([0.5]), **rules)
    assert (kept.index.tolist(), kept.labels.tolist()) == ([0], [0])
    torch.testing.assert_close(kept.scores, torch.tensor([0.03]))


def test_one_box_may_survive_under_two_classes_best_first():
    rules = {"iou_threshold": 0.5, "score_threshold": 0.05, "max_detections": 10}
    for method in (class_wise_nms, fast_nms):
        kept = method(ROW[:1], torch.tensor([[0.3, 0.6]]), **rules)
        assert (kept.index.tolist(), kept.labels.tolist()) == ([0, 0], [1, 0])


def test_the_best_are_kept_and_ties_only_on_demand():
    scores = torch.tensor([0.5, 0.9, 0.5, 0.5])
    assert top_by_score(scores, 2).tolist() == [1, 0]
    assert top_by_score(scores, 2, keep_ties=True).tolist() == [1, 0, 2, 3]
    assert top_by_score(scores, 9).tolist() == [1, 0, 2, 3]
    assert top_by_score(scores, 0, keep_ties=True).tolist() == []


@pytest.mark.parametrize("method", [class_wise_nms, fast_nms])
@pytest.mark.parametrize("num_boxes", [0, 3])
def test_nothing_above_the_threshold_gives_nothing(method, num_boxes):
    rules = {"iou_threshold": 0.5, "score_threshold": 0.5, "max_detections": 10}
    kept = method(torch.zeros(num_boxes, 4), torch.zeros(num_boxes, 4), **rules)
    assert kept.index.shape == kept.labels.shape == kept.scores.shape == (0,)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 4), st.booleans(), st.integers(0, 2**20))
def test_greedy_equals_a_loop(num_boxes, num_classes, legacy, seed):
    boxes, scores = _candidates(num_boxes, num_classes, seed)
    kept = class_wise_nms(boxes, scores, iou_threshold=0.4, score_threshold=0.2, max_detections=1000, legacy=legacy)
    expected = set()
    for label in range(num_classes):
        alive = [n for n in scores[:, label].argsort(descending=True).tolist() if scores[n, label] > 0.2]
        while alive:
            best, *rest = alive
            expected.add((best, label))
            iou = iou_matrix(boxes[best : best + 1], boxes, legacy)[0]
            alive = [n for n in rest if iou[n] <= 0.4]
    assert set(zip(kept.index.tolist(), kept.labels.tolist(), strict=True)) == expected
    assert (kept.scores.diff() <= 0).all()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**20))
def test_fast_equals_the_dense_matrix_formula(num_boxes, num_classes, top_k, seed):
    boxes, scores = _candidates(num_boxes, num_classes, seed)
    rules = {"iou_threshold": 0.4, "score_threshold": 0.2, "max_detections": 15}
    kept = fast_nms(boxes, scores, top_k=top_k, **rules)
    ordered, order = scores.T.sort(dim=1, descending=True)
    ordered, order = ordered[:, :top_k], order[:, :top_k]  # [K, top_k]
    overlap = torch.stack([iou_matrix(boxes[row], boxes[row]) for row in order]).triu(diagonal=1)
    alive = (overlap.amax(dim=1) <= 0.4) & (ordered > 0.2)
    label, place = alive.nonzero(as_tuple=True)
    best = ordered[label, place].argsort(descending=True)[:15]
    assert kept.index.tolist() == order[label, place][best].tolist()
    assert kept.labels.tolist() == label[best].tolist()
    assert kept.scores.tolist() == ordered[label, place][best].tolist()


@pytest.mark.golden
def test_fast_equals_the_released_code_without_a_second_score_threshold(golden):
    data = golden("rdsnet_yolact_lc")
    center, side = data["priors"].split(2, dim=1)
    for i, expected in enumerate(data["detections"]):
        scores = data["conf"][i].softmax(dim=1)[:, 1:]
        shift, log_ratio = data["loc"][i].split(2, dim=1)  # variances 0.1 and 0.2
        middle, half = center + shift * 0.1 * side, side * (log_ratio * 0.2).exp() / 2
        boxes = torch.cat((middle - half, middle + half), dim=1)
        good = (scores.amax(dim=1) > 0.05).nonzero().flatten()
        kept = fast_nms(boxes[good], scores[good], iou_threshold=0.5, score_threshold=0.0, max_detections=100)
        torch.testing.assert_close(kept.scores, expected["score"], rtol=0, atol=1e-5)
        assert kept.labels.tolist() == expected["cls"].tolist()
        torch.testing.assert_close(boxes[good][kept.index], expected["box_rel"], rtol=0, atol=1e-5)


def padded(kept):
    """What is kept, of rows and a count."""
    count = int(kept.count)
    assert count <= len(kept.index)
    for part in (kept.index, kept.labels, kept.scores):
        assert (part[count:] == 0).all()
    return [part[:count].tolist() for part in (kept.index, kept.labels, kept.scores)]


def parts(kept):
    assert kept.count is None
    return [part.tolist() for part in (kept.index, kept.labels, kept.scores)]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 2**20))
def test_a_fixed_number_of_rows_keeps_the_same(num_boxes, num_classes, legacy, ties, seed):
    boxes, scores = _candidates(num_boxes, num_classes, seed)
    if ties:
        boxes, scores = boxes.round(), (scores * 8).round() / 8
    for threshold, most in ((0.2, 15), (0.0, 1000), (0.9, 3), (1.0, 5)):
        rules = {"iou_threshold": 0.4, "score_threshold": threshold, "max_detections": most}
        expected = parts(fast_nms(boxes, scores, top_k=9, **rules))
        room = most
        while int((kept := fast_nms(boxes, scores, top_k=9, room=room, **rules)).count) > room:
            room *= 2
        assert padded(kept) == expected
        factors = torch.rand(num_boxes, generator=torch.Generator().manual_seed(seed))
        for how in ({}, {"factors": factors}):
            expected = class_wise_nms(boxes, scores, legacy=legacy, **how, **rules)
            assert padded(class_wise_nms(boxes, scores, legacy=legacy, room=most, **how, **rules)) == parts(expected)
        pairs = Kept(torch.arange(num_boxes), torch.arange(num_boxes) % 2, scores[:, 0])
        rules = {"iou_threshold": 0.4, "max_detections": most, "legacy": legacy, "keep_ties": True}
        expected = pair_nms(boxes, pairs, **rules)
        kept = pair_nms(boxes, pairs, room=most + num_boxes, **rules)
        assert padded(kept) == parts(expected)
        assert torch.equal(kept.take(boxes)[: len(expected.index)], expected.take(boxes))


def test_fast_nms_needs_no_second_look_at_a_crowd():
    boxes = torch.cat((ROW[:1].expand(100, 4), ROW[:1] + 50))  # a crowd of equals, then one apart
    rules = {"iou_threshold": 0.5, "score_threshold": 0.1, "max_detections": 3}
    scores = torch.linspace(0.9, 0.2, 101)[:, None]
    assert padded(fast_nms(boxes, scores, room=3, **rules))[0] == [0, 100]
    assert padded(fast_nms(boxes, scores, room=3, top_k=100, **rules))[0] == [0]


def test_survivors_that_fit_move_up():
    kept = Kept(torch.tensor([3, 4, 5, 0]), torch.tensor([1, 2, 3, 0]), torch.tensor([0.9, 0.8, 0.7, 0.0]))
    fit = torch.tensor([False, True, True, True])
    some, place = kept.those(fit)
    assert (some.index.tolist(), place.tolist(), some.count) == ([4, 5, 0], [1, 2, 3], None)
    some, place = replace(kept, count=torch.tensor(3)).those(fit)
    assert (some.index.tolist(), some.labels.tolist(), int(some.count)) == ([4, 5, 0, 0], [2, 3, 0, 0], 2)
    assert place[:2].tolist() == [1, 2]
    assert int(replace(kept, count=torch.tensor(5)).those(fit)[0].count) == 5  # not all of them were there


def test_an_image_without_room_for_all_is_decoded_again(monkeypatch):
    asked = []

    def decode(i, room):
        asked.append((i, room))
        rows = torch.zeros(room or 7 * i)
        return Detections((4, 4), rows[:, None].expand(-1, 4), rows, rows.long()), torch.tensor(7 * i)

    assert [len(found) for found in settled(decode, 3, torch.device("cpu"), 4)] == [0, 7, 14]
    monkeypatch.setattr(host, "keeps_fixed_shapes", lambda device: True)
    assert [len(found) for found in settled(decode, 3, torch.device("cpu"), 4)] == [0, 7, 14]
    assert asked == [(0, None), (1, None), (2, None), (0, 4), (1, 4), (2, 4), (1, 8), (2, 8), (2, 16)]


def _candidates(num_boxes, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_boxes, 2, generator=generator) * 30
    boxes = torch.cat((corner, corner + 1 + torch.rand(num_boxes, 2, generator=generator) * 30), dim=1)
    return boxes, torch.rand(num_boxes, num_classes, generator=generator)
