import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from onestage.nn import fcos
from onestage.structures import Target
from onestage.testing import dense_mask_loss
from sais.config import DEMO
from sais.losses import compute_losses, draw, mask_loss
from sais.model import RawOutput
from sais.targets import assign_targets

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]  # of a 128 x 128 input
CONFIG = replace(DEMO, num_prototypes=4)
BOXES = [[20.0, 24.0, 60.0, 56.0], [70.0, 70.0, 118.0, 126.0]]


def _raw(images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(h * w for h, w in SIZES)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    raw = RawOutput(
        fcos.locations(SIZES),
        SIZES,
        noise(images, count, 3),
        noise(images, count, 4),
        noise(images, count),
        [],
        noise(images, count, 4),
        noise(images, 4, 32, 32),
    )
    return raw._replace(distances=(raw.distances / 4 + 3).exp())


def _target(boxes=BOXES):
    masks = torch.zeros(len(boxes), 128, 128, dtype=torch.uint8)
    masks[:, 30:110, 30:110] = 1
    return Target(
        torch.tensor(boxes).reshape(-1, 4),
        torch.arange(len(boxes)),
        masks,
        torch.zeros(len(boxes), dtype=torch.bool),
    )


def _losses(raw, targets, config=CONFIG):
    return compute_losses(raw, assign_targets(targets, raw, config), config)


def test_class_loss_of_a_certain_background_location_by_hand():
    raw = _raw()
    logits = torch.full_like(raw.logits, -100.0)
    logits[0, 0, 1] = 0.0  # p = 1/2 where nothing is: (1 - alpha) p^2 ln 2
    loss = _losses(raw._replace(logits=logits), [_target([])])["loss_cls"]
    assert_close(loss.item(), 0.75 * 0.25 * math.log(2))  # divided by one image and no positive


def test_box_loss_is_zero_for_true_distances_and_minus_ln_of_the_iou_else():
    raw = _raw()
    targets = assign_targets([_target()], raw, CONFIG)
    true = targets.locations.ltrb.clamp(min=1e-3)
    assert_close(compute_losses(raw._replace(distances=true), targets, CONFIG)["loss_box"].item(), 0.0)
    # Half as wide and half as high to each side: IoU 1/4 at every location, whatever the weights.
    quarter = compute_losses(raw._replace(distances=true / 2), targets, CONFIG)["loss_box"]
    assert_close(quarter.item(), math.log(4), atol=1e-5, rtol=0)


def test_box_loss_weighs_by_centerness():
    raw = _raw()
    targets = assign_targets([_target()], raw, CONFIG)
    positive = targets.locations.labels >= 0
    ltrb = targets.locations.ltrb[positive]
    weights = fcos.centerness_target(ltrb)
    predicted = raw.distances[positive]
    inter = torch.minimum(predicted, ltrb)
    area = [(x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3]) for x in (inter, predicted, ltrb)]
    iou = area[0] / (area[1] + area[2] - area[0])
    expected = (-iou.log() * weights).sum() / weights.sum()
    assert_close(compute_losses(raw, targets, CONFIG)["loss_box"], expected)


def test_centerness_loss_is_the_mean_over_positives():
    raw = _raw()
    targets = assign_targets([_target()], raw, CONFIG)
    positive = targets.locations.labels >= 0
    wanted = fcos.centerness_target(targets.locations.ltrb[positive])
    expected = F.binary_cross_entropy_with_logits(raw.centerness[positive], wanted)
    assert_close(compute_losses(raw, targets, CONFIG)["loss_centerness"], expected)


