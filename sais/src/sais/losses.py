"""SAIS's training losses, one function a term. The paper prints none: FCOS', and YOLACT's for the masks.

Widths are x2 - x1, never + 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage import boxes as box_ops
from onestage.engine.distributed import reduce_mean
from onestage.nn import fcos
from onestage.nn.losses import iou_loss, sigmoid_focal, zero_of
from onestage.ops.mask_loss import window_mask_loss
from sais.config import SAISConfig
from sais.decode import PROTOTYPE_STRIDE

if TYPE_CHECKING:
    from sais.model import RawOutput
    from sais.targets import SAISTargets


def compute_losses(raw: RawOutput, targets: SAISTargets, config: SAISConfig) -> dict[str, Tensor]:
    """All terms for one batch, weighted; their sum is the total.

    Args:
        raw: Dense outputs of B images, coefficients included.
        targets: What the locations answer for.
        config: Weights, normalisers, how many masks.

    Returns:
        `loss_cls`, `loss_box`, `loss_centerness` and, with masks, `loss_mask`: scalars, each connected to its outputs
        even where the batch has no positive.
    """
    answers = targets.locations
    positive = answers.labels >= 0
    count = _over_processes(positive.sum().float(), config)
    ltrb = answers.ltrb[positive]
    centerness = fcos.centerness_target(ltrb)
    losses = {
        "loss_cls": sigmoid_focal(
            raw.logits.flatten(0, 1), answers.labels.flatten(), config.focal_alpha, config.focal_gamma
        )
        / (count + len(raw.logits)),
        "loss_box": box_loss(raw.distances[positive], ltrb, centerness, config),
        "loss_centerness": F.binary_cross_entropy_with_logits(
            raw.centerness[positive].float(), centerness, reduction="sum"
        )
        / count.clamp(min=1.0),
    }
    if config.masks:
        losses["loss_mask"] = config.mask_weight * mask_loss(raw, targets, config) / count.clamp(min=1.0)
    return losses


def box_loss(distances: Tensor, ltrb: Tensor, centerness: Tensor, config: SAISConfig) -> Tensor:
    """-ln(IoU) of positives, a mean weighted by centerness.

    Args:
        distances: [N, 4] predicted left, top, right, bottom, pixels.
        ltrb: [N, 4] target distances, pixels.
        centerness: [N] targets in [0, 1], the weights.
        config: Whose sum of weights divides.
    """
    origin = distances.new_zeros(len(distances), 2)
    losses = iou_loss(fcos.decode_ltrb(origin, distances), fcos.decode_ltrb(origin, ltrb))
    return (losses * centerness).sum() / _over_processes(centerness.sum(), config).clamp(min=1e-6)


def mask_loss(raw: RawOutput, targets: SAISTargets, config: SAISConfig) -> Tensor:
    """Cross-entropy of assembled masks in their ground-truth boxes over box areas, summed over positives.

    Of an image with more than `config.masks_per_image` positives that many are drawn, and stand for all.
    """
    assert raw.prototypes is not None
    assert raw.coefficients is not None
    total = zero_of(raw.prototypes, raw.coefficients)
    for i, boxes in enumerate(targets.boxes):
        positive = (targets.locations.labels[i] >= 0).nonzero().flatten()
        if len(positive) == 0:
            continue
        chosen = positive[draw(len(positive), config.masks_per_image, positive.device)]
        instance = targets.locations.index[i, chosen]
        cells = boxes[instance] / PROTOTYPE_STRIDE
        sums = window_mask_loss(
            raw.prototypes[i], raw.coefficients[i, chosen], cells, targets.masks[i], instance, rule="margin"
        )
        means = sums / box_ops.area(cells).clamp(min=1.0)
        total = total + means.sum() * (len(positive) / len(chosen))
    return total


def draw(count: int, limit: int, device: torch.device) -> Tensor:
    """[min(count, limit)] int64 of 0..count-1, drawn without replacement; all in order where there are not more."""
    everything = torch.arange(count, device=device)
    return everything if count <= limit else torch.randperm(count, device=device)[:limit]


def _over_processes(value: Tensor, config: SAISConfig) -> Tensor:
    return reduce_mean(value) if config.reduce_normalisers else value
