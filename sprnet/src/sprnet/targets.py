"""Which anchors and pixels answer for which instance (Sec. 3.2), and the masks that pixels learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage.nn import retinanet
from onestage.ops.paste import cut_mask
from onestage.structures import ImageFrame, Target
from sprnet.config import SPRNetConfig

if TYPE_CHECKING:
    from sprnet.model import RawOutput

ANCHORS_PER_PIXEL = len(retinanet.RATIOS) * len(retinanet.SCALES)
MASK_SIZE = 32  # side of the map a pixel is decoded to


@dataclass(frozen=True)
class SPRNetTargets:
    """Training targets of B images.

    Args:
        assignment: What the anchors answer for.
        boxes: B tensors [G, 4] xyxy, input pixels.
        pixels: B tensors [n] int64, the positive pixels of an image, into the locations of all levels; n sums up to N.
        labels: [N] int64, their instances' classes, image by image.
        masks: [N, 32, 32] uint8, their instances in the grid of the ground-truth box.
    """

    assignment: retinanet.Assignment
    boxes: list[Tensor]
    pixels: list[Tensor]
    labels: Tensor
    masks: Tensor


def assign_targets(
    targets: Sequence[Target], raw: RawOutput, frames: Sequence[ImageFrame], config: SPRNetConfig
) -> SPRNetTargets:
    """Matches anchors and picks the positive pixels.

    Args:
        targets: B targets in input pixels, no crowds; boxes that have become smaller than a pixel are left out.
        raw: Its anchors are read.
        frames: Give the sizes without padding; anchors centred beyond are ignored.
        config: Thresholds.
    """
    targets = [target[(target.boxes[:, 2:] - target.boxes[:, :2]).amin(1) >= 1] for target in targets]
    matches = [
        retinanet.match(
            raw.anchors, target.boxes, force_match=config.force_match, valid=inside(raw.anchors, frame.input_size)
        )
        for target, frame in zip(targets, frames, strict=True)
    ]
    picked = [_pick(matched, target, config) for matched, target in zip(matches, targets, strict=True)]
    pixels, labels, masks = ([part[i] for part in picked] for i in range(3))
    return SPRNetTargets(
        retinanet.assignment_of(matches, targets),
        [target.boxes for target in targets],
        pixels,
        torch.cat(labels),
        torch.cat(masks),
    )


def inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """[A] bool: anchors [A, 4] whose centres lie in the unpadded input of `size` (height, width)."""
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
    return (x < size[1]) & (y < size[0])


def positive_pixels(iou: Tensor, pixel: Tensor, *, threshold: float, limit: int, dedupe: bool = True) -> Tensor:
    """The anchors that speak for the positive pixels: the best of each pixel, best pixels first.

    Args:
        iou: [A] of each anchor with its best instance.
        pixel: [A] int64, the pixel each anchor belongs to; any numbering.
        threshold: A positive anchor has a larger IoU.
        limit: How many are kept.
        dedupe: False keeps all positive anchors of a pixel, also for different instances.

    Returns:
        [n] int64 into the anchors, IoU descending; of equals the lower index comes first, or is the one.
    """
    positive = (iou > threshold).nonzero().flatten()
    positive = positive[iou[positive].sort(descending=True, stable=True).indices]
    if dedupe:
        pixels, which = pixel[positive].unique(return_inverse=True)
        rank = torch.arange(len(positive), device=iou.device)
        first = rank.new_full((len(pixels),), len(positive)).scatter_reduce(0, which, rank, "amin")
        positive = positive[first.sort().values]
    return positive[:limit]


def _pick(matched: retinanet.Matches, target: Target, config: SPRNetConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Positive pixels [n] of one image, their labels [n] and masks [n, 32, 32]; n = 0 without a mask head."""
    pixel = torch.arange(len(matched.iou), device=matched.iou.device) // ANCHORS_PER_PIXEL
    chosen = positive_pixels(
        matched.iou,
        pixel,
        threshold=config.mask_iou,
        limit=config.masks_per_image if config.masks else 0,
        dedupe=config.pixel_dedupe,
    )
    # Pixels of one instance have exactly the same target: it is cut once.
    instances, owner = matched.best[chosen].unique(return_inverse=True)
    masks = [cut_mask(target.masks[i], target.boxes[i], MASK_SIZE) for i in instances.tolist()]
    grid = torch.stack(masks) if masks else target.masks.new_zeros(0, MASK_SIZE, MASK_SIZE)
    return pixel[chosen], target.labels[instances][owner], grid[owner]
