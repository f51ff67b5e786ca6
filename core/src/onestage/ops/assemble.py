"""Instance masks from a linear combination of basis maps: combine, crop, resize, threshold.

Grids: *basis* [h, w]; *assembly* = basis x `upsample` (bilinear, half-pixel); *image*. Axes are independent in all of
it, so each axis gets a plan (which rows of which grid, which weights) and a detection never leaves its window.
Upsampling is linear, so the dot product comes first, on the basis grid, and one map is upsampled instead of D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.masks import Masks
from onestage.ops.dispatch import wants_triton
from onestage.ops.packed import pack_windows, word_capacity

Size = tuple[int, int]

CHUNK = 1 << 17  # values of an image window resized at a time; half a megabyte stays in the cache
CROP_RULES = ("half_open", "margin", "expand")  # which cells of a grid belong to a box


def crop_window(
    boxes: Tensor,
    extent: Size,
    rule: Literal["half_open", "margin", "expand"] = "half_open",
    *,
    padding: float = 0.0,
) -> Tensor:
    """Pixels of a grid that belong to each box.

    Args:
        boxes: [N, 4] xyxy, real-valued, cells of the grid.
        extent: (height, width) of the grid.
        rule: "half_open" keeps x1 <= j < x2 and nothing of a box with x2 <= x1; "margin" keeps x1 - 1 <= j < x2 + 1;
            "expand" moves each side out by max(1, padding x (side + 1)), clamps, truncates towards zero and keeps
            the upper end exclusive; with padding 0 it only truncates. The last two put the ends in order first.
        padding: Fraction of the side that "expand" adds at each end.

    Returns:
        [N, 4] int64 x0, y0, x1, y1, half-open, inside the grid; empty windows have x0 == x1 or y0 == y1.
    """
    if rule not in CROP_RULES:
        raise ValueError(f"unknown crop rule '{rule}'")
    # Operations on 4 N numbers cost their launches only: compilers fuse them, and a kernel is one launch.
    if boxes.dtype == torch.float32 and not torch.compiler.is_compiling() and wants_triton(boxes):
        return _crop_op(boxes, list(extent), rule, padding)
    return crop_window_torch(boxes, extent, rule, padding)


@torch.library.custom_op("onestage::crop_window", mutates_args=())
def _crop_op(boxes: Tensor, extent: list[int], rule: str, padding: float) -> Tensor:
    if wants_triton(boxes):
        from onestage.ops.triton.assemble import crop_window_triton

        return crop_window_triton(boxes, (extent[0], extent[1]), rule, padding)
    return crop_window_torch(boxes, (extent[0], extent[1]), rule, padding)


@_crop_op.register_fake
def _(boxes: Tensor, extent: list[int], rule: str, padding: float) -> Tensor:
    return boxes.new_empty(boxes.shape[0], 4, dtype=torch.int64)


def crop_window_torch(boxes: Tensor, extent: Size, rule: str, padding: float) -> Tensor:
    """Plain-torch twin of `crop_window`: defines the result, runs anywhere."""
    height, width = extent
    limit = torch.cat((boxes.new_full((1,), width), boxes.new_full((1,), height)))  # no copy from the host
    low, high = boxes[:, :2], boxes[:, 2:]
    if rule != "half_open":
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    if rule == "half_open":
        start, stop = low.ceil(), high.ceil()
    elif rule == "margin":
        start, stop = (low - 1).ceil(), (high + 1).ceil()
    else:
        if padding > 0:
            pad = (padding * (high - low + 1)).clamp(min=1.0)
            low, high = low - pad, high + pad
        start, stop = low.trunc(), high.trunc()
    start = torch.minimum(start.clamp(min=0.0), limit)
    stop = torch.maximum(torch.minimum(stop, limit), start)
    return torch.cat((start, stop), 1).long()


def assemble_masks(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    *,
    boxes: Tensor | None = None,
    grid: Size = (1, 1),
    upsample: int = 1,
    order: Literal["prob", "logits"] = "prob",
    threshold: float = 0.5,
    valid_size: Size | None = None,
    resized_size: Size | None = None,
    output_size: Size,
    align_corners: bool = False,
) -> Masks:
    """Binary masks of N detections.

    Order "prob": logits on the assembly grid, sigmoid, zero outside `windows`, bilinear resize, `> threshold`.
    Order "logits": logits on the assembly grid, bilinear resize, zero outside `windows`, sigmoid, `> threshold`.

    Args:
        basis: [D, h, w] basis maps of one image, any strides.
        coefficients: [N, rows * columns * D]; the D numbers of sub-region (row, column) start at
            (row * columns + column) * D.
        windows: [N, 4] int64 x0, y0, x1, y1, half-open: cells of the assembly grid in order "prob", image pixels in
            order "logits".
        boxes: [N, 4] xyxy, cells of the assembly grid; needed for sub-regions, whose borders lie at
            x1 + k * (x2 - x1 + 0.1) / columns, and alike in y.
        grid: (rows, columns) of sub-regions; only (1, 1) in order "logits".
        upsample: Assembly cells per basis cell and axis.
        order: Whether cropping and sigmoid come before the resize or after.
        threshold: Probability above which a pixel is in the mask.
        valid_size: (height, width) of the assembly grid without padding; cells beyond are cut off before the resize.
        resized_size: (height, width) to which the assembly grid is resized, `output_size` if None.
        output_size: (height, width) of the masks: the overlap with the resized canvas, zeros elsewhere.
        align_corners: Of the resize to `resized_size`; the upsampling never aligns corners.

    Returns:
        N masks of `output_size`.
    """
    how: dict[str, Any] = {
        "grid": grid,
        "upsample": upsample,
        "order": order,
        "threshold": threshold,
        "valid_size": valid_size,
        "resized_size": resized_size,
        "output_size": output_size,
        "align_corners": align_corners,
    }

    def make(some: slice) -> Masks:
        chosen = None if boxes is None else boxes[some]
        return Masks(output_size, *_assemble_op(basis, coefficients[some], windows[some], chosen, **how))

    if torch.compiler.is_compiling():
        return make(slice(None))
    if wants_triton(basis):
        return Masks.in_parts(make, len(windows), basis.device)
    with torch.autocast(basis.device.type, enabled=False):
        return assemble_masks_torch(basis, coefficients, windows, boxes=boxes, **how)


@torch.library.custom_op(
    "onestage::assemble_masks",
    mutates_args=(),
    schema="(Tensor basis, Tensor coefficients, Tensor windows, Tensor? boxes, *, int[] grid, int upsample, str order, "
    "float threshold, int[]? valid_size, int[]? resized_size, int[] output_size, bool align_corners) "
    "-> (Tensor, Tensor)",
)
def _assemble_op(
    basis: Tensor, coefficients: Tensor, windows: Tensor, boxes: Tensor | None, **how: Any
) -> tuple[Tensor, Tensor]:
    """Windows [N, 4] in the image and words of the masks, with room for N whole images: what `Masks` is made of.

    A custom op, so that `torch.compile` and `torch.export` take it as it is, on any device.
    """
    how = {name: tuple(value) if isinstance(value, list) else value for name, value in how.items()}
    if wants_triton(basis):
        from onestage.ops.triton.assemble import assemble_masks_triton

        return assemble_masks_triton(basis, coefficients, windows, boxes=boxes, **how)
    with torch.autocast(basis.device.type, enabled=False):
        masks = assemble_masks_torch(basis, coefficients, windows, boxes=boxes, **how)
    return masks.windows, pack_windows(masks.windows, masks.pixels, word_capacity(len(masks), masks.size))


@_assemble_op.register_fake
def _(
    basis: Tensor, coefficients: Tensor, windows: Tensor, boxes: Tensor | None, *, output_size: Size, **how: Any
) -> tuple[Tensor, Tensor]:
    words = windows.new_empty(word_capacity(windows.shape[0], output_size), dtype=torch.int32)
    return windows.new_empty(windows.shape[0], 4, dtype=torch.int64), words


@torch.no_grad()
def assemble_masks_torch(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    *,
    boxes: Tensor | None = None,
    grid: Size = (1, 1),
    upsample: int = 1,
    order: Literal["prob", "logits"] = "prob",
    threshold: float = 0.5,
    valid_size: Size | None = None,
    resized_size: Size | None = None,
    output_size: Size,
    align_corners: bool = False,
    maxima: tuple[Tensor, Tensor] | None = None,
) -> Masks:
    """Plain-torch twin of `assemble_masks`: defines the result, runs anywhere.

    Args:
        maxima: [N, W] and [N, H] float32 at output size, holding -inf: inside each window they are raised to the
            largest resized value of every column and row, a logit or a probability as `order` says.
    """
    if order == "logits":
        if grid != (1, 1):
            raise ValueError("order 'logits' has no sub-regions")
        threshold = math.log(threshold / (1.0 - threshold))
    up_size = (basis.shape[1] * upsample, basis.shape[2] * upsample)
    resized_size = output_size if resized_size is None else resized_size
    axes = []
    for axis in (0, 1):
        up = resize_taps(basis.shape[1 + axis], up_size[axis], False, windows.device)
        valid = up_size[axis] if valid_size is None else valid_size[axis]
        out = resize_taps(valid, resized_size[axis], align_corners, windows.device).first(output_size[axis])
        start, stop = windows[:, 1 - axis], windows[:, 3 - axis]
        if order == "prob":
            stop = stop.clamp(max=valid)
            out_start, out_stop = _reached(out, start, stop)
        else:
            out_start = start.clamp(max=len(out.weight))
            out_stop = torch.maximum(stop.clamp(max=len(out.weight)), out_start)
            start, stop = _needed(out, out_start, out_stop)
        cells = _plan_axis(up, start, stop, region_splits(boxes, axis, grid[axis]))
        axes.append((cells, _plan_resize(out, start, stop, out_start, out_stop)))
    (y_cells, y_image), (x_cells, x_image) = axes

    image_windows = torch.stack((x_image.start, y_image.start, x_image.stop, y_image.stop), 1)
    areas = (x_image.stop - x_image.start) * (y_image.stop - y_image.start)
    pixels = torch.empty(int(areas.sum()), dtype=torch.bool, device=basis.device)
    maps = _window_logits(basis.float(), coefficients.float(), y_cells, x_cells, grid, upsample)
    for n, (values, mask) in enumerate(zip(maps, pixels.split(areas.tolist()), strict=True)):
        if mask.shape[0] == 0:
            continue
        if order == "prob":
            values.sigmoid_()
        columns = y_image.apply(n, values).T.contiguous()  # [x, Y]
        mask = mask.view(-1, columns.shape[1])
        chunk = max(1, CHUNK // columns.shape[1])
        for first in range(0, mask.shape[0], chunk):
            some = slice(first, first + chunk)
            resized = x_image.apply(n, columns, some)
            _compare(resized, threshold, mask[some])
            if maxima is not None:
                _raise_maxima(maxima[0][n, int(x_image.start[n]) + first :], resized.amax(1))
                _raise_maxima(maxima[1][n, int(y_image.start[n]) :], resized.amax(0))
    return Masks(output_size, image_windows, pixels)


@torch.no_grad()
def assemble_soft(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    *,
    boxes: Tensor | None = None,
    grid: Size = (1, 1),
    upsample: int = 1,
) -> Tensor:
    """Cropped probabilities of N detections on the assembly grid, dense.

    Args:
        basis, coefficients, windows, boxes, grid, upsample: As in `assemble_masks`, order "prob".

    Returns:
        [N, h * upsample, w * upsample] float32 in [0, 1], 0 outside the windows. Carries no gradient.
    """
    if wants_triton(basis) or torch.compiler.is_compiling():
        return _soft_op(basis, coefficients, windows, boxes, grid=grid, upsample=upsample)
    with torch.autocast(basis.device.type, enabled=False):
        return assemble_soft_torch(basis, coefficients, windows, boxes=boxes, grid=grid, upsample=upsample)


@torch.library.custom_op(
    "onestage::assemble_soft",
    mutates_args=(),
    schema="(Tensor basis, Tensor coefficients, Tensor windows, Tensor? boxes, *, int[] grid, int upsample) -> Tensor",
)
def _soft_op(
    basis: Tensor, coefficients: Tensor, windows: Tensor, boxes: Tensor | None, *, grid: Size, upsample: int
) -> Tensor:
    how: dict[str, Any] = {"boxes": boxes, "grid": tuple(grid), "upsample": upsample}
    if wants_triton(basis):
        from onestage.ops.triton.assemble import assemble_soft_triton

        return assemble_soft_triton(basis, coefficients, windows, **how)
    with torch.autocast(basis.device.type, enabled=False):
        return assemble_soft_torch(basis, coefficients, windows, **how)


@_soft_op.register_fake
def _(
    basis: Tensor, coefficients: Tensor, windows: Tensor, boxes: Tensor | None, *, grid: Size, upsample: int
) -> Tensor:
    return basis.new_empty(windows.shape[0], basis.shape[1] * upsample, basis.shape[2] * upsample, dtype=torch.float32)


@torch.no_grad()
def assemble_soft_torch(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    *,
    boxes: Tensor | None = None,
    grid: Size = (1, 1),
    upsample: int = 1,
) -> Tensor:
    """Plain-torch twin of `assemble_soft`: defines the result, runs anywhere."""
    soft = basis.new_zeros(len(windows), basis.shape[1] * upsample, basis.shape[2] * upsample, dtype=torch.float32)
    cells = []
    for axis in (0, 1):
        up = resize_taps(basis.shape[1 + axis], soft.shape[1 + axis], False, windows.device)
        cells.append(_plan_axis(up, windows[:, 1 - axis], windows[:, 3 - axis], region_splits(boxes, axis, grid[axis])))
    maps = _window_logits(basis.float(), coefficients.float(), cells[0], cells[1], grid, upsample)
    for values, out, (x0, y0, x1, y1) in zip(maps, soft, windows.tolist(), strict=True):
        out[y0:y1, x0:x1] = values.sigmoid_()
    return soft


def resize_maps(maps: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Dense maps [N, h, w] at another resolution, bilinear: [N, height, width], also of no map at all."""
    # One map an image: a batch may be empty, channels may not.
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=align_corners)[:, 0]


