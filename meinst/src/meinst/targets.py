"""Which ground truth each location answers for, and its mask in the grid of its box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from meinst.config import MEInstConfig
from onestage.nn import fcos
from onestage.ops.paste import cut_mask
from onestage.structures import Target

if TYPE_CHECKING:
    from meinst.model import RawOutput

Polygons = Sequence[Sequence[float]]


@dataclass(frozen=True)
class MEInstTargets:
    """Training targets of B images over P locations.

    Args:
        assignment: Class, instance and distances of every location.
        masks: [positives, m, m] uint8, the answered instance in the grid of its box; image by image, by location.
            [0, m, m] without a mask branch.
    """

    assignment: fcos.Assignment
    masks: Tensor


def assign_targets(targets: Sequence[Target], raw: RawOutput, config: MEInstConfig) -> MEInstTargets:
    """Gives every location the smallest instance it may answer for.

    Args:
        targets: B targets in input pixels.
        raw: Its locations and level sizes are read.
        config: Centre sampling, ranges, mask size.
    """
    assignment = fcos.assign_batch(
        raw.points, raw.sizes, targets, ranges=config.level_ranges, radius=config.center_radius
    )
    masks = [raw.points.new_zeros(0, config.mask_size, config.mask_size, dtype=torch.uint8)]
    if config.mask_branch:
        for target, index in zip(targets, assignment.index, strict=True):
            # Each instance once, however many locations answer for it.
            instances, position = index[index >= 0].unique(return_inverse=True)
            masks.append(box_masks(target[instances], config.mask_size)[position])
    return MEInstTargets(assignment, torch.cat(masks))


def box_masks(target: Target, size: int) -> Tensor:
    """Masks of instances in the grids of their boxes: [G, size, size] uint8, on the target's device.

    From polygons where the target has them, as the released models were trained, else from its bitmaps.

    Args:
        target: G instances in any frame.
        size: m.
    """
    polygons = target.polygons or (None,) * len(target)
    boxes = target.boxes.cpu().numpy()
    masks = [
        cut_mask(bitmap, box, size)
        if parts is None
        else torch.from_numpy(polygon_mask(parts, corners, size)).to(box.device)
        for parts, bitmap, box, corners in zip(polygons, target.masks, target.boxes, boxes, strict=True)
    ]
    return torch.stack(masks) if masks else target.masks.new_zeros(0, size, size)


def polygon_mask(polygons: Polygons, box: np.ndarray, size: int) -> np.ndarray:
    """[size, size] uint8: polygons moved into a box's grid, filled by COCO's rules, joined. No rounding of the box.

    Args:
        polygons: Flat x, y lists of one instance, pixels.
        box: [4] float32 xyxy, same frame.
        size: m.
    """
    corner = box[[0, 1]]
    factor = size / np.maximum(box[[2, 3]] - corner, np.float32(0.1))
    points = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    moved = [((part - corner) * factor).ravel().tolist() for part in points]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, size, size)))
