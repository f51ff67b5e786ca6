from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from onestage.boxes import iou_matrix
from onestage.nn import retinanet
from onestage.structures import ImageFrame, Target
from sprnet.config import R50_800
from sprnet.model import RawOutput
from sprnet.targets import assign_targets, inside, positive_pixels

SIZES = [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]  # of a 256 x 256 input
FRAME = ImageFrame((256, 256), (256, 256), (256, 256), (1.0, 1.0))

BOXES = [[20.0, 30.0, 70.0, 76.0], [80.0, 80.0, 208.0, 216.0]]


def _target(boxes, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 256, 256, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1  # the left half
    labels = torch.arange(len(boxes)) if labels is None else torch.tensor(labels)
    return Target(boxes, labels, masks, torch.zeros(len(boxes), dtype=torch.bool))


def _assign(*targets, config=R50_800, frames=None):
    nothing = torch.zeros(())
    raw = RawOutput(retinanet.anchors(SIZES, retinanet.STRIDES), SIZES, nothing, nothing, [])
    return raw, assign_targets(targets, raw, frames or [FRAME] * len(targets), config)


def test_a_pixel_speaks_once_with_its_best_anchor_best_pixels_first():
    iou = torch.tensor([0.72, 0.9, 0.71, 0.7, 0.8, 0.95, 0.8])
    pixel = torch.tensor([5, 5, 3, 3, 3, 9, 7])
    kept = positive_pixels(iou, pixel, threshold=0.7, limit=300)
    assert kept.tolist() == [5, 1, 4, 6]
    assert positive_pixels(iou, pixel, threshold=0.7, limit=2).tolist() == [5, 1]
    literal = positive_pixels(iou, pixel, threshold=0.7, limit=300, dedupe=False)
    assert literal.tolist() == [5, 1, 4, 6, 0, 2]
    assert positive_pixels(iou * 0, pixel, threshold=0.7, limit=300).tolist() == []


def test_of_anchors_with_equal_iou_the_first_speaks():
    iou, pixel = torch.full((4,), 0.8), torch.tensor([2, 2, 1, 1])
    assert positive_pixels(iou, pixel, threshold=0.7, limit=300).tolist() == [0, 2]


def test_pixels_lie_where_their_instances_are_and_learn_what_those_look_like():
    raw, targets = _assign(_target(BOXES, labels=[7, 3]))
    (pixels,) = targets.pixels
    assert set(targets.labels.tolist()) == {7, 3}
    centers = ((raw.anchors[::9, :2] + raw.anchors[::9, 2:]) / 2)[pixels]
    best = iou_matrix(raw.anchors, targets.boxes[0]).view(-1, 9, 2).amax(1)[pixels]
    owner = (targets.labels == 3).long()
    assert (best.gather(1, owner[:, None]) > 0.7).all()
    own = targets.boxes[0][owner]
    assert ((centers > own[:, :2]) & (centers < own[:, 2:])).all()
    assert targets.masks.shape == (len(pixels), 32, 32)
    assert targets.masks[:, :, :15].all()
    assert not targets.masks[:, :, 17:].any()


def test_a_pixel_of_mask_training_is_positive_for_its_box_too():
    _, targets = _assign(_target(BOXES))
    labels = targets.assignment.labels[0].view(-1, 9)[targets.pixels[0]]
    assert (labels == targets.labels[:, None]).any(1).all()


def test_the_mask_is_cut_from_the_ground_truth_box_whatever_its_position():
    # A box with fractional corners: 32 x 32 cells of it, not of its rounding.
    target = _target([[40.5, 40.5, 104.5, 104.5]])
    target.masks[0] = 0
    target.masks[0, :, :73] = 1  # columns up to 73 - 40.5 = 32.5 of 64: the first 16 of 32 cells, and a quarter more
    _, targets = _assign(target)
    assert targets.masks[:, :, :16].all()
    assert not targets.masks[:, :, 16:].any()


def test_anchors_centred_in_the_padding_are_ignored():
    frame = replace(FRAME, input_size=(160, 256))
    raw, targets = _assign(_target(BOXES[:1]), frames=[frame])
    y = (raw.anchors[:, 1] + raw.anchors[:, 3]) / 2
    assert (targets.assignment.index[0][y > 160] == retinanet.IGNORED).all()
    assert (targets.assignment.index[0][y < 160] == retinanet.NEGATIVE).any()
    assert torch.equal(inside(raw.anchors, (160, 256)), y < 160)


def test_no_match_is_forced_unless_the_switch_says_so():
    tiny = _target([[100.0, 100.0, 108.0, 108.0]])
    _, targets = _assign(tiny)
    assert (targets.assignment.index < 0).all()
    assert targets.masks.shape == (0, 32, 32)
    _, forced = _assign(tiny, config=replace(R50_800, force_match=True))
    assert (forced.assignment.index == 0).any()
    assert len(forced.labels) == 0


def test_a_box_that_has_become_smaller_than_a_pixel_is_nothing():
    _, targets = _assign(_target([[20.0, 20.0, 20.5, 60.0], *BOXES], labels=[5, 1, 2]))
    assert len(targets.boxes[0]) == 2
    assert set(targets.labels.tolist()) == {1, 2}


def test_images_of_a_batch_keep_their_own_instances():
    _, together = _assign(_target([]), _target(BOXES, labels=[4, 5]), _target(BOXES[1:], labels=[6]))
    _, first = _assign(_target(BOXES, labels=[4, 5]))
    _, last = _assign(_target(BOXES[1:], labels=[6]))
    assert [len(pixels) for pixels in together.pixels] == [0, len(first.labels), len(last.labels)]
    assert together.labels.tolist() == first.labels.tolist() + last.labels.tolist()
    assert torch.equal(together.masks, torch.cat((first.masks, last.masks)))


def test_pixels_are_cut_to_the_best_and_absent_without_a_mask_head():
    _, everything = _assign(_target(BOXES))
    _, few = _assign(_target(BOXES), config=replace(R50_800, masks_per_image=2))
    assert torch.equal(few.pixels[0], everything.pixels[0][:2])
    _, none = _assign(_target(BOXES), config=replace(R50_800, masks=False))
    assert len(none.pixels[0]) == 0


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**20), st.booleans())
def test_the_choice_equals_a_literal_reading(num_anchors, limit, seed, dedupe):
    generator = torch.Generator().manual_seed(seed)
    iou = torch.randint(60, 90, (num_anchors,), generator=generator) / 100  # ties are common
    pixel = torch.randint(8, (num_anchors,), generator=generator)
    found = positive_pixels(iou, pixel, threshold=0.7, limit=limit, dedupe=dedupe)
    order = sorted((-value, anchor) for anchor, value in enumerate(iou.tolist()) if value > torch.tensor(0.7).item())
    expected, seen = [], set()
    for _, anchor in order:
        if not dedupe or pixel[anchor].item() not in seen:
            seen.add(pixel[anchor].item())
            expected.append(anchor)
    assert found.tolist() == expected[:limit]


