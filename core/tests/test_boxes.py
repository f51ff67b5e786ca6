"""Box arithmetic in both geometries."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops

from onestage.boxes import area, clip, from_legacy, iou_matrix, paired_iou, scale, to_legacy

LEFT = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
RIGHT = torch.tensor([[2.0, 0.0, 6.0, 2.0]])


def test_area_by_hand_in_both_geometries():
    assert area(LEFT).tolist() == [8.0]
    assert area(LEFT, legacy=True).tolist() == [15.0]  # 5 x 3 pixels


def test_iou_by_hand_in_both_geometries():
    torch.testing.assert_close(paired_iou(LEFT, RIGHT), torch.tensor([4.0 / 12.0]))
    torch.testing.assert_close(paired_iou(LEFT, RIGHT, legacy=True), torch.tensor([9.0 / 21.0]))


def test_legacy_boxes_that_share_only_their_last_pixel_overlap():
    a, b = torch.tensor([[0.0, 0.0, 3.0, 3.0]]), torch.tensor([[3.0, 3.0, 5.0, 5.0]])
    assert paired_iou(a, b).tolist() == [0.0]
    torch.testing.assert_close(paired_iou(a, b, legacy=True), torch.tensor([1.0 / (16 + 9 - 1)]))


def test_iou_of_empty_boxes_is_zero_with_finite_gradient():
    empty = torch.zeros(1, 4, requires_grad=True)
    iou = paired_iou(empty, torch.zeros(1, 4))
    iou.sum().backward()
    assert iou.tolist() == [0.0]
    assert torch.isfinite(empty.grad).all()


def test_iou_of_one_pixel_in_relative_coordinates_is_exact():
    pixel = 1 / 550
    box = torch.tensor([[0.0, 0.0, pixel, pixel]])
    torch.testing.assert_close(paired_iou(box, box), torch.ones(1))


def test_iou_of_half_precision_boxes_is_computed_in_float32():
    assert paired_iou(LEFT.bfloat16(), RIGHT.bfloat16()).dtype == torch.float32


def test_clip_ends_at_the_border_or_at_the_last_pixel():
    box = torch.tensor([[-3.0, -1.0, 20.0, 30.0]])
    assert clip(box, (10, 15)).tolist() == [[0.0, 0.0, 15.0, 10.0]]
    assert clip(box, (10, 15), legacy=True).tolist() == [[0.0, 0.0, 14.0, 9.0]]


def test_scale_takes_vertical_before_horizontal():
    assert scale(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (10.0, 100.0)).tolist() == [[100.0, 20.0, 300.0, 40.0]]


def test_legacy_conversion_keeps_the_pixels_of_a_box():
    assert to_legacy(LEFT).tolist() == [[0.0, 0.0, 3.0, 1.0]]
    assert from_legacy(to_legacy(LEFT)).tolist() == LEFT.tolist()
    assert area(to_legacy(LEFT), legacy=True).tolist() == area(LEFT).tolist()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**20))
def test_iou_matrix_equals_torchvision_and_legacy_equals_shifted_boxes(num_a, num_b, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (_boxes(n, generator) for n in (num_a, num_b))
    torch.testing.assert_close(iou_matrix(a, b), ops.box_iou(a, b))
    torch.testing.assert_close(iou_matrix(a, b, legacy=True), ops.box_iou(from_legacy(a), from_legacy(b)))


def _boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 50
    return torch.cat((corner, corner + 1 + torch.rand(count, 2, generator=generator) * 30), dim=1)
