"""Kernels of `onestage.ops.mask_loss`: cross-entropy in windows without a map of any size, and its gradients.

The forward walks through the pixels of each window once and sums the loss and, for every basis map, slope times basis:
the coefficients' gradient but for the upstream factor. The backward walks through the basis in tiles and asks every
window that meets the tile for its slopes again. So nothing of the size of the windows is kept in between, nothing is
added atomically, and runs repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import on_its_gpu

PARTS = 8  # programs that share one window
BLOCK = 64  # pixels a program takes at a time, of a window
TILE = (8, 8)  # rows and columns of a program in the backward
CHUNK = 128  # windows it looks through at a time
WARPS = ((32, 4, 4), (64, 8, 16))  # forward and backward, by the number of basis maps, which lie in registers


@on_its_gpu
def window_loss_triton(
    basis: Tensor, weights: Tensor, windows: Tensor, masks: Tensor, mask_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of each window, and how it pulls on its weights.

    Args:
        basis: [h, w, D] float32, contiguous: all maps of a cell lie side by side; D <= 64.
        weights: [S, D] float32.
        windows: [S, 4] int64 x0, y0, x1, y1, half-open, inside the grid.
        masks: [G, h, w] of 0 and 1, any type.
        mask_index: [S] int64 in 0..G-1.

    Returns:
        losses: [S] float32, as of `window_mask_loss`.
        pull: [S, D] float32, gradient of the losses for `weights`.
    """
    num_windows, depth = weights.shape
    losses = weights.new_empty(num_windows, PARTS)
    pull = weights.new_empty(num_windows, PARTS, depth)
    if num_windows > 0:
        _forward_kernel[(num_windows, PARTS)](
            basis,
            weights.contiguous(),
            windows.contiguous(),
            _bytes(masks),
            mask_index.contiguous(),
            losses,
            pull,
            basis.shape[0],
            basis.shape[1],
            depth,
            triton.next_power_of_2(depth),
            BLOCK,
            PARTS,
            num_warps=_warps(depth)[0],
        )
    return losses.sum(1), pull.sum(1)


@on_its_gpu
def window_loss_backward_triton(
    upstream: Tensor, basis: Tensor, weights: Tensor, windows: Tensor, masks: Tensor, mask_index: Tensor
) -> Tensor:
    """Gradient of sum(upstream * losses) for the basis.

    Args:
        upstream: [S] float32.
        basis, weights, windows, masks, mask_index: As in `window_loss_triton`.

    Returns:
        [h, w, D] float32.
    """
    height, width, depth = basis.shape
    gradient = torch.empty_like(basis)
    tiles = triton.cdiv(height, TILE[0]), triton.cdiv(width, TILE[1])
    if gradient.numel() > 0:
        _backward_kernel[tiles](
            upstream.contiguous(),
            basis,
            weights.contiguous(),
            windows.contiguous(),
            _bytes(masks),
            mask_index.contiguous(),
            gradient,
            len(weights),
            height,
            width,
            depth,
            triton.next_power_of_2(depth),
            *TILE,
            CHUNK,
            num_warps=_warps(depth)[1],
        )
    return gradient


def _warps(depth: int) -> tuple[int, int]:
    return next((forward, backward) for most, forward, backward in WARPS if depth <= most)


