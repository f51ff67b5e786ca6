"""What the box head says about an anchor: RetinaNet's code, or the corner offsets of keras-retinanet."""

from __future__ import annotations

import torch
from torch import Tensor

from onestage.nn import retinanet
from sprnet.config import SPRNetConfig

CORNER_DEVIATION = 0.2  # of corner offsets, in anchor sides; codes are divided by it


def encode(anchors: Tensor, boxes: Tensor, config: SPRNetConfig) -> Tensor:
    """Codes [..., 4] that turn anchors [..., 4] into boxes [..., 4], both xyxy of one frame."""
    if config.box_coder == "retina":
        return retinanet.encode(anchors, boxes)
    return (boxes - anchors) / (_sides(anchors) * CORNER_DEVIATION)


def decode(anchors: Tensor, codes: Tensor, config: SPRNetConfig) -> Tensor:
    """The inverse of `encode`: [..., 4] xyxy, not clipped."""
    if config.box_coder == "retina":
        return retinanet.decode(anchors, codes)
    return anchors + codes * _sides(anchors) * CORNER_DEVIATION


def _sides(anchors: Tensor) -> Tensor:
    """[..., 4] width, height, width, height."""
    sides = anchors[..., 2:] - anchors[..., :2]
    return torch.cat((sides, sides), dim=-1)
