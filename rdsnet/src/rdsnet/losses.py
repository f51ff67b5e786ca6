"""RDSNet's training losses, one function a term: L_cls + L_reg + L_mask. MBRM learns on its own, see refine.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage.engine.distributed import reduce_mean, world_size
from onestage.nn.losses import zero_of
from onestage.nn.retinanet import detection_losses
from onestage.ops.assemble import crop_window
from onestage.ops.mask_loss import mined_mask_loss
from rdsnet.config import RDSNetConfig
from rdsnet.decode import PIXEL_STRIDE, contrast
from rdsnet.targets import mask_instances

if TYPE_CHECKING:
    from rdsnet.model import RawOutput
    from rdsnet.targets import RDSNetTargets


def compute_losses(
    raw: RawOutput, targets: RDSNetTargets, vectors_at: Callable[[int, Tensor], Tensor], config: RDSNetConfig
) -> dict[str, Tensor]:
    """All terms for one batch, weighted; their sum is the total.

    Args:
        raw: Outputs of the network for B images.
        targets: What the anchors answer for.
        vectors_at: (image, anchors [N]) to background and foreground vectors [N, 2, d], differentiable.
        config: Weights, crop, mining.

    Returns:
        `loss_cls`, `loss_box` and, with masks, `loss_mask`: scalars, each connected to its outputs even where the
        batch has no positive.
    """
    positives = normaliser((targets.anchors.index >= 0).sum(1).clamp(min=1).sum(), 0, config)
    class_sum, box_sum = detection_losses(
        raw.logits,
        raw.deltas,
        raw.anchors,
        targets.anchors,
        targets.boxes,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        beta=config.box_beta,
        legacy=True,
    )
    losses = {"loss_cls": class_sum / positives, "loss_box": box_sum / positives}
    if raw.pixel_vectors is not None:
        losses["loss_mask"] = config.mask_weight * mask_loss(raw, targets, vectors_at, config)
    return losses


def mask_loss(
    raw: RawOutput, targets: RDSNetTargets, vectors_at: Callable[[int, Tensor], Tensor], config: RDSNetConfig
) -> Tensor:
    """Mean over the drawn positives of all images, with one more in the denominator, as released.

    Args:
        raw: Outputs for B images, with pixel vectors.
        targets: What the anchors answer for, and the masks of B images.
        vectors_at: (image, anchors [N]) to background and foreground vectors [N, 2, d], differentiable.
        config: Crop and mining.

    Returns:
        [], connected to the pixel vectors even where no positive trains masks.
    """
    assert raw.pixel_vectors is not None
    losses = []
    for i, masks in enumerate(targets.masks):
        chosen = mask_instances(targets, i, config)
        instance = targets.anchors.index[i, chosen]
        vectors = raw.pixel_vectors[i, :, : masks.shape[1], : masks.shape[2]]
        boxes = targets.boxes[i][instance] / PIXEL_STRIDE
        losses.append(instance_losses(vectors, contrast(vectors_at(i, chosen)), boxes, masks, instance, config))
    every = torch.cat(losses)
    count = normaliser(targets.anchors.index.new_tensor(len(every)), 1, config)
    return every.sum() / count + zero_of(raw.pixel_vectors)


def normaliser(count: Tensor, more: float, config: RDSNetConfig) -> Tensor:
    """What a sum of losses is divided by: `count` (a scalar) and `more`; with `reduce_normalisers` so that the mean
    over processes is the loss of one process with all their images."""
    if config.reduce_normalisers:
        return reduce_mean(count.float()) + more / world_size()
    return count.float() + more


def instance_losses(
    vectors: Tensor, contrasts: Tensor, boxes: Tensor, masks: Tensor, instance: Tensor, config: RDSNetConfig
) -> Tensor:
    """Softmax cross-entropy in the expanded box, its background mined (Sec. 3.2): a mean with one pixel more.

    Args:
        vectors: [d, h, w] pixel vectors.
        contrasts: [N, d], foreground minus background vectors.
        boxes: [N, 4] inclusive xyxy of the assigned ground truths, cells of the vectors' grid.
        masks: [G, h, w] uint8.
        instance: [N] int64 in 0..G-1.
        config: Crop and mining.

    Returns:
        [N].
    """
    extent = (vectors.shape[1], vectors.shape[2])
    if config.train_crop is None:
        windows = boxes.new_tensor([0, 0, extent[1], extent[0]]).long().expand(len(boxes), 4)
    else:
        windows = crop_window(boxes, extent, "expand", padding=config.train_crop)
    sums, counts = mined_mask_loss(vectors, contrasts, windows, masks, instance, negatives=config.ohem)
    return sums / (counts + 1)
