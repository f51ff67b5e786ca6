"""SPRNet's training losses: "three parts", all of weight 1."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from onestage.engine.distributed import reduce_mean
from onestage.nn import retinanet
from sprnet.coder import encode
from sprnet.config import SPRNetConfig

if TYPE_CHECKING:
    from sprnet.model import RawOutput
    from sprnet.targets import SPRNetTargets


def compute_losses(
    raw: RawOutput, targets: SPRNetTargets, mask_logits: Tensor | None, config: SPRNetConfig
) -> dict[str, Tensor]:
    """All terms for one batch; their sum is the total.

    Args:
        raw: Outputs of B images.
        targets: What anchors and pixels answer for.
        mask_logits: [N, 32, 32] of the positive pixels, each for its instance's class; None without a mask head.
        config: Focal loss, box code, normalisers.

    Returns:
        `loss_cls`, `loss_box` and, with a mask head, `loss_mask`: scalars, each connected to its outputs even where
        the batch has no positive.
    """
    positives = _at_least_one((targets.assignment.index >= 0).sum().float(), config)
    class_sum, box_sum = retinanet.detection_losses(
        raw.logits,
        raw.deltas,
        raw.anchors,
        targets.assignment,
        targets.boxes,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        beta=config.box_beta,
        code=partial(encode, config=config),
    )
    losses = {"loss_cls": class_sum / positives, "loss_box": box_sum / positives}
    if mask_logits is not None:
        pixels = _at_least_one(positives.new_full((), len(mask_logits)), config)
        losses["loss_mask"] = mask_loss(mask_logits, targets.masks).sum() / pixels
    return losses


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of each pixel's map: [N] from logits [N, 32, 32] and masks [N, 32, 32] of 0 and 1."""
    return F.binary_cross_entropy_with_logits(logits.float(), masks.float(), reduction="none").mean((1, 2))


def _at_least_one(count: Tensor, config: SPRNetConfig) -> Tensor:
    return (reduce_mean(count) if config.reduce_normalisers else count).clamp(min=1.0)
