"""Kernels that paste square maps into boxes: windows from boxes, then tiles of the output. Two launches.

A pixel between four cells of its map reads those four, from a map small enough to stay in the first cache; cells
beyond the map are zeros and are not read.
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
    no_ends,
    num_programs,
    on_its_gpu,
    owner_of_tile,
    padded_count,
    store_ends,
    store_words,
    tile_bound,
    tile_ends_of,
)

TILE_WARPS = 8


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
    _tile_kernel[(num_programs(boxes.device, tile_bound(count, size)),)](
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
        padded_count(count),
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
    LANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Tiles of the output, inside windows only: interpolate, then compare and pack, or store."""
    tile_ends = tile_ends_of(ends_ptr, N, LANES)
    total = tl.load(ends_ptr + N - 1)
    tile = tl.program_id(0).to(tl.int64)
    while tile < total:
        n, local = owner_of_tile(tile_ends, tile)
        x0 = tl.load(windows_ptr + n * 4).to(tl.int32)
        y0 = tl.load(windows_ptr + n * 4 + 1).to(tl.int32)
        x1 = tl.load(windows_ptr + n * 4 + 2).to(tl.int32)
        y1 = tl.load(windows_ptr + n * 4 + 3).to(tl.int32)
        words_per_column = tl.cdiv(y1 - y0, TILE_ROWS)
        word = local % words_per_column
        y = y0 + word * TILE_ROWS + tl.arange(0, TILE_ROWS)
        x = x0 + local // words_per_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        row, upper, lower = _hat(boxes_ptr + n * 4 + 1, y, side)
        column, left, right = _hat(boxes_ptr + n * 4, x, side)
        live = (y < y1)[:, None] & (x < x1)[None, :]
        map_ptr = maps_ptr + n * side * side
        above = _along_row(map_ptr, row[:, None], column[None, :], left[None, :], right[None, :], live, side)
        below = _along_row(map_ptr, row[:, None] + 1, column[None, :], left[None, :], right[None, :], live, side)
        value = above * upper[:, None] + below * lower[:, None]
        if soft_ptr is not None:
            lines = n.to(tl.int64) * image_height + y
            tl.store(soft_ptr + lines[:, None] * image_width + x[None, :], value, mask=live)
        if words_ptr is not None:
            words_start = tl.load(ends_ptr + N + n) - (x1 - x0).to(tl.int64) * words_per_column
            bits = (value >= threshold) & live
            store_words(words_ptr + words_start, bits, x - x0, x < x1, words_per_column, word)
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
def _along_row(map_ptr, row, column, left, right, live, side):
    """Values between two cells of a row of the map; zeros beyond it."""
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
    for name, dtype, output, lanes in (
        ("bits", "*fp32", "words_ptr", 128),
        ("bits, 1024 maps", "*fp32", "words_ptr", 1024),
        ("bits, bf16", "*bf16", "words_ptr", 128),
        ("soft", "*fp32", "soft_ptr", 128),
    ):
        given |= {"maps_ptr": dtype, "words_ptr": None, "soft_ptr": None, "LANES": lanes}
        given[output] = "*i32" if output == "words_ptr" else "*fp32"
        arguments = {argument: given[argument] for argument in _tile_kernel.arg_names}
        cases.append(KernelCase(name, _tile_kernel, arguments, TILE_WARPS))
    return cases