@dataclass(frozen=True)
class _Taps:
    """Linear resize along one axis: target position t reads `index[t]` with `weight[t]`.

    Args:
        index: [target, 2] int64, both columns ascending.
        weight: [target, 2] float32.
    """

    index: Tensor
    weight: Tensor

    def first(self, count: int) -> _Taps:
        return _Taps(self.index[:count], self.weight[:count])


@dataclass(frozen=True)
class _Plan:
    """What N windows read along one axis.

    Args:
        start: [N] int64, first position of each window.
        stop: [N] int64, one past the last.
        index: For each window [length, 2] int64 rows of its source.
        weight: For each window [length, 2] float32.
        bags: [any length] int64: 0, 2, 4, ...
    """

    start: Tensor
    stop: Tensor
    index: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    bags: Tensor

    def apply(self, n: int, values: Tensor, some: slice = slice(None)) -> Tensor:
        """For each position of window n, or `some` of them, the weighted sum of its two rows of `values`.

        An embedding bag of two rows: on CPU several times faster than selecting the rows and interpolating.
        """
        index, weight = self.index[n][some], self.weight[n][some]
        bags = self.bags[: index.shape[0]]
        return torch.embedding_bag(values, index.flatten(), bags, False, 0, False, weight.flatten())[0]


def resize_taps(source: int, target: int, align_corners: bool, device: torch.device) -> _Taps:
    """The taps of `F.interpolate(size=target)` in float32."""
    position = torch.arange(target, dtype=torch.float32, device=device)
    if align_corners:
        position = position * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        position = ((position + 0.5) * (source / target) - 0.5).clamp(min=0.0)
    low = position.long().clamp(max=source - 1)
    weight = (position - low).clamp(max=1.0)
    high = (low + (weight > 0)).clamp(max=source - 1)
    return _Taps(torch.stack((low, high), 1), torch.stack((1.0 - weight, weight), 1))


