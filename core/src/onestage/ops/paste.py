"""Paste square soft masks into boxes of an image: bilinear, and so separable, with zeros around the map.

Their training targets are cut out of bitmaps the other way. MEInst and SPRNet, after Mask R-CNN. N: masks of M x M
values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import ops

from onestage.masks import Masks
from onestage.ops.dispatch import wants_triton
from onestage.ops.packed import pack_windows, word_capacity
from onestage.structures import Detections


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Masks:
    """Binary masks of N boxes, `>= threshold` at pixel centres.

    Args:
        probabilities: [N, M, M] in [0, 1], the map that fills each box.
        boxes: [N, 4] xyxy, image pixels, real-valued; may leave the image. A box without area has an empty mask.
        size: (height, width) of the image.
        threshold: Probability, above 0.

    Returns:
        N masks of the image's size.
    """

    def make(some: slice) -> Masks:
        return Masks(size, *_paste_op(probabilities[some], boxes[some], list(size), threshold))

    if torch.compiler.is_compiling():
        return make(slice(None))
    if wants_triton(boxes):
        return Masks.in_parts(make, len(boxes), boxes.device)
    with torch.autocast(boxes.device.type, enabled=False):
        return paste_masks_torch(probabilities, boxes, size, threshold)


@torch.library.custom_op("onestage::paste_masks", mutates_args=())
def _paste_op(probabilities: Tensor, boxes: Tensor, size: list[int], threshold: float) -> tuple[Tensor, Tensor]:
    """Windows [N, 4] and words of the masks, with room for N whole images: what `Masks` is made of."""
    whole = (size[0], size[1])
    if wants_triton(boxes):
        from onestage.ops.triton.paste import paste_masks_triton

        return paste_masks_triton(probabilities, boxes, whole, threshold)
    with torch.autocast(boxes.device.type, enabled=False):
        masks = paste_masks_torch(probabilities, boxes, whole, threshold)
    return masks.windows, pack_windows(masks.windows, masks.pixels, word_capacity(len(masks), whole))


@_paste_op.register_fake
def _(probabilities: Tensor, boxes: Tensor, size: list[int], threshold: float) -> tuple[Tensor, Tensor]:
    words = boxes.new_empty(word_capacity(boxes.shape[0], (size[0], size[1])), dtype=torch.int32)
    return boxes.new_empty(boxes.shape[0], 4, dtype=torch.int64), words


@torch.no_grad()
def paste_masks_torch(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Masks:
    """Plain-torch twin: defines the result, runs anywhere."""
    side = probabilities.shape[-1]
    x0, x1, x_weights = _hat_weights(boxes[:, 0], boxes[:, 2], size[1], side)
    y0, y1, y_weights = _hat_weights(boxes[:, 1], boxes[:, 3], size[0], side)
    areas = (x1 - x0) * (y1 - y0)
    pixels = torch.empty(int(areas.sum()), dtype=torch.bool, device=boxes.device)
    for values, along_x, along_y, mask in zip(
        probabilities.float(), x_weights, y_weights, pixels.split(areas.tolist()), strict=True
    ):
        pasted = (along_x @ values.T) @ along_y.T  # [X, Y]
        if mask.device.type == "cpu":
            # numpy compares eight times as fast as torch here.
            np.greater_equal(pasted.numpy(), np.float32(threshold), out=mask.view(pasted.shape).numpy())
        else:
            torch.ge(pasted, threshold, out=mask.view(pasted.shape))
    return Masks(size, torch.stack((x0, y0, x1, y1), 1), pixels)


def with_masks(
    found: Detections, maps: Tensor, form: Literal["binary", "soft", "lowres"], threshold: float
) -> Detections:
    """Detections with their masks in the form that is asked for.

    Args:
        found: N detections.
        maps: [N, M, M] in [0, 1], the map that fills each box.
        form: `binary` fills `masks`; `soft` and `lowres` fill `soft_masks`, at image size or M x M.
        threshold: Of binary masks.
    """
    if form == "binary":
        return replace(found, masks=paste_masks(maps, found.boxes, found.image_size, threshold))
    return replace(found, soft_masks=maps if form == "lowres" else paste_soft(maps, found.boxes, found.image_size))


@torch.no_grad()
def paste_soft(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The values that `paste_masks` compares, dense: [N, height, width] float32. Arguments as there."""
    if wants_triton(boxes) or torch.compiler.is_compiling():
        return _soft_op(probabilities, boxes, list(size))
    with torch.autocast(boxes.device.type, enabled=False):
        return paste_soft_torch(probabilities, boxes, size)


