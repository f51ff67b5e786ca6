"""SipMask's training losses (Sec. 3.4), one function a term.

`mm` and `fc` name the two released code bases; where they differ a term has one function each. All weights are 1.
Boxes here are legacy (inclusive, width = x2 - x1 + 1 in IoUs) input pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.boxes import paired_iou
from onestage.engine.distributed import reduce_mean
from onestage.nn import fcos
from onestage.nn.losses import giou_loss_ltrb, iou_loss, sigmoid_focal
from onestage.nn.nms import greedy_nms
from onestage.ops.mask_loss import masks_on_grid, window_mask_loss
from sipmask.config import SipMaskConfig

if TYPE_CHECKING:
    from sipmask.model import RawOutput
    from sipmask.targets import SipMaskTargets


def compute_losses(raw: RawOutput, targets: SipMaskTargets, config: SipMaskConfig) -> dict[str, Tensor]:
    """All terms for one batch; their sum is the total.

    Args:
        raw: Dense outputs of B images, coefficients included.
        targets: What the locations answer for.
        config: Profile, weighting, normalisers.

    Returns:
        `loss_cls`, `loss_box`, `loss_centerness`, `loss_mask`: scalars, each connected to its outputs even where the
        batch has no positive.
    """
    assert raw.coefficients is not None, "training needs dense coefficients"
    assigned = targets.assigned
    positive = assigned.labels >= 0
    num_positives = positive.sum().float()
    distances, ltrb = raw.distances[positive], assigned.ltrb[positive]
    strides = assigned.strides.expand_as(positive)[positive]
    centerness = fcos.centerness_target(ltrb)
    return {
        "loss_cls": classification_loss(raw.logits, assigned.labels, num_positives, config),
        "loss_box": box_loss(distances, ltrb, strides, centerness, config) + 0 * raw.distances.sum(),
        "loss_centerness": centerness_loss(raw.centerness[positive], centerness, num_positives, config)
        + 0 * raw.centerness.sum(),
        "loss_mask": mask_loss(raw, targets, config) + 0 * (raw.coefficients.sum() + raw.basis.sum()),
    }


def classification_loss(logits: Tensor, labels: Tensor, num_positives: Tensor, config: SipMaskConfig) -> Tensor:
    """Focal loss over all locations and classes; mm divides by positives + images, fc by positives, at least 1."""
    if config.profile == "fc":
        normaliser = reduce_mean(num_positives).clamp(min=1.0)
    else:
        normaliser = _maybe_reduce(num_positives + len(logits), config)
    total = sigmoid_focal(logits.flatten(0, 1), labels.flatten(), config.focal_alpha, config.focal_gamma)
    return total / normaliser


def box_loss(distances: Tensor, ltrb: Tensor, strides: Tensor, centerness: Tensor, config: SipMaskConfig) -> Tensor:
    """IoU loss of positives (mm: -ln of the +1 IoU; fc: GIoU smoothed by 1), weighted by centerness.

    Args:
        distances: [N, 4] predicted left, top, right, bottom, pixels.
        ltrb: [N, 4] target distances, pixels.
        strides: [N] pixels; distances are compared in strides, which makes the "+1" one stride wide.
        centerness: [N] targets in [0, 1], the weights.
    """
    predicted, wanted = distances / strides[:, None], ltrb / strides[:, None]
    if config.profile == "fc":
        losses = giou_loss_ltrb(predicted, wanted)
        total = reduce_mean(centerness.sum())
    else:
        origin = predicted.new_zeros(len(predicted), 2)
        losses = iou_loss(fcos.decode_ltrb(origin, predicted), fcos.decode_ltrb(origin, wanted), legacy=True)
        total = _maybe_reduce(centerness.sum(), config)
    return (losses * centerness).sum() / total.clamp(min=1e-6)


def centerness_loss(logits: Tensor, target: Tensor, num_positives: Tensor, config: SipMaskConfig) -> Tensor:
    """Binary cross-entropy over positives, divided by their number."""
    reduce = config.profile == "fc" or config.reduce_normalisers
    total = reduce_mean(num_positives) if reduce else num_positives
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / total.clamp(min=1.0)


def mask_loss(raw: RawOutput, targets: SipMaskTargets, config: SipMaskConfig) -> Tensor:
    """Mask alignment weighting loss: BCE of each positive inside its *predicted* box, weighted by score x IoU."""
    basis = F.interpolate(raw.basis, scale_factor=config.basis_upsample, mode="bilinear", align_corners=False)
    total = raw.basis.new_zeros(())
    for i in range(len(raw.logits)):
        total = total + _image_mask_loss(raw, targets, basis[i], i, config)
    total = total / len(raw.logits)
    if config.profile == "fc":
        total = torch.where(total > 1.0, total * 0.5, total)  # a step in the released code
    return total


def alignment_weights(
    logits: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor, weighting: str
) -> tuple[Tensor, Tensor]:
    """The raw alpha of Sec. 3.4 and the class score in it; both carry no gradient.

    Args:
        logits: [N, K] class logits of positives.
        labels: [N] int64 class of the answered instance.
        boxes: [N, 4] predicted boxes, legacy, at mask resolution.
        gt_boxes: [N, 4] answered boxes, the same frame.
        weighting: Which factors enter; "none" gives ones.

    Returns:
        alpha [N] and score [N].
    """
    score = logits.detach().gather(1, labels[:, None]).squeeze(1).sigmoid()
    overlap = paired_iou(boxes, gt_boxes, legacy=True)
    alpha = torch.ones_like(score)
    if weighting in ("cls", "cls_loc"):
        alpha = alpha * score
    if weighting in ("loc", "cls_loc"):
        alpha = alpha * overlap
    return alpha, score


def _image_mask_loss(raw: RawOutput, targets: SipMaskTargets, basis: Tensor, i: int, config: SipMaskConfig) -> Tensor:
    assert raw.coefficients is not None
    labels, index = targets.assigned.labels[i], targets.assigned.index[i]
    positive = (labels >= 0).nonzero().flatten()
    stride = config.basis_stride
    boxes = fcos.decode_ltrb(raw.points[positive], raw.distances[i, positive].detach()) / stride
    kept = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) > 1.0
    positive, boxes = positive[kept], boxes[kept]
    if len(positive) == 0:
        return basis.new_zeros(())
    instance = index[positive]
    alpha, score = alignment_weights(
        raw.logits[i, positive],
        labels[positive],
        boxes,
        targets.boxes[i][instance] / stride,
        config.weighting,
    )
    if config.normalize_weighting:
        alpha = alpha / (alpha.sum() + (0.0 if config.profile == "fc" else 1e-4)) * len(alpha)
    if config.profile == "fc":
        kept = greedy_nms(boxes, score, torch.zeros_like(instance), 0.9, legacy=True)
        positive, boxes, instance, alpha = positive[kept], boxes[kept], instance[kept], alpha[kept]
    sums = window_mask_loss(
        basis,
        raw.coefficients[i, positive],
        boxes,
        masks_on_grid(targets.masks[i], stride),
        instance,
        grid=config.grid,
    )
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (alpha * sums / area).sum() / len(positive)


def _maybe_reduce(value: Tensor, config: SipMaskConfig) -> Tensor:
    return reduce_mean(value) if config.reduce_normalisers else value