@pytest.mark.parametrize("box", [[20.0, 24.0, 60.0, 56.0], [16.0, 16.0, 112.0, 112.0]])
def test_a_constant_logit_costs_its_cross_entropy_times_crop_cells_over_box_cells(box):
    raw = _raw()
    flat = raw._replace(prototypes=torch.ones(1, 4, 32, 32), coefficients=torch.full_like(raw.coefficients, 0.25))
    target = _target([box])
    target.masks[:] = 1
    width, height = (box[2] - box[0]) / 4, (box[3] - box[1]) / 4
    # The crop keeps one cell more on each side: ceil(x2 + 1) - ceil(x1 - 1) columns. Masks are 1 everywhere.
    crop = (width + 2) * (height + 2)
    expected = math.log(1 + math.exp(-1)) * crop / (width * height)
    assert_close(_losses(flat, [target])["loss_mask"].item(), expected, atol=1e-5, rtol=0)


def test_mask_loss_of_a_tiny_box_is_divided_by_at_least_one_cell():
    raw = _raw()
    flat = raw._replace(prototypes=torch.zeros(1, 4, 32, 32))
    box = [11.5, 11.5, 13.5, 13.5]  # a quarter cell; around the location (12, 12)
    loss = _losses(flat, [_target([box])])["loss_mask"]
    # Cells j with 11.5 / 4 - 1 <= j < 13.5 / 4 + 1 are 2, 3, 4.
    assert_close(loss.item(), 9 * math.log(2), atol=1e-5, rtol=0)


def test_mask_loss_equals_the_dense_formula():
    raw = _raw(images=2)
    config = replace(CONFIG, masks_per_image=10**6)
    targets = assign_targets([_target(), _target(BOXES[:1])], raw, config)
    total, count = 0.0, 0
    for i in range(2):
        positive = (targets.locations.labels[i] >= 0).nonzero().flatten()
        instance = targets.locations.index[i, positive]
        boxes = targets.boxes[i][instance] / 4
        sums = dense_mask_loss(
            raw.prototypes[i], raw.coefficients[i, positive], boxes, targets.masks[i], instance, rule="margin"
        )
        total = total + (sums / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))).sum()
        count += len(positive)
    ours = compute_losses(raw, targets, config)["loss_mask"]
    assert_close(ours, total / count)
    for part in (raw.prototypes, raw.coefficients):
        (expected,) = torch.autograd.grad(total / count, part, retain_graph=True)
        (found,) = torch.autograd.grad(ours, part, retain_graph=True)
        assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_drawn_masks_stand_for_all():
    raw = _raw()
    targets = assign_targets([_target(BOXES[:1])], raw, CONFIG)
    positive = int((targets.locations.labels >= 0).sum())
    assert positive > 4
    same = raw._replace(coefficients=torch.full_like(raw.coefficients, 0.5))  # one instance: every positive costs alike
    everything = mask_loss(same, targets, replace(CONFIG, masks_per_image=positive))
    assert_close(mask_loss(same, targets, replace(CONFIG, masks_per_image=3)), everything)


def test_draw_is_without_replacement_and_uniform():
    assert draw(3, 5, torch.device("cpu")).tolist() == [0, 1, 2]
    torch.manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(2000):
        drawn = draw(6, 2, torch.device("cpu"))
        assert len(set(drawn.tolist())) == 2
        counts[drawn] += 1
    assert ((counts / 2000 - 1 / 3).abs() < 0.04).all()


def test_mask_weight_scales_the_mask_loss_alone():
    raw = _raw()
    one, three = (_losses(raw, [_target()], replace(CONFIG, mask_weight=weight)) for weight in (1.0, 3.0))
    for name, loss in one.items():
        assert_close(three[name], loss * (3 if name == "loss_mask" else 1))


def test_without_positives_only_the_class_loss_counts_and_all_outputs_stay_connected():
    raw = _raw(images=2)
    losses = _losses(raw, [_target([]), _target([])])
    assert {name for name, loss in losses.items() if loss == 0} == {"loss_box", "loss_centerness", "loss_mask"}
    gradients = torch.autograd.grad(sum(losses.values()), (raw.centerness, raw.coefficients, raw.prototypes))
    assert all((gradient == 0).all() for gradient in gradients)


def test_without_masks_there_is_no_mask_loss():
    raw = _raw()._replace(prototypes=None, coefficients=None)
    assert "loss_mask" not in _losses(raw, [_target()], replace(CONFIG, masks=False))