@torch.library.custom_op("onestage::paste_soft", mutates_args=())
def _soft_op(probabilities: Tensor, boxes: Tensor, size: list[int]) -> Tensor:
    if wants_triton(boxes):
        from onestage.ops.triton.paste import paste_soft_triton

        return paste_soft_triton(probabilities, boxes, (size[0], size[1]))
    with torch.autocast(boxes.device.type, enabled=False):
        return paste_soft_torch(probabilities, boxes, (size[0], size[1]))


@_soft_op.register_fake
def _(probabilities: Tensor, boxes: Tensor, size: list[int]) -> Tensor:
    return boxes.new_empty(boxes.shape[0], *size, dtype=torch.float32)


@torch.no_grad()
def paste_soft_torch(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Plain-torch twin of `paste_soft`: defines the result, runs anywhere."""
    side = probabilities.shape[-1]
    x0, x1, x_weights = _hat_weights(boxes[:, 0], boxes[:, 2], size[1], side)
    y0, y1, y_weights = _hat_weights(boxes[:, 1], boxes[:, 3], size[0], side)
    pasted = torch.zeros(len(boxes), *size, device=boxes.device)
    windows = torch.stack((x0, y0, x1, y1), 1).tolist()
    for canvas, values, along_x, along_y, (left, top, right, bottom) in zip(
        pasted, probabilities.float(), x_weights, y_weights, windows, strict=True
    ):
        canvas[top:bottom, left:right] = along_y @ values @ along_x.T
    return pasted


def cut_mask(bitmap: Tensor, box: Tensor, size: int) -> Tensor:
    """A mask in the grid of its box: [size, size] uint8, RoIAlign of the bitmap, one half or more.

    Args:
        bitmap: [H, W] of 0 and 1.
        box: [4] float32 xyxy, same frame, not rounded.
        size: M.
    """
    # Only the window around the box becomes float; its margin keeps RoIAlign from meeting a border of our making.
    x1, y1, x2, y2 = box.tolist()
    left, top = max(0, math.floor(x1) - 2), max(0, math.floor(y1) - 2)
    window = bitmap[top : math.ceil(y2) + 2, left : math.ceil(x2) + 2].float()
    corner = box.new_tensor([left, top, left, top])
    roi = torch.cat((box.new_zeros(1), box - corner))[None]
    return (ops.roi_align(window[None, None], roi, size, sampling_ratio=0, aligned=True)[0, 0] >= 0.5).byte()


def _hat_weights(low: Tensor, high: Tensor, extent: int, side: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Along one axis: the pixels that a map reaches, and how much of each of its M values each pixel takes.

    Args:
        low, high: [N] ends of the boxes, pixels.
        extent: Pixels of the image.
        side: M.

    Returns:
        First pixel [N] and one past the last [N], int64, and for each box [pixels, M] float32.
    """
    low, high = low.float(), high.float()
    length = high - low
    # Half a cell beyond the box still interpolates between the outermost value and the zeros around.
    margin = length / side / 2
    start = (low - margin - 0.5).ceil().clamp(0, extent).long()
    stop = (high + margin - 0.5).floor().add(1).clamp(0, extent).long()
    stop = torch.where(length > 0, torch.maximum(stop, start), start)
    lengths = stop - start
    owner = torch.repeat_interleave(lengths)
    position = torch.arange(len(owner), device=low.device) + (start - lengths.cumsum(0) + lengths)[owner]
    # Coordinates as `grid_sample(align_corners=False)` has them.
    grid = (position + 0.5 - low[owner]) / length[owner] * 2 - 1
    cells = ((grid + 1) * side - 1) / 2
    weights = 1 - (cells[:, None] - torch.arange(side, device=low.device)).abs()
    return start, stop, weights.clamp(min=0).split(lengths.tolist())
