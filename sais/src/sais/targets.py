"""Which ground truth each location answers for: the centre-aware rule (Sec. III-B, Eq. 2 to 4) and FCOS' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from onestage.nn import fcos
from onestage.ops.mask_loss import masks_on_grid
from onestage.structures import Target
from sais.config import SAISConfig
from sais.decode import PROTOTYPE_STRIDE

if TYPE_CHECKING:
    from sais.model import RawOutput


@dataclass(frozen=True)
class SAISTargets:
    """Training targets of B images.

    Args:
        locations: Class, instance and distances of each of the P locations.
        boxes: B tensors [G, 4] xyxy, input pixels.
        masks: B tensors [G, H / 4, W / 4] uint8 on the prototype grid; none of a detector without masks.
    """

    locations: fcos.Assignment
    boxes: list[Tensor]
    masks: list[Tensor]


def assign_targets(targets: list[Target], raw: RawOutput, config: SAISConfig) -> SAISTargets:
    """Gives every location the one instance it answers for, if any, and every instance its mask target.

    Args:
        targets: B targets in input pixels, usable instances only.
        raw: Its locations and level sizes are read.
        config: Which of the two rules decides, and whether there are masks.
    """
    choose = largest_centerness if config.center_aware else fcos.smallest_area
    return SAISTargets(
        fcos.assign_batch(raw.points, raw.sizes, targets, radius=None, choose=choose),
        [target.boxes for target in targets],
        [masks_on_grid(target.masks, PROTOTYPE_STRIDE) for target in targets] if config.masks else [],
    )


def largest_centerness(candidates: Tensor, ltrb: Tensor, area: Tensor) -> Tensor:
    """Of each location's candidates the one it is most central in, of equals the smallest, then the first (Eq. 4).

    Args:
        candidates: [P, G] bool, the location is inside the box and in its level's range.
        ltrb: [P, G, 4] distances to the sides, any unit; negative outside.
        area: [G] of the boxes.

    Returns:
        [P] int64 in 0..G-1; meaningless where there is no candidate.
    """
    # Outside in both directions the ratios' product is positive again: candidates first.
    centerness = fcos.centerness_target(ltrb).where(candidates, -1.0)  # Eq. 3
    most = candidates & (centerness == centerness.amax(dim=1, keepdim=True))
    return fcos.smallest_area(most, ltrb, area)  # Eq. 2's order decides ties alone
