import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from onestage.nn import retinanet
from onestage.structures import ImageFrame, Target
from sprnet.coder import encode
from sprnet.config import DEMO
from sprnet.losses import compute_losses, mask_loss
from sprnet.model import RawOutput
from sprnet.targets import assign_targets

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]  # of a 128 x 128 input
FRAME = ImageFrame((128, 128), (128, 128), (128, 128), (1.0, 1.0))
BOXES = [[20.0, 24.0, 60.0, 56.0], [70.0, 70.0, 118.0, 116.0]]


def _raw(images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchors = retinanet.anchors(SIZES, retinanet.STRIDES, base_size=DEMO.anchor_size)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    return RawOutput(anchors, SIZES, noise(images, len(anchors), 3), noise(images, len(anchors), 4), [])


def _target(boxes=BOXES):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 128, 128, dtype=torch.uint8)
    masks[:, 30:110, 30:110] = 1
    return Target(boxes, torch.arange(len(boxes)), masks, torch.zeros(len(boxes), dtype=torch.bool))


def _assigned(raw, *targets, config=DEMO):
    return assign_targets(targets, raw, [FRAME] * len(targets), config)


def _logits(targets, value=0.0):
    return torch.full((len(targets.labels), 32, 32), value, requires_grad=True)


def test_class_loss_of_a_certain_background_anchor_by_hand():
    raw = _raw()
    logits = torch.full_like(raw.logits, -100.0)
    logits[0, 0, 1] = 0.0  # p = 1/2 where nothing is: (1 - alpha) p^2 ln 2
    targets = _assigned(raw, _target([]))
    loss = compute_losses(raw._replace(logits=logits), targets, _logits(targets), DEMO)["loss_cls"]
    assert_close(loss.item(), 0.75 * 0.25 * math.log(2))  # divided by one, not by no positive


def test_class_loss_is_divided_by_the_positives_of_the_batch_and_skips_ignored_anchors():
    raw = _raw(images=2)
    targets = _assigned(raw, _target(), _target(BOXES[:1]))
    labels = targets.assignment.labels
    counted = labels != retinanet.IGNORED
    onehot = F.one_hot(labels.clamp(min=0), 3) * (labels >= 0)[..., None]
    p = raw.logits.sigmoid()
    focal = -0.25 * onehot * (1 - p) ** 2 * p.log() - 0.75 * (1 - onehot) * p**2 * (1 - p).log()
    expected = focal[counted].sum() / (labels >= 0).sum()
    assert (~counted).any()
    assert_close(compute_losses(raw, targets, _logits(targets), DEMO)["loss_cls"], expected)


@pytest.mark.parametrize("coder", ["retina", "corners"])
def test_box_loss_is_zero_for_true_codes_and_linear_beyond_beta(coder):
    config = replace(DEMO, box_coder=coder)
    raw = _raw()
    targets = _assigned(raw, _target(), config=config)
    index = targets.assignment.index[0]
    true = torch.zeros_like(raw.deltas)
    true[0, index >= 0] = encode(raw.anchors[index >= 0], targets.boxes[0][index[index >= 0]], config)
    masks = _logits(targets)
    assert compute_losses(raw._replace(deltas=true), targets, masks, config)["loss_box"] == 0
    # Off by 1 everywhere: 4 times 1 - beta / 2; off by beta / 2: 4 times beta / 8.
    far, near = (
        compute_losses(raw._replace(deltas=true + off), targets, masks, config)["loss_box"] for off in (1.0, 1 / 18)
    )
    assert_close(far.item(), 4 * (1 - 1 / 18))
    assert_close(near.item(), 4 / 72, atol=1e-6, rtol=0)


def test_mask_loss_is_the_mean_over_cells_then_over_pixels():
    logits = torch.zeros(2, 32, 32)
    logits[1] = 2.0
    masks = torch.ones(2, 32, 32, dtype=torch.uint8)
    masks[1, :16] = 0
    expected = [math.log(2), (math.log1p(math.exp(2.0)) + math.log1p(math.exp(-2.0))) / 2]
    assert_close(mask_loss(logits, masks), torch.tensor(expected))
    raw = _raw()
    targets = _assigned(raw, _target())
    assert len(targets.labels) > 2
    assert_close(compute_losses(raw, targets, _logits(targets), DEMO)["loss_mask"].item(), math.log(2))


def test_without_instances_only_the_class_loss_counts_and_everything_stays_connected():
    raw = _raw(images=2)
    targets = _assigned(raw, _target([]), _target([]))
    masks = _logits(targets)
    losses = compute_losses(raw, targets, masks, DEMO)
    assert losses["loss_box"] == losses["loss_mask"] == 0
    gradients = torch.autograd.grad(sum(losses.values()), (raw.logits, raw.deltas, masks))
    assert gradients[0].any()
    assert not gradients[1].any()


def test_without_a_mask_head_there_is_no_mask_loss():
    raw = _raw()
    config = replace(DEMO, masks=False)
    targets = _assigned(raw, _target(), config=config)
    assert sorted(compute_losses(raw, targets, None, config)) == ["loss_box", "loss_cls"]
