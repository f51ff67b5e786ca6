import math

import pytest
import torch
from torch.nn import functional as F

from onestage.ops import mask_loss
from onestage.ops.mask_loss import masks_on_grid, mined_mask_loss, window_mask_loss
from onestage.testing import coco_like_boxes, dense_mask_loss

BOXES = torch.tensor(
    [[1.0, 2, 7.3, 8.1], [-2, 3.2, 5, 20], [1.2, 1.9, 7, 8], [5, 5, 5, 9], [4, 4, 3, 3], [8, 0, 11, 1]]
)


def problem(grid, kind=torch.float64):
    """Six boxes, some without cells, answering for two masks on a 9 x 11 grid."""
    generator = torch.Generator().manual_seed(grid[0])
    basis = torch.randn(3, 9, 11, generator=generator, dtype=kind, requires_grad=True)
    coefficients = torch.randn(6, 3 * grid[0] * grid[1], generator=generator, dtype=kind, requires_grad=True)
    masks = (torch.rand(2, 9, 11, generator=generator) < 0.5).byte()
    return basis, coefficients, BOXES.to(kind), masks, torch.tensor([0, 1, 0, 1, 1, 0])


def test_zero_logits_cost_ln_2_a_cell_by_hand():
    masks = torch.tensor([[[1, 0, 0], [0, 1, 0]]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.5, 0.0, 3.0, 1.0]])
    losses = window_mask_loss(torch.zeros(1, 2, 3), torch.ones(2, 1), boxes, masks, torch.tensor([0, 0]))
    torch.testing.assert_close(losses, torch.tensor([4 * math.log(2), 2 * math.log(2)]))


def test_margin_keeps_one_cell_more_on_each_side_by_hand():
    losses = window_mask_loss(
        torch.zeros(1, 5, 5),
        torch.ones(1, 1),
        torch.tensor([[2.0, 2.0, 3.0, 3.0]]),
        torch.zeros(1, 5, 5),
        torch.tensor([0]),
        rule="margin",
    )
    torch.testing.assert_close(losses, torch.tensor([9 * math.log(2)]))


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("pass_pixels", [0, 100, 10**9])  # each window alone, some together, all together
def test_gradients_are_right_in_double(grid, pass_pixels, monkeypatch):
    monkeypatch.setattr(mask_loss, "PASS_PIXELS", pass_pixels)
    basis, coefficients, boxes, masks, index = problem(grid)

    def losses(basis, coefficients):
        return window_mask_loss(basis, coefficients, boxes, masks, index, grid=grid)

    assert torch.autograd.gradcheck(losses, (basis, coefficients), fast_mode=True)
    torch.testing.assert_close(
        losses(basis, coefficients), dense_mask_loss(basis, coefficients, boxes, masks, index, grid=grid)
    )


@pytest.mark.parametrize(("grid", "rule"), [((1, 1), "half_open"), ((1, 1), "margin"), ((2, 2), "half_open")])
def test_losses_and_gradients_equal_dense_autograd(grid, rule, monkeypatch):
    monkeypatch.setattr(mask_loss, "MAX_PIXELS", 5000)  # several chunks of a pass
    generator = torch.Generator().manual_seed(1)
    answered = coco_like_boxes(4, (60, 80), generator)
    index = torch.randint(4, (30,), generator=generator)
    boxes = answered[index] + 4 * torch.randn(30, 4, generator=generator)
    masks = (torch.rand(4, 60, 80, generator=generator) < 0.5).byte()
    basis = torch.randn(16, 60, 80, generator=generator).relu()
    coefficients = 0.3 * torch.randn(30, 16 * grid[0] * grid[1], generator=generator)
    weights = torch.rand(30, generator=generator)
    results = []
    for function in (window_mask_loss, dense_mask_loss):
        inputs = basis.clone().requires_grad_(), coefficients.clone().requires_grad_()
        losses = function(*inputs, boxes, masks, index, grid=grid, rule=rule)
        (losses * weights).sum().backward()
        results.append((losses.detach(), inputs[0].grad, inputs[1].grad))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))


def test_certain_and_wrong_pixels_stay_finite():
    basis = torch.full((1, 4, 4), 200.0, requires_grad=True)
    losses = window_mask_loss(
        basis, torch.tensor([[1.0], [-1.0]]), BOXES[:2], torch.zeros(1, 4, 4), torch.tensor([0, 0])
    )
    losses.sum().backward()
    assert losses.tolist() == [6 * 200.0, 0.0]
    assert torch.isfinite(basis.grad).all()


def test_no_instances_keep_the_graph():
    basis = torch.rand(3, 4, 5, requires_grad=True)
    coefficients = torch.rand(0, 12, requires_grad=True)
    losses = window_mask_loss(
        basis, coefficients, torch.zeros(0, 4), torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.int64), grid=(2, 2)
    )
    assert losses.shape == (0,)
    losses.sum().backward()
    assert torch.equal(basis.grad, torch.zeros(3, 4, 5))
    assert coefficients.grad.shape == (0, 12)