def _reached(taps: _Taps, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The target positions that read a source position in [start, stop)."""
    low, high = taps.index.T.contiguous()
    first = torch.searchsorted(high, start.contiguous())
    end = torch.searchsorted(low, stop.contiguous())
    return first, torch.where(stop > start, torch.maximum(end, first), first)


def _needed(taps: _Taps, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The source positions that target positions [start, stop) read."""
    filled = stop > start
    first = torch.where(filled, taps.index[start.clamp(max=len(taps.index) - 1), 0], 0)
    end = torch.where(filled, taps.index[(stop - 1).clamp(min=0), 1] + 1, 0)
    return first, end


def region_splits(boxes: Tensor | None, axis: int, parts: int) -> Tensor | None:
    """[N, parts - 1] int64, the first assembly cell of each sub-region but the first along one axis."""
    if parts == 1:
        return None
    assert boxes is not None, "sub-regions need boxes"
    low, high = boxes[:, 1 - axis].float(), boxes[:, 3 - axis].float()
    # Double inside, float32 stored, as the published kernel does.
    width = (((high - low).double() + 0.1) / parts).float()[:, None]
    number = torch.arange(1, parts, device=boxes.device)
    # The border that rounding allows is one of these cells; `below` tests each as the kernel would.
    guess = (low[:, None] + number * width).ceil().clamp(-(2**24), 2**24).long() - 1
    below = [((guess + step) - low[:, None]) / width < number for step in range(3)]
    return guess + torch.stack(below).sum(0)


def _plan_axis(up: _Taps, start: Tensor, stop: Tensor, splits: Tensor | None) -> _Plan:
    """Basis rows that the assembly windows [start, stop) read; row r of sub-region k counts as k * rows + r.

    Returns:
        Plan whose `start` and `stop` are basis rows, and whose windows are the assembly windows.
    """
    basis_start, basis_stop = _needed(up, start, stop)
    owner, position = _enumerate(start, stop)
    index = up.index[position] - basis_start[owner, None]
    if splits is not None:
        part = (position[:, None] >= splits[owner]).sum(1)
        index = index + (part * (basis_stop - basis_start)[owner])[:, None]
    return _split(basis_start, basis_stop, index, up.weight[position], stop - start)


def _plan_resize(out: _Taps, start: Tensor, stop: Tensor, out_start: Tensor, out_stop: Tensor) -> _Plan:
    """Rows of the assembly windows [start, stop) that the image windows [out_start, out_stop) read."""
    owner, position = _enumerate(out_start, out_stop)
    index = out.index[position] - start[owner, None]
    last = (stop - start)[owner, None] - 1
    outside = (index < 0) | (index > last)
    weight = out.weight[position].masked_fill(outside, 0.0)
    return _split(out_start, out_stop, torch.minimum(index.clamp(min=0), last), weight, out_stop - out_start)


def _enumerate(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """All positions of N ranges: whose each is [S], and where it lies [S]."""
    lengths = (stop - start).clamp(min=0)
    owner = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner), device=start.device) + (start - before)[owner]


