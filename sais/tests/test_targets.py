import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from onestage.nn import fcos
from onestage.structures import Target
from sais.config import AREA_AWARE, FCOS, R50_768
from sais.model import RawOutput
from sais.targets import assign_targets, largest_centerness

SIZES = [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)]  # of a 512 x 512 input

# The location (304, 240) is the centre of A and lies inside the smaller B; both are in P5's range there.
BOX_A, BOX_B = [104.0, 90.0, 504.0, 390.0], [284.0, 100.0, 444.0, 380.0]


def _targets(boxes, config=R50_768):
    nothing = torch.zeros(())
    raw = RawOutput(fcos.locations(SIZES), SIZES, nothing, nothing, nothing, [], None, None)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 512, 512, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = Target(boxes, torch.arange(len(boxes)), masks, torch.zeros(len(boxes), dtype=torch.bool))
    return raw, assign_targets([target], raw, config)


def _instance_at(raw, targets, x, y, level=2):
    stride = fcos.STRIDES[level]
    start = sum(h * w for h, w in SIZES[:level])
    at = start + (y // stride) * SIZES[level][1] + x // stride
    assert raw.points[at].tolist() == [x, y]
    return targets.locations.index[0, at].item()


@pytest.mark.parametrize(
    ("x", "y", "area_aware", "center_aware"),
    [
        (304, 240, 1, 0),  # A's own centre: C 1 against 0.378
        (336, 240, 1, 0),  # 0.851 against 0.694
        (368, 240, 1, 1),  # A's largest distance 264 is out of P5's range
        (272, 240, 0, 0),  # outside B
        (304, 304, 1, 0),  # 0.634 against 0.231
    ],
)
def test_the_larger_box_keeps_its_own_centre(x, y, area_aware, center_aware):
    for config, expected in ((AREA_AWARE, area_aware), (R50_768, center_aware)):
        assert _instance_at(*_targets([BOX_A, BOX_B], config), x, y) == expected


def test_of_equally_central_boxes_the_smaller_wins_and_of_identical_ones_the_first():
    inner, outer = [254.0, 190.0, 354.0, 290.0], [244.0, 180.0, 364.0, 300.0]  # both centred at (304, 240)
    candidates = torch.ones(1, 3, dtype=torch.bool)
    boxes = torch.tensor([outer, inner, inner])
    ltrb = torch.cat((304 - boxes[:, :1], 240 - boxes[:, 1:2], boxes[:, 2:3] - 304, boxes[:, 3:] - 240), 1)
    area = torch.tensor([14400.0, 10000.0, 10000.0])
    assert largest_centerness(candidates, ltrb[None], area).tolist() == [1]
    assert largest_centerness(torch.tensor([[True, False, True]]), ltrb[None], area).tolist() == [2]


def test_a_location_outside_in_both_directions_is_no_candidate():
    # Both ratios are negative there, their product is positive.
    _, targets = _targets([[100.0, 100.0, 140.0, 140.0]])
    positive = (targets.locations.labels[0] >= 0).nonzero().flatten()
    points = fcos.locations(SIZES)[positive]
    assert len(positive) > 0
    assert ((points > 100) & (points < 140)).all()


def test_the_chosen_instance_gives_all_targets():
    raw, targets = _targets([BOX_A, BOX_B])
    found = targets.locations
    own = found.labels[0] >= 0
    boxes = fcos.decode_ltrb(raw.points[own], found.ltrb[0, own])
    assert_close(boxes, targets.boxes[0][found.index[0, own]])
    assert torch.equal(found.labels[0, own], found.index[0, own])  # labels are 0, 1


def test_masks_are_targets_at_a_quarter_of_the_input():
    _, targets = _targets([[8.0, 16.0, 24.0, 48.0]])
    mask = targets.masks[0][0]
    assert mask.shape == (128, 128)
    assert mask[4:12, 2:6].all()
    assert mask.sum() == 8 * 4


def test_a_detector_without_masks_makes_no_mask_targets():
    assert _targets([BOX_A], FCOS)[1].masks == []


def test_an_image_without_instances_is_all_background():
    _, targets = _targets([])
    assert (targets.locations.labels == -1).all()
    assert targets.masks[0].shape == (0, 128, 128)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(0, 2**20), st.booleans())
def test_the_rule_equals_a_literal_reading_of_its_equations(num_boxes, seed, nested):
    generator = torch.Generator().manual_seed(seed)
    side = torch.rand(num_boxes, 2, generator=generator) * 150 + 2
    center = torch.rand(num_boxes, 2, generator=generator) * (20 if nested else 200) + (100 if nested else 28)
    # Multiples of a quarter: centre-nesses of float64 and float32 then agree on what is equal at common centres.
    boxes = torch.cat((center - side / 2, center + side / 2), 1).mul(4).round() / 4
    sizes = [(16, 16), (8, 8), (4, 4)]
    strides, ranges = (16, 32, 64), ((-1.0, 32.0), (32.0, 64.0), (64.0, 500.0))
    points = fcos.locations(sizes, strides)
    limits = fcos.per_location(sizes, ranges)
    index, _ = fcos.assign(
        points, fcos.per_location(sizes, strides), limits, boxes, radius=None, choose=largest_centerness
    )
    for p, (x, y) in enumerate(points.tolist()):
        assert index[p].item() in _literal(x, y, limits[p].tolist(), boxes.tolist())


