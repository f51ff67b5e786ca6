"""Binary cross-entropy of assembled masks, computed in the windows of the boxes only, with its own backward.

D basis maps [h, w]; N instances. A sub-region of an instance is a window with one coefficient set, and that is all the
computation sees: S = N * rows * columns windows. Windows that nearly coincide (the many locations that answer for one
instance) share a pass: one matrix product in the union of their windows. Dense autograd keeps about four maps [h, w]
per window; this keeps one value for each pixel in a window.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.ops.assemble import crop_window, region_splits
from onestage.ops.dispatch import wants_triton

PASS_PIXELS = 20_000  # what starting a pass costs, in pixels of one window
BASIS_PIXELS = 3  # what reading the basis and adding to its gradient costs, likewise
MAX_PIXELS = 1 << 21  # pixels of a pass; bounds memory
KERNEL_DEPTH = 64  # basis maps that the kernels take

Pass = tuple[Tensor, tuple[int, int, int, int]]  # members [n] int64, and the union of their windows


def window_mask_loss(
    basis: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    masks: Tensor,
    mask_index: Tensor,
    *,
    grid: tuple[int, int] = (1, 1),
    rule: Literal["half_open", "margin"] = "half_open",
) -> Tensor:
    """Sum over each box of the cross-entropy between sigmoid(basis . coefficients) and the mask it answers for.

    Args:
        basis: [D, h, w].
        coefficients: [N, rows * columns * D]; the D numbers of sub-region (row, column) start at
            (row * columns + column) * D.
        boxes: [N, 4] xyxy, cells of the basis grid, real-valued; gets no gradient.
        masks: [G, h, w] of 0 and 1, on the basis grid.
        mask_index: [N] int64 in 0..G-1.
        grid: (rows, columns) of sub-regions.
        rule: Which cells a box keeps, see `crop_window`.

    Returns:
        [N] float32 (float64 if `basis` is), >= 0; 0 for a box without cells. Gradients reach `basis` and
        `coefficients`, also where N is 0.
    """
    kind = torch.float64 if basis.dtype == torch.float64 else torch.float32
    boxes = boxes.detach()
    num_regions = grid[0] * grid[1]
    windows = _region_windows(boxes, crop_window(boxes, (basis.shape[1], basis.shape[2]), rule), grid)
    weights = coefficients.to(kind).reshape(len(boxes) * num_regions, len(basis))
    owner = mask_index[:, None].expand(-1, num_regions).flatten()
    if len(basis) <= KERNEL_DEPTH and kind == torch.float32 and (wants_triton(basis) or torch.compiler.is_compiling()):
        cells = basis.float().permute(1, 2, 0).contiguous()
        losses, _ = _window_loss_op(cells, weights, windows, masks, owner)
    else:
        with torch.autocast(basis.device.type, enabled=False):
            losses, _ = _WindowLoss.apply(basis.to(kind), weights, windows, masks, owner, num_regions, None)
    return losses.view(len(boxes), num_regions).sum(1)


def mined_mask_loss(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    masks: Tensor,
    mask_index: Tensor,
    *,
    negatives: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum over each window of the cross-entropy, with only the hardest background pixels of each instance.

    Args:
        basis: [D, h, w].
        coefficients: [N, D].
        windows: [N, 4] int64 x0, y0, x1, y1, half-open, inside the grid.
        masks: [G, h, w] of 0 and 1, on the basis grid.
        mask_index: [N] int64 in 0..G-1.
        negatives: Background pixels kept for each foreground pixel of a window, those of largest loss; a fraction of
            a pixel keeps it. None: all of them.

    Returns:
        [N] sums as of `window_mask_loss`, and [N] int64 numbers of pixels they are over, which carry no gradient.
    """
    kind = torch.float64 if basis.dtype == torch.float64 else torch.float32
    with torch.autocast(basis.device.type, enabled=False):
        losses, counts = _WindowLoss.apply(
            basis.to(kind), coefficients.to(kind), windows, masks, mask_index, 1, negatives
        )
    return losses, counts


def masks_on_grid(masks: Tensor, stride: int) -> Tensor:
    """Ground-truth masks on a coarser grid: bilinear, half-pixel, above one half.

    Args:
        masks: [G, H, W] uint8 of 0 and 1, H and W multiples of `stride`.
        stride: Pixels per cell, even or 1.

    Returns:
        [G, H / stride, W / stride] uint8.
    """
    if stride == 1:
        return masks
    # A bilinear resize by an even factor reads the middle 2 x 2 pixels of each cell.
    low, high = stride // 2 - 1, stride // 2
    middle = masks[:, low::stride] + masks[:, high::stride]
    return (middle[:, :, low::stride] + middle[:, :, high::stride] > 2).to(torch.uint8)


