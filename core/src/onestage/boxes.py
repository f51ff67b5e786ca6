"""Arithmetic on boxes.

Boxes are xyxy, the last axis of a float tensor, in any frame. They are *exclusive* (width = x2 - x1) unless `legacy`
is set: then x2 and y2 are the last pixel inside and width = x2 - x1 + 1. Released weights of several papers were
trained in legacy geometry, and a box loss or NMS in the other geometry changes their results. No constant is copied to
a GPU, for the host would wait for it.
"""

import torch
from torch import Tensor


def to_legacy(boxes: Tensor) -> Tensor:
    """Exclusive boxes [..., 4] as legacy ones in the same frame: x2 and y2 become the last pixel inside."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] - 1.0), -1)


def from_legacy(boxes: Tensor) -> Tensor:
    """Legacy boxes [..., 4] as exclusive ones in the same frame."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] + 1.0), -1)


def scale(boxes: Tensor, factors: tuple[float, float]) -> Tensor:
    """Moves boxes into a frame of another resolution.

    Args:
        boxes: [..., 4] xyxy, any frame.
        factors: (vertical, horizontal), target pixels per source pixel: `ImageFrame.scale` leads from image to input.
    """
    vertical, horizontal = factors
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1 * horizontal, y1 * vertical, x2 * horizontal, y2 * vertical), dim=-1)


def clip(boxes: Tensor, size: tuple[int, int], legacy: bool = False) -> Tensor:
    """Boxes cut to an image.

    Args:
        boxes: [..., 4] xyxy, pixels of the image.
        size: (height, width) of the image.
        legacy: Coordinates end at the last pixel (width - 1) instead of at the border (width).
    """
    height, width = size
    last = 1 if legacy else 0
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        (
            x1.clamp(0, width - last),
            y1.clamp(0, height - last),
            x2.clamp(0, width - last),
            y2.clamp(0, height - last),
        ),
        dim=-1,
    )


def area(boxes: Tensor, legacy: bool = False) -> Tensor:
    """Width times height: [..., 4] to [...]. Boxes with x2 < x1 count with their sign; nothing is clamped."""
    width, height = (boxes[..., 2:] - boxes[..., :2] + (1.0 if legacy else 0.0)).unbind(-1)
    return width * height


def iou_matrix(a: Tensor, b: Tensor, legacy: bool = False) -> Tensor:
    """IoU of every box of one set with every box of another.

    Args:
        a: [N, 4] xyxy.
        b: [M, 4] xyxy, same frame.
        legacy: Widths are x2 - x1 + 1, in the intersection too.

    Returns:
        [N, M] in [0, 1], 0 where the union is empty.
    """
    return paired_iou(a[:, None], b[None], legacy)


def paired_iou(a: Tensor, b: Tensor, legacy: bool = False) -> Tensor:
    """IoU of boxes taken pairwise, differentiable in both.

    Args:
        a: [..., 4] xyxy.
        b: [..., 4] xyxy, same frame; leading axes broadcast.
        legacy: Widths are x2 - x1 + 1, in the intersection too.

    Returns:
        [...] float32 (float64 for float64 boxes) in [0, 1], 0 where the union is empty.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    corner = torch.minimum(a[..., 2:], b[..., 2:])
    sides = (corner - torch.maximum(a[..., :2], b[..., :2]) + (1.0 if legacy else 0.0)).clamp(min=0)
    inter = sides[..., 0] * sides[..., 1]
    union = area(a, legacy) + area(b, legacy) - inter
    return inter / union.clamp(min=1e-9)  # not larger: relative boxes of one pixel have areas near 1e-6
