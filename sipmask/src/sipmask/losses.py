"""SipMask's training losses (Sec. 3.4), one function a term.

`mm`, `fc` and `vis` name the released code bases (config). All weights are 1.
Boxes here are legacy (inclusive, width = x2 - x1 + 1 in IoUs) input pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.boxes import area as box_area
from onestage.boxes import paired_iou
from onestage.engine.distributed import reduce_mean, world_size
from onestage.nn import fcos
from onestage.nn.losses import giou_loss_ltrb, iou_loss, sigmoid_focal, zero_of
from onestage.ops.assemble import assemble_soft, crop_window
from onestage.ops.mask_loss import masks_on_grid, window_mask_loss
from onestage.ops.nms import greedy_nms
from sipmask.config import SipMaskConfig
from sipmask.scoring import mask_iou
from sipmask.tracking import match_logits

if TYPE_CHECKING:
    from onestage.structures import Reference
    from sipmask.model import RawOutput, SipMaskHead
    from sipmask.scoring import MaskScoring
    from sipmask.targets import SipMaskTargets
    from sipmask.tracking import TrackingBranch

# Of the re-scoring loss: which masks count, and how much it counts.
SCORED_IOU, SCORED_AREA, SCORED_THRESHOLD, SCORING_WEIGHT = 0.1, 100, 0.4, 10.0
JITTER = 0.05  # largest shift and growth of a reference box, in widths and heights


@dataclass(frozen=True)
class MaskPositives:
    """The positives of one image whose predicted box is more than a cell large: the mask losses are of these.

    Args:
        index: [N] int64 locations.
        boxes: [N, 4] legacy xyxy, predicted, cells of the basis masks, not clipped, without gradient.
        instance: [N] int64, what they answer for.
        labels: [N] int64, its class.
    """

    index: Tensor
    boxes: Tensor
    instance: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, keep: Tensor) -> MaskPositives:
        """The positives that `keep` (bool or int64 index) selects."""
        return MaskPositives(self.index[keep], self.boxes[keep], self.instance[keep], self.labels[keep])

    @property
    def area(self) -> Tensor:
        """[N] of the boxes, cells, without the + 1."""
        return box_area(self.boxes)


def compute_losses(
    raw: RawOutput, targets: SipMaskTargets, config: SipMaskConfig, head: SipMaskHead | None = None
) -> dict[str, Tensor]:
    """All terms for one batch; their sum is the total.

    Args:
        raw: Dense outputs of B images, coefficients included.
        targets: What the locations answer for.
        config: Profile, weighting, normalisers.
        head: Its scoring net and tracking branch, where the config has them, are read where the losses need them.

    Returns:
        `loss_cls`, `loss_box`, `loss_centerness`, `loss_mask`, with a scoring net `loss_iou`, with a tracking branch
        `loss_match`: scalars, each connected to its outputs even where the batch has no positive.
    """
    assert raw.coefficients is not None, "training needs dense coefficients"
    assigned = targets.assigned
    positive = assigned.labels >= 0
    num_positives = positive.sum().float()
    distances, ltrb = raw.distances[positive], assigned.ltrb[positive]
    strides = assigned.strides.expand_as(positive)[positive]
    centerness = fcos.centerness_target(ltrb)
    kept = [kept_positives(raw, targets, i, config) for i in range(len(raw.logits))]
    losses = {
        "loss_cls": classification_loss(raw.logits, assigned.labels, num_positives, config),
        "loss_box": box_loss(distances, ltrb, strides, centerness, config) + zero_of(raw.distances),
        "loss_centerness": centerness_loss(raw.centerness[positive], centerness, num_positives, config)
        + zero_of(raw.centerness),
        "loss_mask": mask_loss(raw, targets, kept, config) + zero_of(raw.coefficients, raw.basis),
    }
    if config.rescore:
        assert head is not None
        assert head.scoring is not None
        losses["loss_iou"] = scoring_loss(raw, targets, kept, head.scoring, config)
    if config.is_video:
        assert head is not None
        assert head.tracking is not None
        losses["loss_match"] = match_loss(raw, targets, kept, head.tracking, config)
    return losses


def kept_positives(raw: RawOutput, targets: SipMaskTargets, i: int, config: SipMaskConfig) -> MaskPositives:
    """The positives of one image that the mask losses are of.

    Args:
        raw: Outputs of B images; locations and distances are read.
        targets: What the locations answer for.
        i: Which of the B images.
        config: Cell size of the basis masks.
    """
    index = (targets.assigned.labels[i] >= 0).nonzero().flatten()
    boxes = fcos.decode_ltrb(raw.points[index], raw.distances[i, index].detach()) / config.basis_stride
    kept = MaskPositives(index, boxes, targets.assigned.index[i, index], targets.assigned.labels[i, index])
    return kept[kept.area > 1.0]


def classification_loss(logits: Tensor, labels: Tensor, num_positives: Tensor, config: SipMaskConfig) -> Tensor:
    """Focal loss over all locations and classes; mm divides by positives + images, fc by positives, at least 1.

    Args:
        logits: [B, P, K].
        labels: [B, P] int64, class 0..K-1, -1 for background.
        num_positives: [] float32, locations of the batch that are not background.
        config: Profile, alpha and gamma.

    Returns:
        [] float32.
    """
    if config.profile == "fc":
        normaliser = reduce_mean(num_positives).clamp(min=1.0)
    else:
        normaliser = _maybe_reduce(num_positives + len(logits), config)
    total = sigmoid_focal(logits.flatten(0, 1), labels.flatten(), config.focal_alpha, config.focal_gamma)
    return total / normaliser


def box_loss(distances: Tensor, ltrb: Tensor, strides: Tensor, centerness: Tensor, config: SipMaskConfig) -> Tensor:
    """IoU loss of positives (mm and vis: -ln of the +1 IoU; fc: GIoU smoothed by 1), weighted by centerness.

    Args:
        distances: [N, 4] predicted left, top, right, bottom, pixels.
        ltrb: [N, 4] target distances, pixels.
        strides: [N] pixels; distances are compared in strides, which makes the "+1" one stride wide; vis: in pixels.
        centerness: [N] targets in [0, 1], the weights.
        config: Profile.

    Returns:
        [] float32.
    """
    unit = torch.ones_like(strides) if config.profile == "vis" else strides
    predicted, wanted = distances / unit[:, None], ltrb / unit[:, None]
    if config.profile == "fc":
        losses = giou_loss_ltrb(predicted, wanted)
        total = reduce_mean(centerness.sum())
    else:
        origin = predicted.new_zeros(len(predicted), 2)
        losses = iou_loss(fcos.decode_ltrb(origin, predicted), fcos.decode_ltrb(origin, wanted), legacy=True)
        total = _maybe_reduce(centerness.sum(), config)
    return (losses * centerness).sum() / total.clamp(min=1e-6)


def centerness_loss(logits: Tensor, target: Tensor, num_positives: Tensor, config: SipMaskConfig) -> Tensor:
    """Binary cross-entropy over positives, divided by their number.

    Args:
        logits: [N] of positives.
        target: [N] in [0, 1].
        num_positives: [] float32, N; fc averages it over processes.
        config: Profile.

    Returns:
        [] float32.
    """
    reduce = config.profile == "fc" or config.reduce_normalisers
    total = reduce_mean(num_positives) if reduce else num_positives
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / total.clamp(min=1.0)


def mask_loss(raw: RawOutput, targets: SipMaskTargets, kept: Sequence[MaskPositives], config: SipMaskConfig) -> Tensor:
    """Mask alignment weighting loss: BCE of each positive inside its *predicted* box, weighted by score x IoU.

    Args:
        raw: Outputs of B images; basis masks, coefficients and, without gradient, class logits are read.
        targets: Boxes and masks of the instances.
        kept: Of each image; one without any adds 0.
        config: Grid, weighting, profile.

    Returns:
        [] float32, the mean over the B images.
    """
    basis = F.interpolate(raw.basis, scale_factor=config.basis_upsample, mode="bilinear", align_corners=False)
    total = raw.points.new_zeros(())
    for i, of_image in enumerate(kept):
        if len(of_image) > 0:
            total = total + _image_mask_loss(raw, targets, of_image, basis[i], i, config)
    total = total / len(raw.logits)
    if config.profile == "fc":
        total = torch.where(total > 1.0, total * 0.5, total)  # a step in the released code
    return total


def scoring_loss(
    raw: RawOutput, targets: SipMaskTargets, kept: Sequence[MaskPositives], scoring: MaskScoring, config: SipMaskConfig
) -> Tensor:
    """Squared error of the predicted mask IoU, over masks that are of some use and of objects of some size.

    Args:
        raw: Outputs of B images; basis masks and coefficients are read, without gradient.
        targets: Masks of the instances.
        kept: Of each image.
        scoring: Predicts the IoUs; it alone learns.
        config: Grid and cell size.

    Returns:
        [] float32.
    """
    assert raw.coefficients is not None
    errors = [torch.stack([parameter.sum() for parameter in scoring.parameters()]) * 0]  # in the graph in any case
    for i, of_image in enumerate(kept):
        truth = masks_on_grid(targets.masks[i], config.basis_stride)
        of_image = of_image[truth.sum((1, 2), dtype=torch.int64)[of_image.instance] >= SCORED_AREA]
        with torch.no_grad():
            soft = assemble_soft(
                raw.basis[i],
                raw.coefficients[i, of_image.index],
                crop_window(of_image.boxes, (truth.shape[1], truth.shape[2])),
                boxes=of_image.boxes,
                grid=config.grid,
                upsample=config.basis_upsample,
            )
        wanted = mask_iou(soft, truth[of_image.instance], SCORED_THRESHOLD)
        counted = wanted > SCORED_IOU
        errors.append((scoring(soft[counted], of_image.labels[counted]) - wanted[counted]) ** 2)
    count, more = raw.points.new_tensor(float(sum(len(part) for part in errors[1:]))), 0.1
    if config.reduce_normalisers:
        count, more = reduce_mean(count), more / world_size()
    return SCORING_WEIGHT * torch.cat(errors).sum() / (count + more)


def match_loss(
    raw: RawOutput,
    targets: SipMaskTargets,
    kept: Sequence[MaskPositives],
    tracking: TrackingBranch,
    config: SipMaskConfig,
    jitter: Sequence[Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of which object of the reference frame each positive is; "none of them" has the logit 0.

    Args:
        raw: Tracking features of both frames.
        targets: With track ids and reference frames.
        kept: Of each image.
        tracking: Reads embeddings where boxes have their centres.
        config: Cell size of the kept boxes.
        jitter: What `jittered` draws, given for each image.

    Returns:
        [] float32, the mean over the B images of the mean over an image's positives.
    """
    assert raw.tracking is not None
    assert raw.reference_tracking is not None
    total = raw.points.new_zeros(())
    for i, (of_image, reference) in enumerate(zip(kept, targets.references, strict=True)):
        embeddings = tracking.embed(raw.tracking[i], of_image.boxes * config.basis_stride)
        boxes = jittered(reference.boxes, None if jitter is None else jitter[i])
        known = tracking.embed(raw.reference_tracking[i], boxes)
        wanted = same_object(targets.track_ids[i], reference)[of_image.instance]
        losses = F.cross_entropy(match_logits(embeddings, known), wanted, reduction="sum") / max(1, len(of_image))
        total = total + losses + zero_of(embeddings, known)
    return total / len(kept)