def _split(start: Tensor, stop: Tensor, index: Tensor, weight: Tensor, lengths: Tensor) -> _Plan:
    sizes = lengths.clamp(min=0).tolist()
    bags = torch.arange(0, 2 * max(sizes, default=0), 2, device=start.device)
    return _Plan(start, stop, index.split(sizes), weight.split(sizes), bags)


def _window_logits(
    basis: Tensor, coefficients: Tensor, y_cells: _Plan, x_cells: _Plan, grid: Size, upsample: int
) -> Iterator[Tensor]:
    """For each detection its logits in its assembly window, [y, x] float32."""
    rows, columns = grid
    depth, _, width = basis.shape
    maps = basis.permute(1, 2, 0).contiguous()  # [h, w, D]: a window row is contiguous
    weights = coefficients.view(-1, rows * columns, depth)
    ends = torch.stack((y_cells.start, y_cells.stop, x_cells.start, x_cells.stop), 1).tolist()
    for n, (y0, y1, x0, x1) in enumerate(ends):
        if y0 >= y1 or x0 >= x1:
            yield maps.new_zeros(len(y_cells.index[n]), len(x_cells.index[n]))
        elif upsample > 1 or rows * columns > 1:
            low = maps[y0:y1, x0:x1].transpose(0, 1).reshape(-1, depth) @ weights[n].T
            low = low.view(x1 - x0, y1 - y0, rows, columns).permute(3, 0, 2, 1).reshape(columns * (x1 - x0), -1)
            wide = x_cells.apply(n, low)  # [x, rows * basis rows]
            yield y_cells.apply(n, wide.T.contiguous())
        elif 3 * (x1 - x0) > width:  # whole rows cost less than copying a wide window
            yield (maps[y0:y1].view(-1, depth) @ weights[n, 0]).view(y1 - y0, width)[:, x0:x1].contiguous()
        else:
            yield (maps[y0:y1, x0:x1].reshape(-1, depth) @ weights[n, 0]).view(y1 - y0, x1 - x0)


def _raise_maxima(maxima: Tensor, values: Tensor) -> None:
    """Raises the first entries of a vector to `values`."""
    part = maxima[: len(values)]
    torch.maximum(part, values, out=part)


def _compare(values: Tensor, threshold: float, out: Tensor) -> None:
    """Writes `values > threshold` into `out`."""
    if out.device.type == "cpu":
        # numpy compares eight times as fast as torch.
        np.greater(values.numpy(), np.float32(threshold), out=out.numpy())
    else:
        torch.gt(values, threshold, out=out)
