"""Kernels that paste square maps into boxes: windows from boxes, then tiles of the output. Two launches.

A pixel lies between four cells of its map; those beyond the map are zeros and are not read. What a column takes of a
line of the map is computed once for all rows between that line and the next.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.packed import word_capacity
from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import (
    PLAN_BLOCK,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WARPS,
    no_ends,
    on_its_gpu,
    store_ends,
    tile_in_window,
    tile_programs,
)


@on_its_gpu
def paste_masks_triton(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """Kernels of `paste_masks`, with its arguments.

    Returns:
        [N, 4] int64 windows in image pixels and int32 words as `Masks` holds them, with room for N whole images.
    """
    words = torch.empty(word_capacity(len(boxes), size), dtype=torch.int32, device=boxes.device)
    return _paste(probabilities, boxes, size, threshold, words, None), words


@on_its_gpu
def paste_soft_triton(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernels of `paste_soft`, with its arguments and its result."""
    soft = torch.zeros(len(boxes), *size, dtype=torch.float32, device=boxes.device)
    _paste(probabilities, boxes, size, 0.5, None, soft)
    return soft


def _paste(
    probabilities: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    threshold: float,
    words: Tensor | None,
    soft: Tensor | None,
) -> Tensor:
    """Fills the output that is there. Returns the windows in image pixels."""
    count, side = len(boxes), probabilities.shape[-1]
    windows = torch.empty(count, 4, dtype=torch.int64, device=boxes.device)
    if count == 0:
        return windows
    boxes, probabilities = boxes.contiguous(), probabilities.contiguous()
    ends = torch.empty(2, count, dtype=torch.int64, device=boxes.device)
    _plan_kernel[(1,)](boxes, windows, ends, count, *size, side, PLAN_BLOCK, TILE_ROWS, TILE_COLUMNS)
    _tile_kernel[(tile_programs(boxes.device, count, size),)](
        probabilities,
        boxes,
        windows,
        ends,
        words,
        soft,
        threshold,
        count,
        *size,
        side,
        TILE_ROWS,
        TILE_COLUMNS,
        num_warps=TILE_WARPS,
    )
    return windows