def jittered(boxes: Tensor, draw: Tensor | None = None) -> Tensor:
    """Boxes moved and grown by up to a twentieth of their sides, not clipped.

    Args:
        boxes: [G, 4] legacy xyxy, input pixels.
        draw: [G, 4] in [-0.05, 0.05]: shift in x and y, growth in x and y; None draws it.

    Returns:
        [G, 4] legacy xyxy, input pixels.
    """
    if draw is None:
        draw = (2 * torch.rand(boxes.shape) - 1).to(boxes) * JITTER
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + sides * draw[:, :2]
    sides = sides * (1 + draw[:, 2:])
    return torch.cat((centres - sides / 2, centres + sides / 2), 1)


def same_object(track_ids: Tensor, reference: Reference) -> Tensor:
    """[G] int64: 1 + the place of each object in the reference frame, 0 where it is not there."""
    same = track_ids[:, None] == reference.track_ids
    column = same.new_zeros(len(same), 1)
    return torch.cat((column, same), 1).int().argmax(1)  # the first of equals, so 0 where none is equal


def alignment_weights(
    logits: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor, config: SipMaskConfig
) -> tuple[Tensor, Tensor]:
    """The alpha of Sec. 3.4 and the class score in it; both carry no gradient.

    Args:
        logits: [N, K] class logits of the positives of one image.
        labels: [N] int64 class of the answered instance.
        boxes: [N, 4] predicted boxes, legacy, at mask resolution.
        gt_boxes: [N, 4] answered boxes, the same frame.
        config: `weighting` says which factors enter, "none" gives ones; `normalize_weighting` makes their mean 1.

    Returns:
        alpha [N] and score [N], float32.
    """
    score = logits.detach().gather(1, labels[:, None]).squeeze(1).float().sigmoid()
    overlap = paired_iou(boxes, gt_boxes, legacy=True)
    alpha = torch.ones_like(score)
    if config.weighting in ("cls", "cls_loc"):
        alpha = alpha * score
    if config.weighting in ("loc", "cls_loc"):
        alpha = alpha * overlap
    if config.normalize_weighting:
        alpha = alpha / (alpha.sum() + (0.0 if config.profile == "fc" else 1e-4)) * len(alpha)
    return alpha, score


def _image_mask_loss(
    raw: RawOutput, targets: SipMaskTargets, kept: MaskPositives, basis: Tensor, i: int, config: SipMaskConfig
) -> Tensor:
    assert raw.coefficients is not None
    stride = config.basis_stride
    alpha, score = alignment_weights(
        raw.logits[i, kept.index],
        kept.labels,
        kept.boxes,
        targets.boxes[i][kept.instance] / stride,
        config,
    )
    if config.profile == "fc":
        apart = greedy_nms(kept.boxes, score, None, 0.9, legacy=True)
        kept, alpha = kept[apart], alpha[apart]
    sums = window_mask_loss(
        basis,
        raw.coefficients[i, kept.index],
        kept.boxes,
        masks_on_grid(targets.masks[i], stride),
        kept.instance,
        grid=config.grid,
    )
    return (alpha * sums / kept.area).sum() / len(kept)


def _maybe_reduce(value: Tensor, config: SipMaskConfig) -> Tensor:
    return reduce_mean(value) if config.reduce_normalisers else value
