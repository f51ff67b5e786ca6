"""The oracles themselves: against golden data and by hand, so that what is compared with them means something."""

import torch

from onestage.testing import coco_like_boxes, dense_masks, dense_soft_masks


def test_boxes_are_as_in_coco():
    for size in ((480, 640), (544, 544), (800, 1333)):
        boxes = coco_like_boxes(100, size, torch.Generator().manual_seed(0))
        height, width = size
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (height * width)
        assert 6 < areas.sum() < 10
        side = (areas * 480 * 640).sqrt()
        assert 35 <= (side < 32).sum() <= 45
        assert 20 <= (side > 96).sum() <= 30


def test_golden_gradients_of_dense_soft_masks(golden):
    case = golden("sipmask_smp")
    basis, coefficients = case["basis"].requires_grad_(), case["cof"].requires_grad_()
    soft = dense_soft_masks(basis, coefficients, case["boxes_mask_px"], grid=(2, 2))
    (soft * case["upstream_grad"].permute(2, 0, 1)).sum().backward()
    torch.testing.assert_close(basis.grad, case["grad_basis"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coefficients.grad, case["grad_cof"], rtol=1e-4, atol=1e-4)


def test_missing_rows_of_the_resized_canvas_stay_empty():
    masks = dense_masks(torch.ones(1, 4, 4), 0.5, (7, 7), (8, 6))
    assert masks.shape == (1, 8, 6)
    assert masks[0, :7].all()
    assert not masks[0, 7].any()
