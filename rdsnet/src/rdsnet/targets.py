"""Which ground truth each anchor answers for: RetinaNet's rule with a forced match for every instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage.nn.retinanet import STRIDES, Assignment, match_batch
from onestage.ops.mask_loss import masks_on_grid
from onestage.structures import ImageFrame, Target
from rdsnet.config import RDSNetConfig
from rdsnet.decode import PIXEL_STRIDE, own_padded_size

if TYPE_CHECKING:
    from rdsnet.model import RawOutput


@dataclass(frozen=True)
class RDSNetTargets:
    """Training targets of B images.

    Args:
        anchors: What the anchors answer for.
        boxes: B tensors [G, 4] inclusive xyxy, input pixels.
        masks: B tensors [G, h, w] uint8 on the pixel vectors' grid, cut to the image's own padded size.
        trains_mask: B tensors [G] bool, the instance is large enough for the mask loss.
    """

    anchors: Assignment
    boxes: list[Tensor]
    masks: list[Tensor]
    trains_mask: list[Tensor]


def assign_targets(
    targets: list[Target], frames: list[ImageFrame], raw: RawOutput, config: RDSNetConfig
) -> RDSNetTargets:
    """Gives every anchor the instance it answers for, if any, and every instance its mask target.

    Args:
        targets: B targets in input pixels, inclusive boxes, usable instances only.
        frames: How each image became input; anchors beyond its own padding take no part.
        raw: Its anchors and level sizes are read.
        config: Whose smallest mask area counts.
    """
    own = [own_padded_size(frame, config) for frame in frames]
    valid = [anchors_in(size, raw.sizes, raw.anchors) for size in own]
    assigned = match_batch(raw.anchors, targets, valid=valid, force_match=True, legacy=True)
    return RDSNetTargets(
        assigned,
        [target.boxes for target in targets],
        [
            masks_on_grid(target.masks[:, :height, :width], PIXEL_STRIDE)
            for target, (height, width) in zip(targets, own, strict=True)
        ],
        [target.masks.flatten(1).sum(1) > config.min_mask_area for target in targets],
    )


def anchors_in(image_size: tuple[int, int], sizes: list[tuple[int, int]], anchors: Tensor) -> Tensor:
    """Which anchors belong to cells of an image, not of the padding beyond it.

    Args:
        image_size: (height, width) of the image, input pixels.
        sizes: (h, w) of each level, in cells.
        anchors: [A, 4] of all levels, as many for each cell.

    Returns:
        [A] bool.
    """
    cells = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        rows = torch.arange(height, device=anchors.device) < -(-image_size[0] // stride)
        columns = torch.arange(width, device=anchors.device) < -(-image_size[1] // stride)
        cells.append((rows[:, None] & columns).flatten())
    every = torch.cat(cells)
    return every.repeat_interleave(len(anchors) // len(every))


def mask_instances(targets: RDSNetTargets, image: int, config: RDSNetConfig) -> Tensor:
    """[n] int64: the anchors of image number `image` that train masks, see `drawn`."""
    index = targets.anchors.index[image]
    positive = (index >= 0).nonzero().flatten()
    return drawn(positive[targets.trains_mask[image][index[positive]]], config)


def drawn(anchors: Tensor, config: RDSNetConfig) -> Tensor:
    """`config.masks_per_image` of one image's anchors [n] int64, at random; all of them if there are no more."""
    if len(anchors) <= config.masks_per_image:
        return anchors
    return anchors[torch.randperm(len(anchors), device=anchors.device)[: config.masks_per_image]]