def test_half_precision_is_computed_in_float32():
    basis, coefficients, boxes, masks, index = problem((2, 2), torch.float32)
    expected = window_mask_loss(basis, coefficients.bfloat16().float(), boxes, masks, index, grid=(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = window_mask_loss(basis, coefficients.bfloat16(), boxes, masks, index, grid=(2, 2))
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert coefficients.grad.abs().sum() > 0


def test_golden_gradients_of_the_assembly(golden):
    # Where the mask is 0, d loss / d p of -log(1 - p) is known, so the stored gradients of the soft masks follow.
    case = golden("sipmask_smp")
    boxes = case["boxes_mask_px"]
    inputs = case["basis"].clone().requires_grad_(), case["cof"].clone().requires_grad_()
    masks = case["gt_half"].permute(2, 0, 1)
    index = torch.arange(len(boxes))
    losses = window_mask_loss(*inputs, boxes, masks, index, grid=(2, 2))
    losses.sum().backward()
    soft, wanted = case["pruned"].permute(2, 0, 1), case["gt_cropped"].permute(2, 0, 1).float()
    each = torch.nn.functional.binary_cross_entropy(soft, wanted, reduction="none")
    torch.testing.assert_close(losses.detach(), each.sum((1, 2)), rtol=1e-4, atol=1e-4)
    dense = case["basis"].clone().requires_grad_(), case["cof"].clone().requires_grad_()
    dense_mask_loss(*dense, boxes, masks, index, grid=(2, 2)).sum().backward()
    for ours, theirs in zip(inputs, dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_cuda_tensors_give_the_losses_and_gradients_of_the_cpu():
    results = []
    for where in ("cpu", "cuda"):  # float64 has no kernel
        basis, coefficients, boxes, masks, index = (value.to(where) for value in problem((2, 2), torch.float32))
        losses = window_mask_loss(basis, coefficients, boxes, masks, index, grid=(2, 2))
        gradients = torch.autograd.grad(losses.sum(), (basis, coefficients))
        results.append([value.cpu() for value in (losses, *gradients)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_masks_shrink_as_a_bilinear_resize_above_one_half(stride):
    masks = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(stride)).gt(0.4).byte()
    resized = F.interpolate(masks[:, None].float(), size=(32 // stride, 48 // stride), mode="bilinear")[:, 0]
    assert torch.equal(masks_on_grid(masks, stride), (resized > 0.5).byte())
    assert masks_on_grid(masks[:0], stride).shape == (0, 32 // stride, 48 // stride)


def test_mining_keeps_the_hardest_background_by_hand():
    logits = torch.tensor([[[4.0, -1.0, 2.0, 3.0, 9.0]]])
    masks = torch.tensor([[[1, 0, 0, 0, 0]]])
    window = torch.tensor([[0, 0, 4, 1]])  # the last and hardest is outside
    index = torch.tensor([0])
    for negatives, kept in (
        (1.0, [3.0]),
        (1.5, [3.0, 2.0]),
        (2.0, [3.0, 2.0]),
        (9.0, [3.0, 2.0, -1.0]),
        (None, [3, 2, -1]),
    ):
        loss, count = mined_mask_loss(logits, torch.ones(1, 1), window, masks, index, negatives=negatives)
        expected = F.softplus(torch.tensor([-4.0, *kept])).sum()
        torch.testing.assert_close(loss[0], expected)
        assert count.tolist() == [1 + len(kept)]


def test_mining_without_foreground_keeps_nothing():
    logits = torch.randn(1, 4, 4, requires_grad=True)
    nothing = torch.zeros(1, 4, 4, dtype=torch.uint8)
    whole = torch.tensor([[0, 0, 4, 4]])
    loss, count = mined_mask_loss(logits, torch.ones(1, 1), whole, nothing, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == 0
    assert count.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("pass_pixels", [0, 10**9])  # each window alone, all together
@pytest.mark.parametrize("negatives", [0.5, 1.0, None])
def test_mined_losses_and_gradients_equal_dense_autograd(negatives, pass_pixels, monkeypatch):
    monkeypatch.setattr(mask_loss, "PASS_PIXELS", pass_pixels)
    basis, coefficients, boxes, masks, index = problem((1, 1))
    windows = mask_loss.crop_window(boxes, (9, 11))
    ours, counts = mined_mask_loss(basis, coefficients, windows, masks, index, negatives=negatives)
    expected = []
    for weights, mask, (x0, y0, x1, y1) in zip(coefficients, masks[index], windows.tolist(), strict=True):
        logits = torch.einsum("d,dhw->hw", weights, basis)[y0:y1, x0:x1].flatten()
        foreground = mask[y0:y1, x0:x1].flatten() > 0
        losses = F.binary_cross_entropy_with_logits(logits, foreground.to(logits.dtype), reduction="none")
        background = losses[~foreground].sort(descending=True).values
        if negatives is not None:
            background = background[: math.ceil(negatives * int(foreground.sum()))]
        expected.append(losses[foreground].sum() + background.sum())
    torch.testing.assert_close(ours, torch.stack(expected))
    upstream = torch.rand(6, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * upstream).sum(), (basis, coefficients)),
        torch.autograd.grad((torch.stack(expected) * upstream).sum(), (basis, coefficients)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert (counts <= (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])).all()