def _literal(x, y, limits, boxes):
    """Equations 2 to 4 word for word, in float64: {-1}, or the instances that rounding may choose between."""
    order = sorted(range(len(boxes)), key=lambda i: (boxes[i][2] - boxes[i][0]) * (boxes[i][3] - boxes[i][1]))  # Eq. 2
    best, answer = -1.0, {-1}
    for i in order:
        left, top, right, bottom = x - boxes[i][0], y - boxes[i][1], boxes[i][2] - x, boxes[i][3] - y
        if min(left, top, right, bottom) <= 0 or not limits[0] <= max(left, top, right, bottom) <= limits[1]:
            continue
        centerness = math.sqrt(  # Eq. 3
            min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        )
        if centerness > best + 1e-6:  # Eq. 4; the first of equals stays
            best, answer = centerness, {i}
        elif centerness != best and abs(centerness - best) <= 1e-6:
            answer |= {i}
    return answer


RULES = {"center_aware": largest_centerness, "area_aware": None, "center_aware_no_range": largest_centerness}


@pytest.mark.parametrize("rule", RULES)
def test_golden_cases(golden, rule):
    for case in _golden_cases(golden):
        index, ltrb = _golden_answers(case, rule)
        expected = case["expected"][rule]
        assert index.tolist() == expected["gt"], case["name"]
        labels = torch.tensor([*case["labels"], -1], dtype=torch.int64)
        assert labels[index].tolist() == expected["label"], case["name"]
        if rule == "center_aware_no_range":  # a contrast only, without distances
            continue
        background = index == -1
        for name, ours, tolerance in (("ltrb", ltrb, 1e-4), ("centerness", fcos.centerness_target(ltrb), 1e-5)):
            assert [value is None for value in expected[name]] == background.tolist(), case["name"]
            values = torch.tensor([value for value in expected[name] if value is not None], dtype=torch.float32)
            assert_close(ours[~background], values.reshape(-1, *ours.shape[1:]), atol=tolerance, rtol=0)


def test_golden_summaries_count_our_answers(golden):
    for case in _golden_cases(golden):
        answers = {rule: _golden_answers(case, rule)[0] for rule in RULES}
        ours = answers["center_aware"]
        assert case["summary"]["positives"] == (ours >= 0).sum(), case["name"]
        assert case["summary"]["center_vs_area_differ"] == (ours != answers["area_aware"]).sum(), case["name"]


def test_golden_grids_have_our_locations(golden):
    grids = [case for case in _golden_cases(golden) if "grid" in case]
    if not grids:
        pytest.skip("no golden case has a grid: the locations of levels are not compared")
    for case in grids:
        strides = [level["stride"] for level in case["levels"]]
        size = case["grid"]
        sizes = [(-(-size["height"] // stride), -(-size["width"] // stride)) for stride in strides]
        level, points = _golden_points(case)
        assert torch.equal(fcos.locations(sizes, strides), points)
        assert torch.equal(fcos.per_location(sizes, range(len(sizes))).long(), level)


def _golden_cases(golden):
    content = golden("sais_center_aware")
    assert content["schema"] == "sais_center_aware/1"
    return content["cases"]


def _golden_answers(case, rule):
    """What `fcos.assign` gives for a case under a rule: instances [P] and distances [P, 4]."""
    level, points = _golden_points(case)
    strides = torch.tensor([entry["stride"] for entry in case["levels"]], dtype=torch.float32)
    ranges = torch.tensor(
        [[low, math.inf if high is None else high] for low, high in (entry["range"] for entry in case["levels"])],
        dtype=torch.float32,
    )
    if rule == "center_aware_no_range":
        ranges = torch.tensor([-math.inf, math.inf], dtype=torch.float32).expand_as(ranges)
    boxes = torch.tensor(case["boxes"], dtype=torch.float32).reshape(-1, 4)
    return fcos.assign(points, strides[level], ranges[level], boxes, radius=None, choose=RULES[rule])


def _golden_points(case):
    locations = torch.tensor(case["locations"], dtype=torch.float32).reshape(-1, 3)
    return locations[:, 0].long(), locations[:, 1:]


def test_both_rules_are_configurations():
    raw, centred = _targets([BOX_A, BOX_B])
    _, smallest = _targets([BOX_A, BOX_B], replace(R50_768, center_aware=False))
    assert not torch.equal(centred.locations.index, smallest.locations.index)
    assert torch.equal(centred.locations.index >= 0, smallest.locations.index >= 0)
    assert len(raw.points) == centred.locations.labels.shape[1]
