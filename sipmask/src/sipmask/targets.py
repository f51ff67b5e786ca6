"""Which ground truth each location answers for (FCOS with centre sampling)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from onestage.nn import fcos
from onestage.structures import Reference, Target
from sipmask.config import SipMaskConfig

if TYPE_CHECKING:
    from sipmask.model import RawOutput


@dataclass(frozen=True)
class SipMaskTargets:
    """Training targets of B images. Boxes are legacy (inclusive) input pixels.

    Args:
        assigned: What each location answers for.
        boxes: B tensors [G, 4].
        masks: B tensors [G, H, W] uint8 on the padded input canvas.
        track_ids: B tensors [G] int64, of pairs of frames; else empty.
        references: B reference frames, boxes legacy input pixels; of pairs of frames, else empty.
    """

    assigned: fcos.Assignment
    boxes: list[Tensor]
    masks: list[Tensor]
    track_ids: list[Tensor] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)


def assign_targets(targets: list[Target], raw: RawOutput, config: SipMaskConfig) -> SipMaskTargets:
    """Gives every location the smallest instance it may answer for.

    Args:
        targets: B targets in input pixels, boxes legacy.
        raw: Its locations and level sizes are read.
        config: `center_radius`.
    """
    return SipMaskTargets(
        fcos.assign_batch(raw.points, raw.sizes, targets, radius=config.center_radius, legacy=True),
        [target.boxes for target in targets],
        [target.masks for target in targets],
        [target.track_ids for target in targets if target.track_ids is not None],
        [target.reference for target in targets if target.reference is not None],
    )
