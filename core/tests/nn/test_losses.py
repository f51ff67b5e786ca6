"""Loss terms by hand and against the released codes."""

import math

import pytest
import torch
from torchvision import ops

from onestage.nn.losses import giou_loss_ltrb, iou_loss, iou_loss_ltrb, sigmoid_focal, zero_of


def test_focal_loss_by_hand():
    logits = torch.zeros(2, 2)  # probability 0.5 everywhere
    # One positive: 0.25 * 0.5^2 * ln 2; three negatives: 0.75 * 0.5^2 * ln 2 each.
    expected = (0.25 + 3 * 0.75) * 0.25 * math.log(2)
    torch.testing.assert_close(sigmoid_focal(logits, torch.tensor([1, -1])), torch.tensor(expected))


def test_focal_loss_takes_any_negative_label_as_background():
    logits = torch.randn(3, 4)
    assert sigmoid_focal(logits, torch.tensor([-1, -2, 0])) == sigmoid_focal(logits, torch.tensor([-1, -1, 0]))


def test_focal_loss_of_nothing_is_a_connected_zero():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = sigmoid_focal(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0


def test_focal_loss_of_half_precision_logits_is_summed_in_float32():
    assert sigmoid_focal(torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor([0])).dtype == torch.float32


def test_zero_of_outputs_whose_sum_float16_does_not_hold_is_a_connected_zero():
    outputs = [torch.full((3,), 60000.0, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    loss = zero_of(*outputs)
    loss.backward()
    assert (loss.item(), loss.dtype) == (0.0, torch.float32)
    assert [output.grad.tolist() for output in outputs] == [[0.0] * 3] * 2


def test_iou_loss_by_hand_in_both_geometries():
    a, b = torch.tensor([[0.0, 0.0, 4.0, 2.0]]), torch.tensor([[2.0, 0.0, 6.0, 2.0]])
    torch.testing.assert_close(iou_loss(a, b), torch.tensor([math.log(3)]))
    torch.testing.assert_close(iou_loss(a, b, legacy=True), torch.tensor([math.log(21 / 9)]))


def test_iou_loss_of_boxes_apart_is_bounded():
    a, b = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[5.0, 5.0, 6.0, 6.0]])
    torch.testing.assert_close(iou_loss(a, b), torch.tensor([-math.log(1e-6)]))


def test_giou_loss_of_equal_boxes_is_zero_and_by_hand_otherwise():
    target = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(giou_loss_ltrb(target, target), torch.zeros(1), rtol=0, atol=1e-6)
    pred = torch.tensor([[2.0, 0.0, 0.0, 2.0]])  # 2 x 2, shares a unit square; enclosing 3 x 3
    expected = 1 - (1 + 1) / (7 + 1) + (9 - 7) / 9
    torch.testing.assert_close(giou_loss_ltrb(pred, target), torch.tensor([expected]))


def test_giou_loss_tends_to_torchvisions_for_large_boxes():
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(50, 4, generator=generator) * 1000 + 500 for _ in range(2))
    signs = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    expected = ops.generalized_box_iou_loss(pred * signs, target * signs)
    torch.testing.assert_close(giou_loss_ltrb(pred, target), expected, rtol=0, atol=1e-5)


def test_smoothed_iou_losses_by_hand():
    pred = torch.tensor([[2.0, 0.0, 0.0, 2.0]])  # 2 x 2, shares a unit square with the other 2 x 2
    target = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(iou_loss_ltrb(pred, target), torch.tensor([math.log(4.0)]))  # (1 + 1) / (7 + 1)
    torch.testing.assert_close(iou_loss_ltrb(pred, target, linear=True), torch.tensor([0.75]))


@pytest.mark.golden
def test_giou_and_focal_loss_equal_the_released_code(golden):
    data = golden("meinst_train")
    outputs = {}
    for kind in ("cls", "reg"):
        maps = [data[f"in/p{level}/{kind}"] for level in range(3, 8)]
        # Level, image, location: the released order.
        outputs[kind] = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in maps])
    labels, positive = data["default/labels"], data["default/pos_inds"]
    weight = data["default/pos_ctr_targets"]
    box = giou_loss_ltrb(outputs["reg"][positive], data["default/pos_reg_targets"])
    torch.testing.assert_close((box * weight).sum() / weight.sum(), data["default/loss/loc"], rtol=1e-5, atol=0)
    labels = torch.where(labels == outputs["cls"].shape[1], -1, labels)
    focal = sigmoid_focal(outputs["cls"], labels) / len(positive)
    torch.testing.assert_close(focal, data["default/loss/cls"], rtol=1e-5, atol=0)
