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
    valid = [in_image(raw.sizes, size, raw.anchors) for size in own]
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


def in_image(sizes: list[tuple[int, int]], image_size: tuple[int, int], anchors: Tensor) -> Tensor:
    """[A] bool, true for the anchors of cells inside an image of (height, width) input pixels."""
    cells = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        rows = torch.arange(height, device=anchors.device) < -(-image_size[0] // stride)
        columns = torch.arange(width, device=anchors.device) < -(-image_size[1] // stride)
        cells.append((rows[:, None] & columns).flatten())
    inside = torch.cat(cells)
    return inside.repeat_interleave(len(anchors) // len(inside))


def mask_instances(targets: RDSNetTargets, image: int, config: RDSNetConfig) -> Tensor:
    """[n] int64: the anchors of one image that train masks, drawn if there are more than `config.masks_per_image`."""
    index = targets.anchors.index[image]
    positive = (index >= 0).nonzero().flatten()
    large = positive[targets.trains_mask[image][index[positive]]]
    if len(large) <= config.masks_per_image:
        return large
    return large[torch.randperm(len(large), device=large.device)[: config.masks_per_image]]
