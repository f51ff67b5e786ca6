"""Which ground truth each location answers for (FCOS with centre sampling; spec section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage.nn import fcos
from onestage.structures import Target
from sipmask.config import SipMaskConfig

if TYPE_CHECKING:
    from sipmask.model import RawOutput


@dataclass(frozen=True)
class SipMaskTargets:
    """Training targets of B images over P locations. Boxes are legacy (inclusive) input pixels.

    Args:
        labels: [B, P] int64, class 0..K-1, or -1 for background.
        index: [B, P] int64, position of the answered instance in its image's `boxes`, or -1.
        ltrb: [B, P, 4] float32, distances from location to the instance's sides, pixels; 0 where background.
        strides: [P] float32, pixels per cell of each location's level.
        boxes: B tensors [G, 4].
        masks: B tensors [G, H, W] uint8 on the padded input canvas.
        gt_labels: B tensors [G] int64.
    """

    labels: Tensor
    index: Tensor
    ltrb: Tensor
    strides: Tensor
    boxes: list[Tensor]
    masks: list[Tensor]
    gt_labels: list[Tensor]


def usable(target: Target) -> Target:
    """Drops crowds and boxes under one pixel, as the recipes do. Boxes exclusive, image pixels."""
    width = target.boxes[:, 2] - target.boxes[:, 0]
    height = target.boxes[:, 3] - target.boxes[:, 1]
    return target[(width >= 1) & (height >= 1) & ~target.iscrowd]


def assign_targets(targets: list[Target], raw: RawOutput, config: SipMaskConfig) -> SipMaskTargets:
    """Gives every location the smallest instance it may answer for.

    Args:
        targets: B targets in input pixels, boxes legacy.
        raw: Its locations and level sizes are read.
        config: `center_radius`.
    """
    strides = fcos.per_location(raw.sizes, fcos.STRIDES, raw.points.device)
    ranges = fcos.per_location(raw.sizes, fcos.LEVEL_RANGES, raw.points.device)
    labels, index, ltrb = [], [], []
    for target in targets:
        matched, distances = fcos.assign(
            raw.points, strides, ranges, target.boxes, radius=config.center_radius, legacy=True
        )
        if len(target):
            found = torch.where(matched >= 0, target.labels[matched.clamp(min=0)], -1)
        else:
            found = matched  # all background
        labels.append(found)
        index.append(matched)
        ltrb.append(distances)
    return SipMaskTargets(
        torch.stack(labels),
        torch.stack(index),
        torch.stack(ltrb),
        strides,
        [target.boxes for target in targets],
        [target.masks for target in targets],
        [target.labels for target in targets],
    )