@triton.jit(do_not_specialize=["N", "height", "width"])
def _plan_kernel(
    boxes_ptr,
    windows_ptr,
    ends_ptr,
    N,
    height,
    width,
    side,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """The windows that maps reach, and the ends of their tiles and words; one program."""
    tiles_before, words_before = no_ends()
    first = 0
    while first < N:
        n = first + tl.arange(0, BLOCK)
        live = n < N
        x0, x1 = _reach(boxes_ptr + n * 4, live, width, side)
        y0, y1 = _reach(boxes_ptr + n * 4 + 1, live, height, side)
        tl.store(windows_ptr + n * 4, x0.to(tl.int64), mask=live)
        tl.store(windows_ptr + n * 4 + 1, y0.to(tl.int64), mask=live)
        tl.store(windows_ptr + n * 4 + 2, x1.to(tl.int64), mask=live)
        tl.store(windows_ptr + n * 4 + 3, y1.to(tl.int64), mask=live)
        tiles_before, words_before = store_ends(
            ends_ptr, n, live, y1 - y0, x1 - x0, tiles_before, words_before, N, TILE_ROWS, TILE_COLUMNS
        )
        first += BLOCK


@triton.jit
def _reach(box_ptr, live, extent, side):
    """First pixel and one past the last that maps reach along an axis: half a cell more than their boxes."""
    low = tl.load(box_ptr, mask=live, other=0.0).to(tl.float32)
    high = tl.load(box_ptr + 2, mask=live, other=0.0).to(tl.float32)
    length = high - low
    margin = tl.div_rn(length, side * 1.0) * 0.5
    # Cut to the image as floats: a side may lie too far outside for an integer.
    last = extent * 1.0
    start = tl.minimum(tl.maximum(tl.ceil(low - margin - 0.5), 0.0), last).to(tl.int32)
    stop = tl.minimum(tl.maximum(tl.floor(high + margin - 0.5) + 1.0, 0.0), last).to(tl.int32)
    return start, tl.where(length > 0, tl.maximum(stop, start), start)


@triton.jit(do_not_specialize=["N", "image_height", "image_width"])
def _tile_kernel(
    maps_ptr,
    boxes_ptr,
    windows_ptr,
    ends_ptr,
    words_ptr,
    soft_ptr,
    threshold,
    N,
    image_height,
    image_width,
    side,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Tiles of the output, inside windows only: interpolate, then compare and pack, or store."""
    total = tl.load(ends_ptr + N - 1)
    tile = tl.program_id(0).to(tl.int64)
    while tile < total:
        n, x0, y0, x1, y1, words_per_column, word, first_column = tile_in_window(
            windows_ptr, ends_ptr, N, tile, TILE_ROWS, TILE_COLUMNS
        )
        top = y0 + word * TILE_ROWS
        x = x0 + first_column + tl.arange(0, TILE_COLUMNS)
        live = x < x1
        column, left, right = _hat(boxes_ptr + n * 4, x, side)
        row_of_tile = tl.arange(0, TILE_ROWS)
        rows, uppers, lowers = _hat(boxes_ptr + n * 4 + 1, top + row_of_tile, side)
        map_ptr = maps_ptr + n * side * side
        read = tl.min(rows, 0) - 1  # the last line of the map that was read
        above = tl.zeros((TILE_COLUMNS,), tl.float32)
        below = tl.zeros((TILE_COLUMNS,), tl.float32)
        packed = tl.zeros((TILE_COLUMNS,), tl.int32)
        y = top
        while y < tl.minimum(top + TILE_ROWS, y1):
            here = row_of_tile == y - top
            row = tl.sum(tl.where(here, rows, 0), 0)
            upper = _picked(uppers, here)
            lower = _picked(lowers, here)
            while read <= row:
                read += 1
                above = below
                below = _along_row(map_ptr, read, column, left, right, live, side)
            value = above * upper + below * lower
            packed |= (value >= threshold).to(tl.int32) << (y - top)
            if soft_ptr is not None:
                line = n.to(tl.int64) * image_height + y
                tl.store(soft_ptr + line * image_width + x, value, mask=live)
            y += 1
        if words_ptr is not None:
            words_start = tl.load(ends_ptr + N + n) - (x1 - x0).to(tl.int64) * words_per_column
            tl.store(words_ptr + words_start + (x - x0).to(tl.int64) * words_per_column + word, packed, mask=live)
        tile += tl.num_programs(0)


@triton.jit
def _hat(box_ptr, position, side):
    """The cell below each pixel centre, and how much the pixel takes of it and of the next one."""
    low = tl.load(box_ptr).to(tl.float32)
    high = tl.load(box_ptr + 2).to(tl.float32)
    # In the order of the twin, and so of `grid_sample`.
    grid = tl.div_rn(position.to(tl.float32) + 0.5 - low, high - low) * 2.0 - 1.0
    cell = ((grid + 1.0) * side - 1.0) * 0.5
    first = tl.floor(cell)
    return first.to(tl.int32), 1.0 - (cell - first), 1.0 - (first + 1.0 - cell)


@triton.jit
def _picked(values, here):
    """The one of the floats where `here` is."""
    return tl.sum(tl.where(here, values.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _along_row(map_ptr, row, column, left, right, live, side):
    """What columns take of a row of the map; zeros beyond it."""
    inside = live & (row >= 0) & (row < side)
    cell_ptr = map_ptr + row * side + column
    first = tl.load(cell_ptr, mask=inside & (column >= 0) & (column < side), other=0.0).to(tl.float32)
    second = tl.load(cell_ptr + 1, mask=inside & (column >= -1) & (column < side - 1), other=0.0).to(tl.float32)
    return first * left + second * right


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles."""
    pointers = {"boxes_ptr": "*fp32", "windows_ptr": "*i64", "ends_ptr": "*i64", "threshold": "fp32"}
    sizes = dict.fromkeys(("N", "height", "width", "image_height", "image_width", "side"), "i32")
    tiles = {"BLOCK": PLAN_BLOCK, "TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS}
    given: dict[str, Any] = {**pointers, **sizes, **tiles}
    cases = [KernelCase("paste", _plan_kernel, {name: given[name] for name in _plan_kernel.arg_names})]
    for name, dtype, output in (
        ("bits", "*fp32", "words_ptr"),
        ("bits, bf16", "*bf16", "words_ptr"),
        ("soft", "*fp32", "soft_ptr"),
    ):
        given |= {"maps_ptr": dtype, "words_ptr": None, "soft_ptr": None}
        given[output] = "*i32" if output == "words_ptr" else "*fp32"
        arguments = {argument: given[argument] for argument in _tile_kernel.arg_names}
        cases.append(KernelCase(name, _tile_kernel, arguments, TILE_WARPS))
    return cases