def test_golden_cases(golden):
    content = golden("sprnet_positive_pixels")
    assert content["schema"] == "sprnet_positive_pixels/1"
    for case in content["cases"]:
        anchors, pixel = _golden_anchors(case)
        boxes = torch.tensor(case["gt_boxes"], dtype=torch.float32).reshape(-1, 4)
        limits = {"positive_iou": case["positive_iou"], "negative_iou": case["negative_iou"]}
        matched = retinanet.match(anchors, boxes, **limits)
        _compare_matches(case, matched, pixel)
        for name, dedupe in (("pixels", True), ("literal_anchors", False)):
            chosen = positive_pixels(
                matched.iou, pixel, threshold=case["mask_iou_threshold"], limit=case["top_k"], dedupe=dedupe
            )
            found = [
                {"pixel": p, "gt": g, "anchor": a, "iou": i}
                for p, g, a, i in zip(
                    *(x[chosen].tolist() for x in (pixel, matched.best)),
                    chosen.tolist(),
                    matched.iou[chosen].tolist(),
                    strict=True,
                )
            ]
            _compare_selections(case["name"], found, case["expected"][name])
            if dedupe:
                without = set(range(len(boxes))) - {entry["gt"] for entry in found}
                assert sorted(without) == case["expected"]["gt_without_pixel"], case["name"]


def _golden_anchors(case):
    """Anchors of a case and the pixel of each, generated where the case describes a grid."""
    if "anchors" in case:
        anchors = torch.tensor(case["anchors"], dtype=torch.float32).reshape(-1, 4)
        return anchors, torch.tensor(case["anchor_pixel"], dtype=torch.int64)
    grid = case["anchor_grid"]
    assert grid["offset"] == 0.5, case["name"]  # of a cell: where its anchors are centred
    ratios, scales = grid["ratios_h_over_w"], grid["scales"]
    per_pixel, levels = len(ratios) * len(scales), []
    for level, first in zip(grid["levels"], case["first_cell_anchors"], strict=True):
        stride = level["stride"]
        size = (-(-grid["height"] // stride), -(-grid["width"] // stride))
        base = level["base"] / stride
        levels.append(retinanet.anchors([size], [stride], base_size=base, ratios=ratios, scales=scales))
        assert_close(levels[-1][:per_pixel], torch.tensor(first, dtype=torch.float32), atol=1e-3, rtol=0)
    anchors = torch.cat(levels)
    return anchors, torch.arange(len(anchors)) // per_pixel


def _compare_matches(case, matched, pixel):
    expected, state = case["expected"], matched.index
    if "box_state" in expected:
        assert_close(matched.iou, torch.tensor(expected["max_iou"], dtype=torch.float32), atol=1e-5, rtol=0)
        assert matched.best.tolist() == expected["argmax_gt"], case["name"]
        names = [1 if i >= 0 else 0 if i == retinanet.NEGATIVE else -1 for i in state.tolist()]
        assert names == expected["box_state"], case["name"]
    else:
        counts = {
            "positive": (state >= 0).sum().item(),
            "ignored": (state == retinanet.IGNORED).sum().item(),
            "negative": (state == retinanet.NEGATIVE).sum().item(),
        }
        assert counts == expected["box_state_counts"], case["name"]
        assert len(pixel) == expected["anchors_total"], case["name"]
        assert len(pixel.unique()) == expected["pixels_total"], case["name"]


def _compare_selections(name, found, expected):
    """The same entries, anchor by anchor, and ours in an order that only rounding of equal IoUs may have changed."""
    ours, theirs = (sorted(part, key=lambda entry: entry["anchor"]) for part in (found, expected))
    for key in ("anchor", "pixel", "gt"):
        assert [entry[key] for entry in ours] == [entry[key] for entry in theirs], (name, key)
    assert [entry["iou"] for entry in ours] == pytest.approx([entry["iou"] for entry in theirs], abs=1e-5), name
    order = [entry["iou"] for entry in found]
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(order)), name
