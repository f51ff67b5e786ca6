"""Profiles of masks and the box sides read off them: published literals, symmetry, edge cases, no dense masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from onestage.ops.assemble import assemble_masks, crop_window
from onestage.ops.edges import (
    Profiles,
    assemble_with_profiles,
    enclosing_boxes,
    refine_boxes,
    side_posteriors,
)
from onestage.testing import coco_like_boxes, dense_two_class_masks

RELEASED = torch.tensor([-0.2968, -0.2892, -0.2635, -3.2545, -0.1874, 2.5041, 0.0196, 0.0651, 0.0917])
BIAS = torch.tensor([-1.9536])


def likelihood(profile, side):
    """Likelihoods of one side, which a prior without slope leaves in proportion: by the definition, tap by tap."""
    kernel = RELEASED if side == "low" else RELEASED.flip(0)
    padded = torch.nn.functional.pad(profile, (4, 4))
    return (padded.unfold(0, 9, 1) @ kernel + BIAS).sigmoid()


def test_published_likelihoods_of_a_sharp_profile():
    profile = torch.zeros(50)
    profile[15:30] = 1.0
    expected = torch.tensor([0.1446, 0.6741, 0.6317, 0.0621])
    assert_close(likelihood(profile, "low")[13:17], expected, atol=1e-4, rtol=0)
    assert_close(likelihood(profile, "high")[28:32], expected.flip(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gamma", [0.02, 0.05, 0.3])
def test_posteriors_are_likelihood_times_prior_with_sum_one(gamma):
    profile = torch.rand(40, generator=torch.Generator().manual_seed(0))
    low, high = torch.tensor([8.3]), torch.tensor([27.9])
    deviation = max(1.0, gamma * 19.6)
    for side, centre, ours in zip(
        ("low", "high"), (8.3, 27.9), side_posteriors(profile[None], low, high, RELEASED, BIAS, gamma), strict=True
    ):
        prior = torch.exp(-((torch.arange(40) - centre) ** 2) / (2 * deviation**2))
        prior[prior <= 0.0044] = 0
        joint = likelihood(profile, side) * prior
        assert_close(ours[0], joint / joint.sum())
        assert_close(ours.sum(), torch.tensor(1.0))


def test_an_empty_mask_rounds_the_box():
    boxes = torch.tensor([[10.4, 5.6, 20.2, 18.7]])
    refined = refine_boxes(Profiles(torch.zeros(1, 40), torch.zeros(1, 30)), boxes, RELEASED, BIAS, 0.05)
    assert refined.tolist() == [[10, 6, 20, 19]]


def test_a_side_far_outside_the_image_stays():
    boxes = torch.tensor([[-30.5, 5.6, 20.2, 70.7]])
    refined = refine_boxes(Profiles(torch.zeros(1, 40), torch.zeros(1, 30)), boxes, RELEASED, BIAS, 0.05)
    assert refined[0, 0] == boxes[0, 0]
    assert refined[0, 3] == boxes[0, 3]
    assert refined[0, 1:3].tolist() == [6, 20]


def test_gamma_zero_changes_nothing():
    boxes = torch.tensor([[10.4, 5.6, 20.2, 18.7]])
    profiles = Profiles(torch.rand(1, 40), torch.rand(1, 30))
    assert torch.equal(refine_boxes(profiles, boxes, RELEASED, BIAS, 0.0), boxes)


def test_boxes_do_not_move_otherwise_under_autocast():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=generator) * 15
    boxes = torch.cat((corner, corner + 5 + torch.rand(200, 2, generator=generator) * 10), 1)
    profiles = Profiles(*(torch.rand(200, extent, generator=generator) for extent in (40, 30)))
    inputs = (profiles.columns, profiles.rows, boxes, RELEASED, BIAS, 0.3)
    expected = refine_boxes(profiles, *inputs[2:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(refine_boxes(profiles, *inputs[2:]), expected)
        assert torch.equal(torch.ops.onestage.refine_boxes(*inputs), expected)


def test_no_detections():
    profiles = Profiles(torch.zeros(0, 40), torch.zeros(0, 30))
    assert refine_boxes(profiles, torch.zeros(0, 4), RELEASED, BIAS, 0.05).shape == (0, 4)
    assert enclosing_boxes(profiles, torch.zeros(0, 4), 0.4).shape == (0, 4)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_a_mirrored_image_gives_mirrored_boxes(seed):
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(3, 30, 40, generator=generator)
    corner = torch.rand(3, 2, generator=generator) * 15
    boxes = torch.cat((corner, corner + 5 + torch.rand(3, 2, generator=generator) * 10), 1)
    straight = refine_boxes(Profiles.of(soft), boxes, RELEASED, BIAS, 0.1)
    mirrored = refine_boxes(Profiles.of(soft.flip(2)), _mirrored(boxes, 40), RELEASED, BIAS, 0.1)
    assert torch.equal(_mirrored(mirrored, 40), straight)


def _mirrored(boxes, width):
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((width - 1 - x2, y1, width - 1 - x1, y2), 1)


def test_enclosing_boxes_by_hand():
    soft = torch.zeros(2, 10, 12)
    soft[0, 3:7, 2:9] = 0.5
    kept = torch.tensor([[0.5, 0.5, 3.5, 3.5]] * 2)
    assert enclosing_boxes(Profiles.of(soft), kept, 0.4).tolist() == [[2, 3, 8, 6], [0.5, 0.5, 3.5, 3.5]]


@pytest.mark.parametrize(("resized", "image"), [((88, 120), (70, 97)), ((96, 128), (96, 128)), ((90, 121), (300, 401))])
def test_masks_and_profiles_of_one_pass_are_those_of_the_dense_formula(resized, image):
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(8, 24, 32, generator=generator)
    background, foreground = torch.randn(2, 12, 8, generator=generator)
    windows = crop_window(coco_like_boxes(12, image, generator), image, "expand", padding=0.1)
    windows[0] = torch.tensor([5, 5, 5, 20])  # nothing of it is left
    soft = dense_two_class_masks(
        basis, background, foreground, windows, padded_size=(96, 128), resized_size=resized, output_size=image
    )
    how = {"upsample": 4, "threshold": 0.4, "valid_size": resized, "output_size": image, "align_corners": True}
    masks, profiles = assemble_with_profiles(basis, foreground - background, windows, **how)
    dense = Profiles.of(soft)
    assert_close(profiles.columns, dense.columns, atol=1e-5, rtol=0)
    assert_close(profiles.rows, dense.rows, atol=1e-5, rtol=0)
    same = assemble_masks(basis, foreground - background, windows, order="logits", **how)
    assert torch.equal(masks.pixels, same.pixels)


def test_the_kernel_learns_from_posteriors():
    weight, bias = torch.zeros(9, requires_grad=True), torch.zeros(1, requires_grad=True)
    profile = torch.zeros(1, 30)
    profile[0, 10:20] = 1.0
    low, _ = side_posteriors(profile, torch.tensor([9.5]), torch.tensor([19.0]), weight, bias, 0.05)
    (-low[0, 10].log()).backward()
    assert weight.grad[3] > 0 > weight.grad[5]  # dark before the side, bright behind it