def _bytes(masks: Tensor) -> Tensor:
    return (masks if masks.dtype == torch.uint8 else masks.to(torch.uint8)).contiguous()


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    basis_ptr,  # [h, w, D]
    weights_ptr,  # [S, D]
    windows_ptr,  # [S, 4]
    masks_ptr,  # [G, h, w]
    index_ptr,  # [S]
    losses_ptr,  # [S, PARTS]
    pull_ptr,  # [S, PARTS, D]
    height,
    width,
    depth: tl.constexpr,
    DEPTH: tl.constexpr,  # a power of two
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    window, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x0, y0, x1, y1 = _sides(windows_ptr, window, True)
    num_columns = x1 - x0
    num_pixels = num_columns * (y1 - y0)
    channel = tl.arange(0, DEPTH)
    weights = tl.load(weights_ptr + window * depth + channel, mask=channel < depth, other=0.0)
    mask_row = masks_ptr + tl.load(index_ptr + window) * height * width
    loss = tl.zeros((BLOCK,), dtype=tl.float32)
    pull = tl.zeros((DEPTH,), dtype=tl.float32)
    start = part * BLOCK
    while start < num_pixels:
        pixel = start + tl.arange(0, BLOCK)
        live = pixel < num_pixels
        cell = (y0 + pixel // num_columns) * width + x0 + pixel % num_columns
        maps = _maps(basis_ptr, cell, live, channel, depth)
        sign = 1.0 - 2.0 * tl.load(mask_row + cell, mask=live, other=0).to(tl.float32)
        wrong = tl.sum(maps * weights[None, :], axis=1) * sign
        each, chance = _softplus_and_sigmoid(wrong)
        loss += tl.where(live, each, 0.0)
        slope = tl.where(live, chance * sign, 0.0)
        pull += tl.sum(maps * slope[:, None], axis=0)
        start += PARTS * BLOCK
    tl.store(losses_ptr + window * PARTS + part, tl.sum(loss, axis=0))
    tl.store(pull_ptr + (window * PARTS + part) * depth + channel, pull, mask=channel < depth)


@triton.jit(do_not_specialize=["num_windows", "height", "width"])
def _backward_kernel(
    upstream_ptr,  # [S]
    basis_ptr,  # [h, w, D]
    weights_ptr,  # [S, D]
    windows_ptr,  # [S, 4]
    masks_ptr,  # [G, h, w]
    index_ptr,  # [S]
    gradient_ptr,  # [h, w, D]
    num_windows,
    height,
    width,
    depth: tl.constexpr,
    DEPTH: tl.constexpr,  # a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    top, left = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    y, x = top + pixel // COLUMNS, left + pixel % COLUMNS
    on_grid = (y < height) & (x < width)
    cell = y.to(tl.int64) * width + x
    channel = tl.arange(0, DEPTH)
    maps = _maps(basis_ptr, cell, on_grid, channel, depth)
    gradient = tl.zeros((ROWS * COLUMNS, DEPTH), dtype=tl.float32)
    first = 0
    while first < num_windows:
        # A chunk of windows is looked through together, for those that meet the tile; these one by one, in their order.
        candidate = first + tl.arange(0, CHUNK)
        lefts, tops, rights, bottoms = _sides(windows_ptr, candidate, candidate < num_windows)
        meets = (lefts < left + COLUMNS) & (rights > left) & (tops < top + ROWS) & (bottoms > top)
        window = tl.min(tl.where(meets, candidate, num_windows), axis=0)
        while window < num_windows:
            x0, y0, x1, y1 = _sides(windows_ptr, window, True)
            live = on_grid & (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
            weights = tl.load(weights_ptr + window * depth + channel, mask=channel < depth, other=0.0)
            mask_row = masks_ptr + tl.load(index_ptr + window) * height * width
            sign = 1.0 - 2.0 * tl.load(mask_row + cell, mask=live, other=0).to(tl.float32)
            _, chance = _softplus_and_sigmoid(tl.sum(maps * weights[None, :], axis=1) * sign)
            slope = tl.where(live, chance * sign * tl.load(upstream_ptr + window), 0.0)
            gradient += slope[:, None] * weights[None, :]
            window = tl.min(tl.where(meets & (candidate > window), candidate, num_windows), axis=0)
        first += CHUNK
    pointers = gradient_ptr + cell[:, None] * depth + channel[None, :]
    tl.store(pointers, gradient, mask=on_grid[:, None] & (channel < depth)[None, :])


@triton.jit
def _sides(windows_ptr, window, there):
    """x0, y0, x1, y1 of windows; of one that is not there all 0, which meets nothing."""
    sides = windows_ptr + window * 4
    x0 = tl.load(sides, mask=there, other=0).to(tl.int32)
    y0 = tl.load(sides + 1, mask=there, other=0).to(tl.int32)
    x1 = tl.load(sides + 2, mask=there, other=0).to(tl.int32)
    return x0, y0, x1, tl.load(sides + 3, mask=there, other=0).to(tl.int32)


@triton.jit
def _maps(basis_ptr, cell, live, channel, depth: tl.constexpr):
    pointers = basis_ptr + cell.to(tl.int64)[:, None] * depth + channel[None, :]
    return tl.load(pointers, mask=live[:, None] & (channel < depth)[None, :], other=0.0)


@triton.jit
def _softplus_and_sigmoid(value):
    e = tl.exp(-tl.abs(value))  # at most 1: nothing overflows
    one_more = 1.0 + e
    # log(1 + e) loses a small e; the quotient gives back what the sum rounded away.
    rounded = one_more - 1.0
    log = tl.where(rounded == 0.0, e, tl.log(one_more) * (e / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.maximum(value, 0.0) + log, tl.where(value >= 0.0, 1.0, e) / one_more


def compile_cases() -> list[KernelCase]:
    """What the compile check covers, see `onestage.ops.triton.check`."""
    given: dict[str, Any] = dict.fromkeys(("height", "width", "num_windows"), "i32")
    given |= {"windows_ptr": "*i64", "index_ptr": "*i64", "masks_ptr": "*u8"}
    given |= {"BLOCK": BLOCK, "PARTS": PARTS, "ROWS": TILE[0], "COLUMNS": TILE[1], "CHUNK": CHUNK}
    cases = []
    for depth, *num_warps in WARPS:
        for kernel, warps in zip((_forward_kernel, _backward_kernel), num_warps, strict=True):
            given |= {"depth": depth, "DEPTH": depth}
            arguments = {name: given.get(name, "*fp32") for name in kernel.arg_names}
            cases.append(KernelCase(f"{depth} maps", kernel, arguments, warps))
    return cases