@torch.library.custom_op(
    "onestage::window_loss",
    mutates_args=(),
    schema="(Tensor basis, Tensor weights, Tensor windows, Tensor masks, Tensor mask_index) -> (Tensor, Tensor)",
)
def _window_loss_op(
    basis: Tensor, weights: Tensor, windows: Tensor, masks: Tensor, mask_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [S] of windows, and their gradients for the weights [S, D] before the upstream factor.

    basis [h, w, D], weights [S, D], windows [S, 4], masks [G, h, w], mask_index [S]; float32.
    """
    if wants_triton(basis):
        from onestage.ops.triton.mask_loss import window_loss_triton

        return window_loss_triton(basis, weights, windows, masks, mask_index)
    maps = basis.permute(2, 0, 1)
    with torch.autocast(basis.device.type, enabled=False):
        losses, _, passes, slopes = _losses(maps, weights, windows, masks, mask_index, mask_index, None)
        return losses, _gradients(torch.ones_like(losses), maps, weights, passes, slopes)[1]


@_window_loss_op.register_fake
def _(basis: Tensor, weights: Tensor, windows: Tensor, masks: Tensor, mask_index: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape[0]), weights.new_empty(weights.shape)


@torch.library.custom_op(
    "onestage::window_loss_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor basis, Tensor weights, Tensor windows, Tensor masks, Tensor mask_index) -> Tensor",
)
def _window_loss_backward_op(
    upstream: Tensor, basis: Tensor, weights: Tensor, windows: Tensor, masks: Tensor, mask_index: Tensor
) -> Tensor:
    """Gradient [h, w, D] of sum(upstream * losses) for the basis."""
    if wants_triton(basis):
        from onestage.ops.triton.mask_loss import window_loss_backward_triton

        return window_loss_backward_triton(upstream, basis, weights, windows, masks, mask_index)
    maps = basis.permute(2, 0, 1)
    with torch.autocast(basis.device.type, enabled=False):
        _, _, passes, slopes = _losses(maps, weights, windows, masks, mask_index, mask_index, None)
        return _gradients(upstream, maps, weights, passes, slopes)[0].permute(1, 2, 0).contiguous()


@_window_loss_backward_op.register_fake
def _(upstream: Tensor, basis: Tensor, weights: Tensor, windows: Tensor, masks: Tensor, mask_index: Tensor) -> Tensor:
    return basis.new_empty(basis.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _pull_back(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, pull = ctx.saved_tensors
    basis_gradient = _window_loss_backward_op(upstream, *inputs) if ctx.needs_input_grad[0] else None
    return basis_gradient, pull * upstream[:, None], None, None, None


_window_loss_op.register_autograd(_pull_back, setup_context=_keep_for_backward)


class _WindowLoss(torch.autograd.Function):
    """basis [D, h, w], weights [S, D], windows [S, 4], masks [G, h, w], mask_index [S] to losses and counts [S]."""

    @staticmethod
    def forward(
        ctx: Any,
        basis: Tensor,
        weights: Tensor,
        windows: Tensor,
        masks: Tensor,
        mask_index: Tensor,
        num_regions: int,
        negatives: float | None,
    ) -> tuple[Tensor, Tensor]:
        regions = torch.arange(len(windows), device=windows.device) % num_regions
        key = mask_index * num_regions + regions
        losses, counts, ctx.passes, slopes = _losses(basis, weights, windows, masks, mask_index, key, negatives)
        ctx.save_for_backward(basis, weights, *slopes)
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        basis, weights, *slopes = ctx.saved_tensors
        with torch.autocast(basis.device.type, enabled=False):
            gradients = _gradients(upstream, basis, weights, ctx.passes, slopes)
        return (*gradients, None, None, None, None, None)


def _losses(
    basis: Tensor,
    weights: Tensor,
    windows: Tensor,
    masks: Tensor,
    mask_index: Tensor,
    key: Tensor,
    negatives: float | None,
) -> tuple[Tensor, Tensor, list[Pass], list[Tensor]]:
    """Losses [S], pixels they are over [S], the passes, and for each of them d loss / d logit [n, pixels]."""
    passes = _passes(windows, key)
    losses = weights.new_zeros(len(weights))
    counts = (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])
    slopes = []
    for members, (x0, y0, x1, y1) in passes:
        pixels = basis[:, y0:y1, x0:x1].reshape(len(basis), -1)
        logits = (weights[members] @ pixels).view(-1, y1 - y0, x1 - x0)
        # Cross-entropy is softplus of the logit with the sign turned where the mask is 1.
        sign = 1 - 2 * masks[mask_index[members], y0:y1, x0:x1].to(logits.dtype)
        wrong = logits.mul_(sign)
        if len(members) > 1:
            wrong.masked_fill_(_outside(windows[members], x0, y0, x1, y1), -torch.inf)
        if negatives is not None:
            counts[members] = _drop_easy(wrong.flatten(1), sign.flatten(1) < 0, negatives)
        losses[members] = F.softplus(wrong).sum((1, 2))
        slopes.append(wrong.sigmoid_().mul_(sign).flatten(1))
    return losses, counts, passes, slopes


def _gradients(
    upstream: Tensor, basis: Tensor, weights: Tensor, passes: list[Pass], slopes: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Of sum(upstream * losses) for the basis [D, h, w] and the weights [S, D]."""
    basis_gradient = torch.zeros_like(basis)
    weights_gradient = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    for (members, (x0, y0, x1, y1)), slope in zip(passes, slopes, strict=True):
        pixels = basis[:, y0:y1, x0:x1].reshape(len(basis), -1)
        scale = upstream[members, None]
        weights_gradient[members] = (slope @ pixels.T) * scale
        change = (weights[members] * scale).T @ slope
        basis_gradient[:, y0:y1, x0:x1] += change.view(-1, y1 - y0, x1 - x0)
    return basis_gradient, weights_gradient


def _drop_easy(wrong: Tensor, foreground: Tensor, negatives: float) -> Tensor:
    """Takes the easy background pixels out of the loss, in place.

    Args:
        wrong: [n, P], the loss is its softplus; -inf where a pixel does not count.
        foreground: [n, P] bool, also of pixels that do not count.
        negatives: Background pixels kept for each foreground pixel that counts.

    Returns:
        [n] int64, pixels left.
    """
    counted = wrong > -torch.inf
    num_foreground = (foreground & counted).sum(1)
    background = wrong.masked_fill(foreground, -torch.inf)
    order = background.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(wrong.shape[1], device=wrong.device)
    easy = torch.empty_like(foreground).scatter_(1, order, rank >= negatives * num_foreground[:, None])
    wrong.masked_fill_(easy & ~foreground, -torch.inf)
    return (wrong > -torch.inf).sum(1)


def _region_windows(boxes: Tensor, windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N * rows * columns, 4] int64: the windows cut at the borders of the sub-regions, row by row."""
    edges = []
    for axis in (0, 1):
        start, stop = windows[:, 1 - axis, None], windows[:, 3 - axis, None]
        splits = region_splits(boxes, axis, grid[axis])
        inner = start[:, :0] if splits is None else torch.minimum(torch.maximum(splits, start), stop)
        edges.append(torch.cat((start, inner, stop), 1))
    y, x = edges
    y0, x0 = torch.broadcast_tensors(y[:, :-1, None], x[:, None, :-1])
    y1, x1 = torch.broadcast_tensors(y[:, 1:, None], x[:, None, 1:])
    return torch.stack((x0, y0, x1, y1), -1).view(-1, 4)


def _passes(windows: Tensor, key: Tensor) -> list[Pass]:
    """Which windows share a pass: all of them, those of one key, or none; whatever costs least.

    Args:
        windows: [S, 4] int64.
        key: [S] int64, equal where windows are likely to coincide.

    Returns:
        Members [n] int64 of each pass and the union of their windows; windows without pixels are in none.
    """
    ends, keys = windows.cpu().numpy(), key.cpu().numpy()
    areas = (ends[:, 2:] - ends[:, :2]).prod(1)
    filled = np.flatnonzero(areas)
    if len(filled) == 0:
        return []
    filled = filled[keys[filled].argsort(kind="stable")]
    plan: list[np.ndarray] = []
    cost = 0
    for members in np.split(filled, np.flatnonzero(np.diff(keys[filled])) + 1):
        together = _cost(ends[members])
        alone = PASS_PIXELS * len(members) + int(areas[members].sum()) * (1 + BASIS_PIXELS)
        plan += [members] if together <= alone else np.split(members, len(members))
        cost += min(together, alone)
    if _cost(ends[filled]) <= cost:
        plan = [filled]
    passes = []
    for members in plan:
        x0, y0, x1, y1 = _union(ends[members])
        step = max(1, MAX_PIXELS // ((x1 - x0) * (y1 - y0)))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            passes.append((torch.from_numpy(part).to(windows.device), _union(ends[part])))
    return passes


def _cost(ends: np.ndarray) -> int:
    x0, y0, x1, y1 = _union(ends)
    return PASS_PIXELS + (x1 - x0) * (y1 - y0) * (len(ends) + BASIS_PIXELS)


def _union(ends: np.ndarray) -> tuple[int, int, int, int]:
    (x0, y0), (x1, y1) = ends[:, :2].min(0).tolist(), ends[:, 2:].max(0).tolist()
    return x0, y0, x1, y1


def _outside(windows: Tensor, x0: int, y0: int, x1: int, y1: int) -> Tensor:
    """[n, y1 - y0, x1 - x0] bool, true outside each window."""
    x = torch.arange(x0, x1, device=windows.device)
    y = torch.arange(y0, y1, device=windows.device)
    left, top, right, bottom = windows[:, :, None].unbind(1)
    columns = (x >= left) & (x < right)
    rows = (y >= top) & (y < bottom)
    return ~(rows[:, :, None] & columns[:, None, :])
