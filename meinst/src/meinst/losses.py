"""MEInst's training losses (Sec. 3.3), one function a term. All weights are 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from onestage.engine.distributed import reduce_mean
from onestage.nn import fcos
from onestage.nn.losses import giou_loss_ltrb, iou_loss_ltrb, sigmoid_focal, zero_of

if TYPE_CHECKING:
    from meinst.model import RawOutput
    from meinst.targets import MEInstTargets


def compute_losses(
    raw: RawOutput,
    targets: MEInstTargets,
    codec: MaskCodec | PixelCodec,
    config: MEInstConfig,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """All terms for one batch; their sum is the total.

    Args:
        raw: Dense outputs of B images, codes included.
        targets: What the locations answer for.
        codec: Makes code targets from masks, or masks from codes.
        config: Which losses.
        noise: [positives, m * m] uniform in [0, 1) for the code targets; None draws it.

    Returns:
        `loss_cls`, `loss_box`, `loss_centerness` and, with a mask branch, `loss_mask`: scalars, each connected to its
        outputs even where the batch has no positive.
    """
    labels = targets.assignment.labels
    positive = labels >= 0
    ltrb = targets.assignment.ltrb[positive]
    centerness = fcos.centerness_target(ltrb)
    num_positives = reduce_mean(positive.sum().float()).clamp(min=1.0)
    total_centerness = reduce_mean(centerness.sum()).clamp(min=1e-6)

    focal = sigmoid_focal(
        raw.logits.flatten(0, 1), labels.flatten(), alpha=config.focal_alpha, gamma=config.focal_gamma
    )
    strides = targets.assignment.strides.expand_as(positive)[positive]
    boxes = box_loss(raw.distances[positive], ltrb / strides[:, None], config)
    centers = F.binary_cross_entropy_with_logits(raw.centerness[positive].float(), centerness, reduction="sum")
    losses = {
        "loss_cls": focal / num_positives,
        "loss_box": (boxes * centerness).sum() / total_centerness + zero_of(raw.distances),
        "loss_centerness": centers / num_positives + zero_of(raw.centerness),
    }
    if raw.codes is not None:
        codes, classes = raw.codes[positive], labels[positive]
        masks = mask_loss(codes, targets.masks, classes, codec, config, noise)
        losses["loss_mask"] = (masks * centerness).sum() / _mask_total(total_centerness, config) + zero_of(raw.codes)
    return losses


def box_loss(distances: Tensor, ltrb: Tensor, config: MEInstConfig) -> Tensor:
    """[N] losses of positives from distances to the sides, [N, 4] each, in strides."""
    if config.box_loss == "giou":
        return giou_loss_ltrb(distances, ltrb)
    return iou_loss_ltrb(distances, ltrb, linear=config.box_loss == "linear_iou")


def mask_loss(
    codes: Tensor,
    masks: Tensor,
    labels: Tensor,
    codec: MaskCodec | PixelCodec,
    config: MEInstConfig,
    noise: Tensor | None = None,
) -> Tensor:
    """[N] losses of positives, summed over what a code or a mask has (Eq. 3, Tables 3 and 4).

    Args:
        codes: [N, D] predicted codes.
        masks: [N, m, m] of 0 and 1.
        labels: [N] int64.
        codec: Its components learn nothing.
        config: Which loss, and whether it looks at codes or at masks.
        noise: [N, m * m] uniform in [0, 1) for the code targets.
    """
    if config.loss_on_mask or config.encoding == "none":
        logits = codec.logits(codes, labels)
        return F.binary_cross_entropy_with_logits(logits, masks.flatten(1).float(), reduction="none").sum(1)
    assert isinstance(codec, MaskCodec)
    wanted = codec.encode(masks, labels, noise)
    codes = codes.float()
    if config.mask_loss == "cosine":
        return 1 - F.cosine_similarity(codes, wanted)
    if config.mask_loss == "l1":
        return (codes - wanted).abs().sum(1)
    if config.mask_loss == "smooth_l1":
        return F.smooth_l1_loss(codes, wanted, reduction="none").sum(1)
    return (codes - wanted).square().sum(1)


def _mask_total(total_centerness: Tensor, config: MEInstConfig) -> Tensor:
    """What the weighted sum is divided by: with the weights, the numbers compared, so that it is a mean of them."""
    if config.loss_on_mask or config.encoding == "none":
        return (total_centerness * config.mask_size**2).clamp(min=1.0)
    if config.mask_loss == "cosine":
        return total_centerness
    return (total_centerness * config.code_length).clamp(min=1.0)
