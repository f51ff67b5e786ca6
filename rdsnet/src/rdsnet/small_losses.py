"""What trains the real-time model: YOLACT's matching and losses, and RDSNet's mask loss in the place of its own.

Boxes are exclusive and relative unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage import boxes as box_ops
from onestage.nn.losses import zero_of
from onestage.nn.retinanet import IGNORED, NEGATIVE, encode
from onestage.ops.assemble import crop_window, resize_maps
from onestage.structures import Target
from rdsnet.config import RDSNetConfig
from rdsnet.decode import contrast, inside
from rdsnet.losses import instance_losses, normaliser
from rdsnet.targets import drawn

if TYPE_CHECKING:
    from rdsnet.small import SmallOutput

POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4
CROWD_IOU = 0.7  # share of an anchor in a crowd region that leaves it out
VARIANCES = (0.1, 0.1, 0.2, 0.2)  # predicted centre shifts and log side ratios are in these units


def compute_losses(
    raw: SmallOutput, targets: list[Target], vectors_at: Callable[[int, Tensor], Tensor], config: RDSNetConfig
) -> dict[str, Tensor]:
    """All terms for one batch, weighted; their sum is the total.

    Args:
        raw: Outputs of the network for B images, semantic map included.
        targets: B targets in input pixels, exclusive boxes, crowds marked.
        vectors_at: (image, anchors [N]) to mask vectors, differentiable.
        config: Weights, crop, mining.

    Returns:
        `loss_cls`, `loss_box`, `loss_mask`, `loss_semantic`: scalars, each connected to its outputs.
    """
    matches, instances = [], []
    for target in targets:
        height, width = target.masks.shape[-2:]
        # Divided, not scaled: rounding would move sides across the cells they lie on.
        relative = target.boxes / target.boxes.new_tensor([width, height, width, height])
        matches.append(match_anchors(raw.anchors, relative[~target.iscrowd], relative[target.iscrowd]))
        instances.append((target[~target.iscrowd], relative[~target.iscrowd]))
    index = torch.stack(matches)
    positives = normaliser((index >= 0).sum(), 0, config).clamp(min=1)
    variances = raw.anchors.new_tensor(VARIANCES)
    box_sum, class_sum = zero_of(raw.deltas), zero_of(raw.logits)
    for i, (target, boxes) in enumerate(instances):
        positive = (index[i] >= 0).nonzero().flatten()
        wanted = encode(raw.anchors[positive], boxes[index[i, positive]]) / variances
        box_sum = box_sum + F.smooth_l1_loss(raw.deltas[i, positive].float(), wanted, reduction="sum")
        labels = torch.cat((target.labels, target.labels.new_zeros(1)))[index[i].clamp(min=-1)]
        class_sum = class_sum + class_loss(raw.logits[i].float(), index[i], labels, config.yolact.class_negatives)
    combine = combined_masks if config.masks == "lc" else correlated_masks
    return {
        "loss_cls": class_sum / positives,
        "loss_box": config.yolact.box_weight * box_sum / positives,
        "loss_mask": config.mask_weight * combine(raw, index, instances, vectors_at, config),
        "loss_semantic": semantic_loss(raw, [target for target, _ in instances]),
    }


def match_anchors(anchors: Tensor, boxes: Tensor, crowds: Tensor) -> Tensor:
    """Each ground truth claims one anchor of its own, the best pairs first; then IoU decides.

    Args:
        anchors: [A, 4] xyxy.
        boxes: [G, 4] xyxy.
        crowds: [C, 4] xyxy of crowd regions: anchors that lie in one and answer for nothing are left out.

    Returns:
        [A] int64, 0..G-1, NEGATIVE or IGNORED.
    """
    if len(boxes) == 0:
        index = torch.full((len(anchors),), NEGATIVE, dtype=torch.int64, device=anchors.device)
    else:
        iou = box_ops.iou_matrix(boxes, anchors)  # [G, A]
        best, owner = iou.max(0)
        for _ in range(len(boxes)):
            pair = int(iou.argmax())
            truth, anchor = divmod(pair, len(anchors))
            iou[:, anchor] = -1
            iou[truth] = -1
            best[anchor], owner[anchor] = 2.0, truth
        index = torch.where(best >= POSITIVE_IOU, owner, torch.where(best < NEGATIVE_IOU, NEGATIVE, IGNORED))
    if len(crowds) > 0:
        corner = torch.minimum(anchors[:, None, 2:], crowds[None, :, 2:])
        overlap = (corner - torch.maximum(anchors[:, None, :2], crowds[None, :, :2])).clamp(min=0).prod(2)
        share = overlap / box_ops.area(anchors)[:, None]
        index = torch.where((index < 0) & (share > CROWD_IOU).any(1), IGNORED, index)
    return index


def class_loss(logits: Tensor, index: Tensor, labels: Tensor, negatives: float) -> Tensor:
    """Softmax cross-entropy of one image's positives and of its hardest background anchors, summed.

    Args:
        logits: [A, K + 1], class 0 is the background.
        index: [A] int64, what the anchors answer for.
        labels: [A] int64, 0..K-1 where they answer for something.
        negatives: Background anchors for each positive one; those that seem least like background.

    Returns:
        [].
    """
    positive = index >= 0
    doubt = (logits.logsumexp(1) - logits[:, 0]).detach()
    order = doubt.masked_fill(index != NEGATIVE, -torch.inf).argsort(descending=True, stable=True)
    count = min(int(negatives * int(positive.sum())), len(logits) - 1)
    hard = torch.zeros_like(positive)
    hard[order[:count]] = True
    counted = positive | (hard & (index == NEGATIVE))
    wanted = torch.where(positive, labels + 1, 0)
    return F.cross_entropy(logits[counted], wanted[counted], reduction="sum")


def combined_masks(
    raw: SmallOutput,
    index: Tensor,
    instances: list[tuple[Target, Tensor]],
    vectors_at: Callable[[int, Tensor], Tensor],
    config: RDSNetConfig,
) -> Tensor:
    """YOLACT's: binary cross-entropy in the ground-truth box over the box's area, a mean over positives.

    Args:
        raw: Outputs for B images.
        index: [B, A] int64, what the anchors answer for.
        instances: Of B images: G instances, no crowds, input pixels, and their boxes [G, 4].
        vectors_at: (image, anchors [N]) to coefficients [N, d], differentiable.
        config: How many positives are drawn.

    Returns:
        [], connected to the pixel vectors even without a positive.
    """
    extent = (raw.pixel_vectors.shape[2], raw.pixel_vectors.shape[3])
    total = zero_of(raw.pixel_vectors)
    for i, (target, boxes) in enumerate(instances):
        positive = (index[i] >= 0).nonzero().flatten()
        chosen = drawn(positive, config)
        owner = index[i, chosen]
        cells, masks = box_ops.scale(boxes, (float(extent[0]), float(extent[1]))), on_grid(target.masks, extent)
        kept = inside(crop_window(cells, extent, "margin"), extent)
        coefficients = vectors_at(i, chosen)
        # On probabilities, dense, as published: where float32 has rounded them to 0 or 1 this loss stands still.
        with torch.autocast(coefficients.device.type, enabled=False):
            soft = (raw.pixel_vectors[i].float().permute(1, 2, 0) @ coefficients.float().T).sigmoid()  # [h, w, n]
            losses = F.binary_cross_entropy(
                soft * kept[owner].permute(1, 2, 0), masks[owner].permute(1, 2, 0).float(), reduction="none"
            )
        means = losses.sum((0, 1)) / box_ops.area(cells)[owner]
        total = total + means.sum() * (len(positive) / max(1, len(chosen)))
    return total / normaliser((index >= 0).sum(), 0, config).clamp(min=1)


def correlated_masks(
    raw: SmallOutput,
    index: Tensor,
    instances: list[tuple[Target, Tensor]],
    vectors_at: Callable[[int, Tensor], Tensor],
    config: RDSNetConfig,
) -> Tensor:
    """RDSNet's, as `rdsnet.losses.mask_loss`; arguments as of `combined_masks`, with vectors [N, 2, d]."""
    extent = (raw.pixel_vectors.shape[2], raw.pixel_vectors.shape[3])
    losses = []
    for i, (target, _) in enumerate(instances):
        positive = (index[i] >= 0).nonzero().flatten()
        large = target.masks.flatten(1).sum(1) > config.min_mask_area
        chosen = drawn(positive[large[index[i, positive]]], config)
        owner = index[i, chosen]
        factors = extent[0] / target.masks.shape[1], extent[1] / target.masks.shape[2]
        cells = box_ops.scale(box_ops.to_legacy(target.boxes), factors)[owner]
        masks = on_grid(target.masks, extent)
        losses.append(
            instance_losses(raw.pixel_vectors[i], contrast(vectors_at(i, chosen)), cells, masks, owner, config)
        )
    every = torch.cat(losses)
    return every.sum() / normaliser(index.new_tensor(len(every)), 1, config) + zero_of(raw.pixel_vectors)


def semantic_loss(raw: SmallOutput, targets: list[Target]) -> Tensor:
    """Binary cross-entropy of P3's class maps: summed over classes, a mean over cells and images.

    Args:
        raw: `semantic` [B, K, h, w] is read.
        targets: B targets; a class's map should be the union of its masks [G, H, W].

    Returns:
        [].
    """
    assert raw.semantic is not None
    height, width = raw.semantic.shape[2:]
    wanted = torch.zeros_like(raw.semantic)
    for i, target in enumerate(targets):
        masks = on_grid(target.masks, (height, width)).to(wanted.dtype)
        for label, mask in zip(target.labels.tolist(), masks, strict=True):
            wanted[i, label] = torch.maximum(wanted[i, label], mask)
    total = F.binary_cross_entropy_with_logits(raw.semantic.float(), wanted.float(), reduction="sum")
    return total / (height * width * len(targets))


def on_grid(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [G, H, W] on a grid of (height, width): bilinear, above one half. [G, height, width] uint8."""
    return (resize_maps(masks.float(), size) > 0.5).to(torch.uint8)
