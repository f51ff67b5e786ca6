"""The kernels against their twins: sides by profile and prior, and profiles from the tiles of mask assembly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.ops.assemble import crop_window
from onestage.ops.edges import (
    LEAST_DEVIATION,
    PRIOR_CUT,
    Profiles,
    assemble_with_profiles,
    assemble_with_profiles_torch,
    refine_boxes,
    refine_boxes_torch,
)
from onestage.ops.triton.edges import refine_boxes_triton

RELEASED = torch.tensor([-0.2968, -0.2892, -0.2635, -3.2545, -0.1874, 2.5041, 0.0196, 0.0651, 0.0917])
BIAS = torch.tensor([-1.9536])


def random_profiles(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Profiles(torch.rand(count, size[1], generator=generator), torch.rand(count, size[0], generator=generator))


def refined(profiles, boxes, device, gamma=0.05, weight=RELEASED, bias=BIAS):
    inputs = (profiles.columns, profiles.rows, boxes, weight, bias)
    out = refine_boxes_triton(*(value.to(device) for value in inputs), gamma, LEAST_DEVIATION, PRIOR_CUT)
    return out.cpu()


def test_a_sharp_profile_by_hand(device):
    columns, rows = torch.zeros(1, 50), torch.zeros(1, 40)
    columns[0, 15:30] = 1.0
    rows[0, 8:20] = 1.0
    boxes = torch.tensor([[14.4, 9.6, 30.2, 18.7]])
    # The likelihood is largest one before and at the first bright pixel: 0.67 and 0.63, times the prior around 14.4.
    assert refined(Profiles(columns, rows), boxes, device).tolist() == [[14, 8, 30, 19]]


@pytest.mark.parametrize("count", [0, 1, 7])  # a box has programs of its own: there is no block to fill
def test_any_number_of_boxes(count, device):
    profiles = random_profiles(count, (21, 33))
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * 18 - 3
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 20), 1)
    expected = refine_boxes_torch(profiles, boxes, RELEASED, BIAS, 0.05)
    assert torch.equal(refined(profiles, boxes, device), expected)


@pytest.mark.parametrize("gamma", [0.02, 0.3, 2.0])
def test_priors_longer_than_a_block(gamma, device):
    profiles = random_profiles(2, (300, 257), seed=3)
    boxes = torch.tensor([[10.3, 20.2, 240.9, 270.5], [128.0, 127.0, 128.0, 129.0]])
    expected = refine_boxes_torch(profiles, boxes, RELEASED, BIAS, gamma)
    assert torch.equal(refined(profiles, boxes, device, gamma), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the interpreter's infinities
@pytest.mark.parametrize(
    "box",
    [
        (0.0, 0.0, 32.0, 20.0),  # the whole image
        (5.0, 5.0, 5.0, 5.0),  # one pixel
        (-40.0, -3.0, -30.0, 60.0),  # left of it; beyond top and bottom
        (9.0, 9.0, 2.0, 3.0),  # turned round
        (-1e9, 2.0, 1e9, 1e30),
        (31.4, 0.4, 32.6, 19.6),  # at the edge
        (torch.nan, 2.0, 8.0, torch.inf),
    ],
)
def test_strange_boxes(box, device):
    profiles = random_profiles(1, (21, 33), seed=2)
    boxes = torch.tensor([box])
    expected = refine_boxes_torch(profiles, boxes, RELEASED, BIAS, 0.05)
    torch.testing.assert_close(refined(profiles, boxes, device), expected, rtol=0, atol=0, equal_nan=True)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(height=st.integers(1, 40), width=st.integers(1, 40), reach=st.integers(0, 5), seed=st.integers(0, 2**20))
def test_any_image_and_any_kernel_length(height, width, reach, seed):
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    profiles = random_profiles(1, (height, width), seed)
    boxes = torch.rand(1, 4, generator=generator) * torch.tensor([width, height, width, height])
    weight = torch.randn(2 * reach + 1, generator=generator)
    expected = refine_boxes_torch(profiles, boxes, weight, BIAS, 0.2)
    assert torch.equal(refined(profiles, boxes, where, 0.2, weight), expected)


def test_strided_profiles_are_read_where_they_lie(device):
    profiles = random_profiles(3, (21, 33))
    boxes = torch.tensor([[4.2, 3.1, 20.3, 15.8]]).repeat(3, 1)
    both = torch.cat((profiles.columns, profiles.rows), 1)  # rows of it are not as long as a profile
    strided = Profiles(both[:, :33], both[:, 33:].T.contiguous().T)
    assert torch.equal(refined(strided, boxes, device), refined(profiles, boxes, device))


@pytest.mark.parametrize(("resized", "image"), [((38, 53), (30, 43)), ((40, 56), (40, 56)), ((39, 53), (61, 85))])
def test_masks_and_profiles_equal_the_twins(resized, image, device, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(4, 10, 14, generator=generator)
    boxes = torch.tensor([[0.0, 0, 200, 200], [12.3, 10.2, 30.1, 24.9], [3, 3, 3, 3], [-20, -20, -10, -10.0]])
    contrasts = torch.randn(len(boxes), 4, generator=generator)
    windows = crop_window(boxes, image, "expand", padding=0.1)
    how = {"upsample": 4, "threshold": 0.4, "valid_size": resized, "output_size": image, "align_corners": True}
    masks, profiles = assemble_with_profiles_torch(basis, contrasts, windows, **how)
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    ours, our_profiles = assemble_with_profiles(basis.to(device), contrasts.to(device), windows.to(device), **how)
    torch.testing.assert_close(our_profiles.columns.cpu(), profiles.columns, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_profiles.rows.cpu(), profiles.rows, rtol=0, atol=1e-5)
    assert int((ours.to_bool().cpu() != masks.to_bool()).sum()) <= 1
    sides = refine_boxes(our_profiles, boxes.to(device), RELEASED.to(device), BIAS.to(device), 0.05)
    assert int((sides.cpu() != refine_boxes_torch(profiles, boxes, RELEASED, BIAS, 0.05)).sum()) <= 1


def test_the_custom_ops_are_what_the_compiler_needs(monkeypatch):
    monkeypatch.delenv("ONESTAGE_KERNELS", raising=False)
    profiles = random_profiles(2, (9, 12))
    inputs = profiles.columns, profiles.rows, torch.tensor([[1.2, 2.1, 8.3, 6.8]] * 2), RELEASED, BIAS
    torch.library.opcheck(torch.ops.onestage.refine_boxes.default, (*inputs, 0.05))
    # Compiled code reads what the fake promises, whatever strides come in.
    strided = *inputs[:2], inputs[2].T.contiguous().T, *inputs[3:]
    assert torch.ops.onestage.refine_boxes(*strided, 0.05).is_contiguous()
    how = {"upsample": 2, "threshold": 0.4, "valid_size": [7, 9], "output_size": [9, 12], "align_corners": True}
    windows = torch.tensor([[0, 0, 12, 9], [3, 2, 9, 5]])
    torch.library.opcheck(
        torch.ops.onestage.assemble_with_profiles.default, (torch.randn(3, 4, 5), torch.randn(2, 3), windows), how
    )
