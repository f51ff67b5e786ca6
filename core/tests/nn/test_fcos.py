"""Locations, assignment and decoding of detectors without anchors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.nn import fcos
from onestage.nn.fcos import (
    LEVEL_RANGES,
    STRIDES,
    assign,
    assign_batch,
    centerness_target,
    decode_ltrb,
    locations,
    per_location,
    smallest_area,
    top_pairs_per_level,
    top_per_level,
)
from onestage.structures import Target

ONE_LEVEL = [(4, 4)]  # stride 8: locations at 4, 12, 20, 28


def test_locations_are_cell_corners_plus_half_a_stride_row_by_row():
    points = locations([(2, 3), (1, 1)], (8, 16))
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]


def test_odd_stride_rounds_its_half_down():
    assert locations([(1, 2)], (5,)).tolist() == [[2, 2], [7, 2]]


def test_level_values_repeat_for_their_locations():
    assert per_location([(1, 2), (1, 1)], (8, 16)).tolist() == [8, 8, 16]
    assert per_location([(1, 2), (1, 1)], ((0, 1), (2, 3))).tolist() == [[0, 1], [0, 1], [2, 3]]


def test_distances_of_a_box_by_hand():
    index, ltrb = _assign([[2, 3, 18, 13]], radius=None)
    inside = (index == 0).nonzero().flatten().tolist()
    assert inside == [0, 1, 4, 5]  # (4, 4), (12, 4), (4, 12), (12, 12)
    assert ltrb[5].tolist() == [10, 9, 6, 1]
    assert ltrb[index < 0].unique().tolist() == [0]


def test_a_location_on_a_side_is_outside():
    index, _ = _assign([[4, 0, 20, 16]], radius=None)
    assert (index == 0).nonzero().flatten().tolist() == [1, 5]  # x = 12 only: 4 and 20 lie on sides


def test_center_region_is_strict_and_stays_inside_the_box():
    # Centre (12, 12), radius 1 x 8: the region is 4..20 on both axes, its border excluded.
    index, _ = _assign([[0, 0, 24, 24]], radius=1.0)
    assert (index == 0).nonzero().flatten().tolist() == [5]
    # A box narrower than the region: only the box counts.
    index, _ = _assign([[11, 0, 13, 24]], radius=1.5)
    assert (index == 0).nonzero().flatten().tolist() == [1, 5, 9]


def test_both_ends_of_a_level_range_belong_to_it():
    points = torch.tensor([[64.0, 32.0]])
    box = torch.tensor([[0.0, 0.0, 128.0, 64.0]])  # largest distance exactly 64
    for limits, expected in (((-1, 64), 0), ((64, 128), 0), ((65, 128), -1), ((-1, 63), -1)):
        index, _ = assign(points, torch.tensor([8.0]), torch.tensor([limits]), box, radius=None)
        assert index.tolist() == [expected]


def test_smallest_box_wins_and_of_equals_the_first():
    big, small = [0, 0, 28, 28], [4, 4, 24, 24]
    index, ltrb = _assign([big, small, small], radius=None)
    assert index[5] == 1
    assert ltrb[5].tolist() == [8, 8, 12, 12]
    assert index[0] == 0


def test_legacy_area_can_turn_the_choice():
    wide, square = [10.0, 11.5, 30.0, 12.5], [10.0, 9.0, 14.2, 14.0]  # areas 20 and 21; with + 1: 42 and 31.2
    assert _assign([wide, square], radius=None)[0][5] == 0
    assert _assign([wide, square], radius=None, legacy=True)[0][5] == 1


def test_another_rule_can_choose_between_candidates():
    def last(candidates, ltrb, area):
        return candidates.shape[1] - 1 - candidates.flip(1).long().argmax(dim=1)

    index, _ = _assign([[0, 0, 20, 20], [0, 0, 28, 28]], radius=None, choose=last)
    assert index[0] == 1
    assert index[15] == -1


def test_no_boxes_make_everything_background():
    index, ltrb = _assign(torch.zeros(0, 4), radius=1.5)
    assert index.tolist() == [-1] * 16
    assert ltrb.shape == (16, 4)


def test_centerness_by_hand():
    ltrb = torch.tensor([[2.0, 3.0, 2.0, 3.0], [1.0, 2.0, 4.0, 8.0], [-1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(centerness_target(ltrb), torch.tensor([1.0, 0.25, 0.0, 0.0]))


def test_top_per_level_keeps_small_levels_whole_and_in_order():
    scores = [torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.2, 0.3])]
    assert top_per_level(scores, 2).tolist() == [1, 2, 3, 4]
    assert top_per_level(scores, 3).tolist() == [0, 1, 2, 3, 4]


def test_top_per_level_cuts_equals_in_their_order():
    scores = torch.full((1000,), 0.5)
    scores[700] = 0.9
    assert top_per_level([scores], 4).tolist() == [700, 0, 1, 2]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 2**20))
def test_assigned_boxes_decode_to_themselves(num_boxes, seed):
    boxes = _random_boxes(num_boxes, seed)
    sizes = [(16 >> level, 16 >> level) for level in range(5)]
    points = locations(sizes)
    index, ltrb = assign(points, per_location(sizes, STRIDES), per_location(sizes, LEVEL_RANGES), boxes)
    own = index >= 0
    torch.testing.assert_close(decode_ltrb(points, ltrb)[own], boxes[index[own]], rtol=0, atol=1e-4)
    assert (ltrb[own] > 0).all()


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(0, 2**20))
def test_assignment_equals_a_loop_over_locations_and_boxes(num_boxes, seed):
    boxes = _random_boxes(num_boxes, seed)
    sizes = [(8, 8), (4, 4)]
    points, strides = locations(sizes, (16, 32)), per_location(sizes, (16, 32))
    ranges = per_location(sizes, ((-1, 40), (40, 200)))
    index, _ = assign(points, strides, ranges, boxes, radius=1.5)
    for p, (x, y) in enumerate(points.tolist()):
        reach = 1.5 * strides[p].item()
        fitting = []
        for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            near = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
            distances = (x - x1, y - y1, x2 - x, y2 - y)
            if near and min(distances) > 0 and ranges[p, 0] <= max(distances) <= ranges[p, 1]:
                fitting.append(((x2 - x1) * (y2 - y1), g))
        assert index[p] == (min(fitting)[1] if fitting else -1)


@pytest.mark.golden
@pytest.mark.parametrize("variant", ["gn4", "ssd2", "ssdpp2"])
def test_assignment_equals_the_released_code(golden, variant):
    data = golden("sipmask_loss").get(variant)
    if data is None:
        pytest.skip(f"{variant} is not in this sipmask_loss file")
    height, width = data["gt_masks"][0].shape[1:]
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    points = locations(sizes)
    assert torch.equal(points, torch.cat(list(data["points"])))
    strides, ranges = per_location(sizes, STRIDES), per_location(sizes, LEVEL_RANGES)
    for i, boxes in enumerate(data["gt_boxes"]):
        index, ltrb = assign(points, strides, ranges, boxes, radius=1.5, legacy=True)
        labels = torch.where(index >= 0, data["gt_labels"][i][index], 0)
        positive = labels > 0
        assert torch.equal(labels, data["target_labels"][i])
        assert torch.equal(index[positive], data["gt_index_of_pos"][i])
        torch.testing.assert_close(ltrb[positive], data["target_ltrb"][i][positive], rtol=0, atol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("rule", ["center_aware", "area_aware"])
def test_smallest_area_and_another_rule_equal_the_worked_cases(golden, rule):
    def most_central(candidates, ltrb, area):
        value = torch.where(candidates, centerness_target(ltrb), -1.0)
        return smallest_area(value == value.amax(dim=1, keepdim=True), ltrb, area)

    for case in golden("sais_center_aware")["cases"]:
        level = torch.tensor([entry[0] for entry in case["locations"]])
        points = torch.tensor([entry[1:] for entry in case["locations"]], dtype=torch.float32)
        strides = torch.tensor([float(entry["stride"]) for entry in case["levels"]])[level]
        ranges = torch.tensor([[low, 1e8 if high is None else high] for low, high in _ranges(case)])[level]
        boxes = torch.tensor(case["boxes"], dtype=torch.float32).reshape(-1, 4)
        choose = most_central if rule == "center_aware" else None
        index, ltrb = assign(points, strides, ranges, boxes, radius=None, choose=choose)
        expected = case["expected"][rule]
        assert index.tolist() == expected["gt"], case["name"]
        for p, distances in enumerate(expected["ltrb"]):
            if distances is not None:
                torch.testing.assert_close(ltrb[p], torch.tensor(distances), rtol=0, atol=1e-4)
                assert abs(centerness_target(ltrb[p]).item() - expected["centerness"][p]) < 1e-5


def test_best_pairs_of_two_levels_by_hand():
    odds = torch.tensor([[0.9, 0.5], [0.06, 0.0], [0.8, 0.2]]).logit().clamp(min=-50)
    centerness = torch.tensor([0.5, 0.1, 0.25]).logit()
    options = {"score_threshold": 0.05, "per_level": 2}
    pairs = fcos.best_pairs(odds, centerness, [(1, 2), (1, 1)], **options)
    # Level one: 0.45, 0.25, 0.006; level two: 0.2, 0.05.
    assert (pairs.index.tolist(), pairs.labels.tolist()) == ([0, 0, 2, 2], [0, 1, 0, 1])
    torch.testing.assert_close(pairs.scores, torch.tensor([0.45, 0.25, 0.2, 0.05]).sqrt())
    strict = fcos.best_pairs(odds, centerness, [(1, 2), (1, 1)], **options, threshold_with_centerness=True)
    assert strict.index.tolist() == [0, 0, 2]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 12), st.booleans(), st.integers(0, 2**20))
def test_best_pairs_of_a_fixed_number_are_the_same_and_then_none(num_locations, num_classes, k, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_locations + 2, num_classes, generator=generator)
    centerness = torch.randn(num_locations + 2, generator=generator)
    if ties:
        logits, centerness = logits.round(), centerness.round()
    sizes = [(1, num_locations), (2, 1)]
    for threshold in (0.0, 0.5, 1.0):
        how = {"score_threshold": threshold, "per_level": k, "threshold_with_centerness": seed % 2 == 0}
        expected = fcos.best_pairs(logits, centerness, sizes, **how)
        pairs = fcos.best_pairs(logits, centerness, sizes, fixed=True, **how)
        assert len(pairs.index) == min(k, num_locations * num_classes) + min(k, 2 * num_classes)
        found = pairs.scores >= 0
        for ours, theirs in zip(vars(pairs).values(), vars(expected).values(), strict=True):
            assert ours is theirs is None or torch.equal(ours[found], theirs)
        assert (pairs.scores[~found] == -1).all()


def test_pairs_of_a_level_are_ordered_with_negative_numbers_and_equals():
    values = torch.tensor([[-1.0, 3.0], [-torch.inf, 3.0], [0.0, -0.0], [-2.0, 0.5]])
    index, labels, best = top_pairs_per_level(values, [3, 1], 5)
    assert (index * 2 + labels).tolist() == [1, 3, 4, 5, 0, 7, 6]
    assert best.tolist() == [3.0, 3.0, 0.0, 0.0, -1.0, 0.5, -2.0]


def test_equals_at_the_cut_are_kept_in_their_order():
    odds = torch.full((40, 1), 0.5).logit()
    pairs = fcos.best_pairs(odds, torch.zeros(40), [(5, 8)], score_threshold=0.1, per_level=7)
    assert pairs.index.tolist() == list(range(7))


def _assign(boxes, **options):
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    count = ONE_LEVEL[0][0] * ONE_LEVEL[0][1]
    ranges = torch.tensor([[-1.0, 64.0]]).expand(count, 2)
    return assign(locations(ONE_LEVEL, (8,)), torch.full((count,), 8.0), ranges, boxes, **options)


def _random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat((corner, corner + 2 + torch.rand(count, 2, generator=generator) * 100), dim=1)


def _ranges(case):
    return [entry["range"] for entry in case["levels"]]


def test_a_batch_is_assigned_image_by_image():
    sizes = [(16 >> level, 16 >> level) for level in range(5)]
    points = locations(sizes)
    boxes = _random_boxes(3, 0)
    targets = [_target(boxes, [2, 0, 1]), _target(torch.zeros(0, 4), [])]
    found = assign_batch(points, sizes, targets, radius=None)
    index, ltrb = assign(points, found.strides, per_location(sizes, LEVEL_RANGES), boxes, radius=None)
    assert torch.equal(found.index[0], index)
    assert torch.equal(found.ltrb[0], ltrb)
    assert found.labels[0].tolist() == [[2, 0, 1][i] if i >= 0 else -1 for i in index.tolist()]
    assert (index >= 0).any()
    assert (found.labels[1] == -1).all()
    assert found.strides.tolist() == per_location(sizes, STRIDES).tolist()


def _target(boxes, labels):
    masks = torch.zeros(len(boxes), 128, 128, dtype=torch.uint8)
    return Target(boxes, torch.tensor(labels, dtype=torch.int64), masks, torch.zeros(len(boxes), dtype=torch.bool))
