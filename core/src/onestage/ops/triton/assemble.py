"""Kernels of mask assembly: plan, dot products on the basis grid, tiles of the output. Three launches.

The dot products are shared the other way round than the formula reads: a program holds a tile of the basis and goes
through the detections that overlap it, so the basis is read once or a few times, not once a detection. Their results
lie in a scratch of N basis grids, of which only windows are touched: it costs 4 N h w bytes (27 MB for 100 detections
on a 200 x 336 basis). The tiles then gather from it. With `upsample` > 1 a tile first makes the assembly cells it reads
in a private piece of memory, so that no cell's sigmoid is computed for each of the pixels that read it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.assemble import Size, resize_taps
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

BASIS_ROWS, BASIS_COLUMNS = 8, 16  # basis cells of a program of the dot products
LANES = 128  # sub-regions that it looks at together
MAX_SPLITS = 8  # of the detections, where the basis has too few tiles for the GPU
CELLS = 512  # assembly cells computed at a time
TILE_WARPS = 8
FIXED_ROWS = 12  # of the plan, before those of the sub-regions; the order of `_plan_kernel`
LENGTHS = ("y_cells", "y_valid", "y_output", "x_cells", "x_valid", "x_output")  # of the axes
EXTENTS = ("scratch_height", "scratch_width", "private_size", "image_height", "image_width")  # of memory


@on_its_gpu
def assemble_masks_triton(
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
) -> tuple[Tensor, Tensor]:
    """Kernels of `assemble_masks`, with the arguments of its twin.

    Returns:
        [N, 4] int64 windows in image pixels and int32 words as `Masks` holds them, with room for N whole images.
    """
    if order == "logits":
        if grid != (1, 1):
            raise ValueError("order 'logits' has no sub-regions")
        threshold = math.log(threshold / (1.0 - threshold))
    words = basis.new_empty(word_capacity(len(windows), output_size), dtype=torch.int32)
    resized_size = output_size if resized_size is None else resized_size
    image_windows = _assemble(
        (basis, coefficients, windows, boxes),
        (grid, upsample, order, threshold),
        (valid_size, resized_size, output_size, align_corners),
        (words, None, maxima),
    )
    return image_windows, words


@on_its_gpu
def assemble_soft_triton(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    *,
    boxes: Tensor | None = None,
    grid: Size = (1, 1),
    upsample: int = 1,
) -> Tensor:
    """Kernels of `assemble_soft`, with its arguments and its result."""
    size = (basis.shape[1] * upsample, basis.shape[2] * upsample)
    soft = torch.zeros(len(windows), *size, dtype=torch.float32, device=basis.device)
    _assemble(
        (basis, coefficients, windows, boxes),
        (grid, upsample, "prob", 0.5),
        (None, size, size, False),
        (None, soft, None),
    )
    return soft


def _assemble(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    rule: tuple[Size, int, str, float],
    sizes: tuple[Size | None, Size, Size, bool],
    outputs: tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None],
) -> Tensor:
    """Fills the outputs that are there: words, probabilities, maxima. Returns the windows in image pixels."""
    basis, coefficients, windows, boxes = inputs
    (rows, columns), upsample, order, threshold = rule
    valid_size, resized_size, output_size, align_corners = sizes
    words, soft, maxima = outputs
    device, count = basis.device, len(windows)
    depth, height, width = basis.shape
    image_windows = torch.empty(count, 4, dtype=torch.int64, device=device)
    if count == 0:
        return image_windows
    if (rows, columns) == (1, 1):
        boxes = None
    else:
        assert boxes is not None, "sub-regions need boxes"
        boxes = boxes.contiguous()

    valid = valid_size or (height * upsample, width * upsample)
    tables, lengths, reach = [], [], []
    for axis in (0, 1):
        tables.append(
            _axis_table(
                basis.shape[1 + axis],
                upsample,
                valid[axis],
                resized_size[axis],
                output_size[axis],
                align_corners,
                device,
            )
        )
        lengths += [basis.shape[1 + axis] * upsample, valid[axis], min(resized_size[axis], output_size[axis])]
        reach.append(_tile_reach(valid[axis], resized_size[axis], align_corners, (TILE_ROWS, TILE_COLUMNS)[axis]))
    prob = order == "prob"
    plan = torch.empty(FIXED_ROWS + 3 * (rows + columns), count, dtype=torch.int32, device=device)
    ends = torch.empty(2, count, dtype=torch.int64, device=device)
    _plan_kernel[(1,)](
        windows.contiguous(),
        boxes,
        *tables,
        plan,
        image_windows,
        ends,
        count,
        *lengths,
        rows,
        columns,
        prob,
        PLAN_BLOCK,
        TILE_ROWS,
        TILE_COLUMNS,
    )
    shift = 2 if upsample > 1 else 0  # neighbouring sub-regions read at most two basis cells in common
    scratch_size = (height + shift * (rows - 1), width + shift * (columns - 1))
    scratch = torch.empty(count, *scratch_size, dtype=torch.float32, device=device)
    num_tiles = triton.cdiv(height, BASIS_ROWS) * triton.cdiv(width, BASIS_COLUMNS)
    block = max(4, triton.next_power_of_2(depth)) if depth <= 32 else 16  # more do not fit into the registers
    _dot_kernel[(num_tiles, max(1, min(MAX_SPLITS, count, num_programs(device, 1 << 20) // num_tiles)))](
        basis,
        coefficients.contiguous(),
        plan,
        scratch,
        count,
        depth,
        height,
        width,
        *basis.stride(),
        *scratch_size,
        rows,
        columns,
        shift,
        prob and upsample == 1,
        block,
        triton.cdiv(depth, block),
        LANES,
        BASIS_ROWS,
        BASIS_COLUMNS,
    )
    programs = num_programs(device, tile_bound(count, output_size))
    private = None
    if upsample > 1:
        private = torch.empty(programs, reach[0] * reach[1], dtype=torch.float32, device=device)
    _tile_kernel[(programs,)](
        scratch,
        private,
        plan,
        ends,
        *tables,
        words,
        soft,
        *(maxima or (None, None)),
        threshold,
        count,
        *lengths,
        *scratch_size,
        reach[0] * reach[1],
        *output_size,
        rows,
        columns,
        shift,
        upsample > 1,
        prob,
        padded_count(count),
        CELLS,
        TILE_ROWS,
        TILE_COLUMNS,
        num_warps=TILE_WARPS,
    )
    return image_windows


@lru_cache(maxsize=256)
def _axis_table(
    source: int, upsample: int, valid: int, resized: int, output: int, align_corners: bool, device: torch.device
) -> Tensor:
    """What an axis reads, as the twin has it; the same for all images of a size, so it is made once.

    Returns:
        int32, one after the other: of each assembly cell its two basis cells and the weight of the second (the bits of
        a float32); of each output position its two assembly cells and the weight of the second; for each assembly cell
        up to and with `valid` the first output position that reads it or a later one, and the first that reads only
        those.
    """
    up = resize_taps(source, source * upsample, False, device)
    out = resize_taps(valid, resized, align_corners, device).first(output)
    parts = []
    for taps in (up, out):
        low, high = taps.index.int().unbind(1)
        parts += [low, high, taps.weight[:, 1].contiguous().view(torch.int32)]
    low, high = out.index.T.contiguous()
    cell = torch.arange(valid + 1, device=device)
    parts += [torch.searchsorted(high, cell).int(), torch.searchsorted(low, cell).int()]
    return torch.cat(parts)


def _tile_reach(valid: int, resized: int, align_corners: bool, tile: int) -> int:
    """At most how many assembly cells `tile` neighbouring output positions read along an axis."""
    step = (valid - 1) / max(1, resized - 1) if align_corners else valid / resized
    return min(valid, math.ceil((tile - 1) * step) + 3)


@triton.jit(do_not_specialize=["N", *LENGTHS])
def _plan_kernel(
    windows_ptr,
    boxes_ptr,
    y_table_ptr,
    x_table_ptr,
    plan_ptr,
    image_windows_ptr,
    ends_ptr,
    N,
    y_cells,
    y_valid,
    y_output,
    x_cells,
    x_valid,
    x_output,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """The plan [12 + 3 ROWS + 3 COLUMNS, N] int32, one program.

    Rows 0 to 3: y0, y1, x0, x1 of the window in the image; 4 to 7: of the assembly window; 8 to 11: of the basis cells
    it reads. Then for each row of sub-regions, and after those for each column, the basis cells it reads (first, end)
    and the assembly cell where it ends.
    """
    tiles_before, words_before = no_ends()
    first = 0
    while first < N:
        n = first + tl.arange(0, BLOCK)
        live = n < N
        y0, y1 = _plan_axis(
            windows_ptr + 1,
            boxes_ptr,
            y_table_ptr,
            plan_ptr,
            0,
            12,
            n,
            live,
            N,
            y_cells,
            y_valid,
            y_output,
            ROWS,
            PROB,
            1,
        )
        x0, x1 = _plan_axis(
            windows_ptr,
            boxes_ptr,
            x_table_ptr,
            plan_ptr,
            2,
            12 + 3 * ROWS,
            n,
            live,
            N,
            x_cells,
            x_valid,
            x_output,
            COLUMNS,
            PROB,
            0,
        )
        tl.store(image_windows_ptr + n * 4, x0.to(tl.int64), mask=live)
        tl.store(image_windows_ptr + n * 4 + 1, y0.to(tl.int64), mask=live)
        tl.store(image_windows_ptr + n * 4 + 2, x1.to(tl.int64), mask=live)
        tl.store(image_windows_ptr + n * 4 + 3, y1.to(tl.int64), mask=live)
        tiles_before, words_before = store_ends(
            ends_ptr, n, live, y1 - y0, x1 - x0, tiles_before, words_before, N, TILE_ROWS, TILE_COLUMNS
        )
        first += BLOCK


@triton.jit
def _plan_axis(
    windows_ptr,
    boxes_ptr,
    table_ptr,
    plan_ptr,
    row,
    region_row,
    n,
    live,
    N,
    cells,
    valid,
    output,
    PARTS: tl.constexpr,
    PROB: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Writes one axis of the plan for windows `n`; their ends in the image."""
    out_ptr = table_ptr + 3 * cells
    reach_ptr = out_ptr + 3 * output
    start = tl.load(windows_ptr + n * 4, mask=live, other=0).to(tl.int32)
    stop = tl.load(windows_ptr + n * 4 + 2, mask=live, other=0).to(tl.int32)
    if PROB:
        stop = tl.minimum(stop, valid)
        image_start = tl.load(reach_ptr + tl.minimum(start, valid), mask=live, other=0)
        image_stop = tl.load(reach_ptr + valid + 1 + stop, mask=live, other=0)
        image_stop = tl.where(stop > start, tl.maximum(image_stop, image_start), image_start)
    else:
        image_start = tl.minimum(start, output)
        image_stop = tl.maximum(tl.minimum(stop, output), image_start)
        filled = live & (image_stop > image_start)
        start = tl.load(out_ptr + image_start, mask=filled, other=0)
        stop = tl.load(out_ptr + output + image_stop - 1, mask=filled, other=-1) + 1
    basis_start, basis_stop = _basis_cells(table_ptr, start, stop, live, cells)
    tl.store(plan_ptr + row * N + n, image_start, mask=live)
    tl.store(plan_ptr + (row + 1) * N + n, image_stop, mask=live)
    tl.store(plan_ptr + (row + 4) * N + n, start, mask=live)
    tl.store(plan_ptr + (row + 5) * N + n, stop, mask=live)
    tl.store(plan_ptr + (row + 8) * N + n, basis_start, mask=live)
    tl.store(plan_ptr + (row + 9) * N + n, basis_stop, mask=live)
    region_ptr = plan_ptr + region_row * N + n
    edge = start
    if PARTS > 1:
        low = tl.load(boxes_ptr + n * 4 + AXIS, mask=live, other=0.0).to(tl.float32)
        high = tl.load(boxes_ptr + n * 4 + AXIS + 2, mask=live, other=0.0).to(tl.float32)
        # As `region_splits`: double inside, and the border is one of three cells, each tested.
        width = (((high - low).to(tl.float64) + 0.1) / PARTS).to(tl.float32)
        part = 1
        while part < PARTS:
            guess = tl.ceil(low + part * width)
            guess = tl.minimum(tl.maximum(guess, -16777216.0), 16777216.0).to(tl.int32) - 1
            border = guess
            for step in tl.static_range(3):
                border += (tl.div_rn((guess + step).to(tl.float32) - low, width) < part * 1.0).to(tl.int32)
            border = tl.minimum(tl.maximum(border, start), tl.maximum(stop, start))
            _store_region(region_ptr, table_ptr, edge, border, live, N, cells)
            region_ptr += 3 * N
            edge = border
            part += 1
    _store_region(region_ptr, table_ptr, edge, tl.maximum(stop, start), live, N, cells)
    return image_start, image_stop


@triton.jit
def _store_region(region_ptr, table_ptr, start, stop, live, N, cells):
    """Writes one axis of a sub-region of assembly cells [start, stop)."""
    basis_start, basis_stop = _basis_cells(table_ptr, start, stop, live, cells)
    tl.store(region_ptr, basis_start, mask=live)
    tl.store(region_ptr + N, basis_stop, mask=live)
    tl.store(region_ptr + 2 * N, stop, mask=live)


@triton.jit
def _basis_cells(table_ptr, start, stop, live, cells):
    """The basis cells that assembly cells [start, stop) read."""
    filled = live & (stop > start)
    first = tl.load(table_ptr + start, mask=filled, other=0)
    last = tl.load(table_ptr + cells + stop - 1, mask=filled, other=-1)
    return first, last + 1


# Strides and depth stay: where they are multiples of 16 the basis is read in vectors.
@triton.jit(do_not_specialize=["N", "height", "width", "scratch_height", "scratch_width"])
def _dot_kernel(
    basis_ptr,
    coefficients_ptr,
    plan_ptr,
    scratch_ptr,
    N,
    D,
    height,
    width,
    stride_d,
    stride_y,
    stride_x,
    scratch_height,
    scratch_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Logits, or probabilities, of every detection at the basis cells that it reads; program (tile, which detections).

    Sub-region (r, c) writes its cells SHIFT * r rows and SHIFT * c columns further on, where no other one does.
    """
    tiles_across = tl.cdiv(width, TILE_COLUMNS)
    top = tl.program_id(0) // tiles_across * TILE_ROWS
    left = tl.program_id(0) % tiles_across * TILE_COLUMNS
    pixel = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    y = top + pixel // TILE_COLUMNS
    x = left + pixel % TILE_COLUMNS
    inside = (y < height) & (x < width)
    place = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    d = tl.arange(0, BLOCK_D)
    pointers = basis_ptr + d.to(tl.int64)[:, None] * stride_d + place[None, :]
    held = tl.load(pointers, mask=(d < D)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    regions = N * (ROWS * COLUMNS)
    first = 0
    while first < regions:
        lane = first + tl.arange(0, LANES)
        live = (lane < regions) & (lane % tl.num_programs(1) == tl.program_id(1))
        row_ptr, column_ptr = _region(plan_ptr, lane, N, ROWS, COLUMNS)
        live = _overlap(row_ptr, row_ptr + N, live, top, TILE_ROWS)
        live = _overlap(column_ptr, column_ptr + N, live, left, TILE_COLUMNS)
        waiting = tl.where(live, lane, regions)
        region = tl.min(waiting, 0)
        while region < regions:
            weights_ptr = coefficients_ptr + region.to(tl.int64) * D
            weights = tl.load(weights_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            value = tl.sum(held * weights[:, None], 0)
            if D_BLOCKS > 1:
                block = 1
                while block < D_BLOCKS:
                    far = d + block * BLOCK_D
                    far_ptr = basis_ptr + far.to(tl.int64)[:, None] * stride_d + place[None, :]
                    more = tl.load(far_ptr, mask=(far < D)[:, None] & inside[None, :], other=0.0).to(tl.float32)
                    weights = tl.load(weights_ptr + far, mask=far < D, other=0.0).to(tl.float32)
                    value += tl.sum(more * weights[:, None], 0)
                    block += 1
            if SIGMOID:
                value = tl.sigmoid(value)
            own_row_ptr, own_column_ptr = _region(plan_ptr, region, N, ROWS, COLUMNS)
            mine = (y >= tl.load(own_row_ptr)) & (y < tl.load(own_row_ptr + N))
            mine &= (x >= tl.load(own_column_ptr)) & (x < tl.load(own_column_ptr + N))
            line = (region // (ROWS * COLUMNS)).to(tl.int64) * scratch_height + y
            line += SHIFT * (region // COLUMNS % ROWS)
            tl.store(scratch_ptr + line * scratch_width + x + SHIFT * (region % COLUMNS), value, mask=mine)
            waiting = tl.where(waiting > region, waiting, regions)
            region = tl.min(waiting, 0)
        first += LANES


@triton.jit
def _region(plan_ptr, region, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the plan has the row and the column of a sub-region, counted over all detections."""
    n = region // (ROWS * COLUMNS)
    row_ptr = plan_ptr + (12 + 3 * (region // COLUMNS % ROWS)) * N + n
    return row_ptr, plan_ptr + (12 + 3 * ROWS + 3 * (region % COLUMNS)) * N + n


@triton.jit
def _overlap(start_ptr, stop_ptr, live, first, LENGTH: tl.constexpr):
    """Which of the ranges [start, stop) meet `LENGTH` positions from `first` on."""
    start = tl.load(start_ptr, mask=live, other=0)
    stop = tl.load(stop_ptr, mask=live, other=0)
    return live & (start < first + LENGTH) & (stop > first)


@triton.jit(do_not_specialize=["N", *LENGTHS, *EXTENTS])
def _tile_kernel(
    scratch_ptr,
    private_ptr,
    plan_ptr,
    ends_ptr,
    y_table_ptr,
    x_table_ptr,
    words_ptr,
    soft_ptr,
    column_maxima_ptr,
    row_maxima_ptr,
    threshold,
    N,
    y_cells,
    y_valid,
    y_output,
    x_cells,
    x_valid,
    x_output,
    scratch_height,
    scratch_width,
    private_size,
    image_height,
    image_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    UPSAMPLED: tl.constexpr,
    PROB: tl.constexpr,
    LANES: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Tiles of the output, inside windows only: resize, then compare and pack, or store, or take maxima."""
    tile_ends = tile_ends_of(ends_ptr, N, LANES)
    total = tl.load(ends_ptr + N - 1)
    tile = tl.program_id(0).to(tl.int64)
    while tile < total:
        n, local = owner_of_tile(tile_ends, tile)
        image_y0 = tl.load(plan_ptr + n)
        image_y1 = tl.load(plan_ptr + N + n)
        image_x0 = tl.load(plan_ptr + 2 * N + n)
        image_x1 = tl.load(plan_ptr + 3 * N + n)
        y0 = tl.load(plan_ptr + 4 * N + n)
        y1 = tl.load(plan_ptr + 5 * N + n)
        x0 = tl.load(plan_ptr + 6 * N + n)
        x1 = tl.load(plan_ptr + 7 * N + n)
        words_per_column = tl.cdiv(image_y1 - image_y0, TILE_ROWS)
        word = local % words_per_column
        top = image_y0 + word * TILE_ROWS
        left = image_x0 + local // words_per_column * TILE_COLUMNS
        y = top + tl.arange(0, TILE_ROWS)
        x = left + tl.arange(0, TILE_COLUMNS)
        live_y = y < image_y1
        live_x = x < image_x1
        y_low, y_high, y_weight = _taps(y_table_ptr + 3 * y_cells, y, live_y, y_output)
        x_low, x_high, x_weight = _taps(x_table_ptr + 3 * x_cells, x, live_x, x_output)
        source_ptr = scratch_ptr + n.to(tl.int64) * scratch_height * scratch_width
        # Cells outside the window count as zero: they are not read.
        reads_y_low = live_y & (y_low >= y0) & (y_low < y1)
        reads_y_high = live_y & (y_high >= y0) & (y_high < y1)
        reads_x_low = live_x & (x_low >= x0) & (x_low < x1)
        reads_x_high = live_x & (x_high >= x0) & (x_high < x1)
        line = scratch_width
        if UPSAMPLED:
            own_ptr = private_ptr + tl.program_id(0).to(tl.int64) * private_size
            cell_y = tl.load(y_table_ptr + 3 * y_cells + top)
            cell_x = tl.load(x_table_ptr + 3 * x_cells + left)
            last_y = tl.load(y_table_ptr + 3 * y_cells + y_output + tl.minimum(top + TILE_ROWS, image_y1) - 1)
            last_x = tl.load(x_table_ptr + 3 * x_cells + x_output + tl.minimum(left + TILE_COLUMNS, image_x1) - 1)
            line = last_x - cell_x + 1
            cells = (last_y - cell_y + 1) * line
            first = 0
            while first < cells:
                cell = first + tl.arange(0, CELLS)
                a = cell_y + cell // line
                b = cell_x + cell % line
                mine = (cell < cells) & (a >= y0) & (a < y1) & (b >= x0) & (b < x1)
                a_low, a_high, a_weight = _taps(y_table_ptr, a, mine, y_cells)
                b_low, b_high, b_weight = _taps(x_table_ptr, b, mine, x_cells)
                for part in tl.static_range(ROWS - 1):
                    beyond = (a >= tl.load(plan_ptr + (12 + 3 * part + 2) * N + n)).to(tl.int32) * SHIFT
                    a_low += beyond
                    a_high += beyond
                for part in tl.static_range(COLUMNS - 1):
                    beyond = (b >= tl.load(plan_ptr + (12 + 3 * ROWS + 3 * part + 2) * N + n)).to(tl.int32) * SHIFT
                    b_low += beyond
                    b_high += beyond
                low = _between(source_ptr, a_low, a_high, a_weight, b_low, scratch_width, mine, mine)
                high = _between(source_ptr, a_low, a_high, a_weight, b_high, scratch_width, mine, mine)
                value = (1.0 - b_weight) * low + b_weight * high
                if PROB:
                    value = tl.sigmoid(value)
                tl.store(own_ptr + cell, value, mask=mine)
                first += CELLS
            tl.debug_barrier()
            source_ptr = own_ptr
            y_low -= cell_y
            y_high -= cell_y
            x_low -= cell_x
            x_high -= cell_x
        low = _between(
            source_ptr,
            y_low[:, None],
            y_high[:, None],
            y_weight[:, None],
            x_low[None, :],
            line,
            reads_y_low[:, None] & reads_x_low[None, :],
            reads_y_high[:, None] & reads_x_low[None, :],
        )
        high = _between(
            source_ptr,
            y_low[:, None],
            y_high[:, None],
            y_weight[:, None],
            x_high[None, :],
            line,
            reads_y_low[:, None] & reads_x_high[None, :],
            reads_y_high[:, None] & reads_x_high[None, :],
        )
        value = (1.0 - x_weight)[None, :] * low + x_weight[None, :] * high
        live = live_y[:, None] & live_x[None, :]
        if column_maxima_ptr is not None:
            held = tl.where(live, value, float("-inf"))
            columns_ptr = column_maxima_ptr + n.to(tl.int64) * image_width
            rows_ptr = row_maxima_ptr + n.to(tl.int64) * image_height
            tl.atomic_max(columns_ptr + x, tl.max(held, 0), mask=live_x, sem="relaxed")
            tl.atomic_max(rows_ptr + y, tl.max(held, 1), mask=live_y, sem="relaxed")
        if soft_ptr is not None:
            lines = n.to(tl.int64) * image_height + y
            tl.store(soft_ptr + lines[:, None] * image_width + x[None, :], value, mask=live)
        if words_ptr is not None:
            words_end = tl.load(ends_ptr + N + n)
            words_start = words_end - (image_x1 - image_x0).to(tl.int64) * words_per_column
            store_words(
                words_ptr + words_start, (value > threshold) & live, x - image_x0, live_x, words_per_column, word
            )
        if UPSAMPLED:
            tl.debug_barrier()  # the next tile writes where this one reads
        tile += tl.num_programs(0)


@triton.jit
def _taps(table_ptr, position, live, length):
    """The two cells that positions of an axis read, and the weight of the second."""
    low = tl.load(table_ptr + position, mask=live, other=0)
    high = tl.load(table_ptr + length + position, mask=live, other=0)
    weight = tl.load(table_ptr + 2 * length + position, mask=live, other=0).to(tl.float32, bitcast=True)
    return low, high, weight


@triton.jit
def _between(source_ptr, y_low, y_high, y_weight, x, line, reads_low, reads_high):
    """Values between two rows."""
    low = tl.load(source_ptr + (y_low * line + x), mask=reads_low, other=0.0)
    high = tl.load(source_ptr + (y_high * line + x), mask=reads_high, other=0.0)
    return (1.0 - y_weight) * low + y_weight * high


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles: the orders, inputs and outputs that the methods use."""
    lengths = dict.fromkeys(LENGTHS, "i32")
    tiles = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS}
    cases = []
    for name, parts, prob in (("prob", 1, True), ("prob, sub-regions", 2, True), ("logits", 1, False)):
        plan: dict[str, Any] = {
            "windows_ptr": "*i64",
            "boxes_ptr": "*fp32" if parts > 1 else None,
            "y_table_ptr": "*i32",
            "x_table_ptr": "*i32",
            "plan_ptr": "*i32",
            "image_windows_ptr": "*i64",
            "ends_ptr": "*i64",
            "N": "i32",
            **lengths,
            "ROWS": parts,
            "COLUMNS": parts,
            "PROB": prob,
            "BLOCK": PLAN_BLOCK,
            **tiles,
        }
        cases.append(KernelCase(name, _plan_kernel, plan))
    for name, dtype, parts, shift, blocks in (
        ("32 channels", "*fp32", 1, 0, 1),
        ("32 channels, bf16", "*bf16", 1, 0, 1),
        ("32 channels, sub-regions", "*fp32", 2, 2, 1),
        ("128 channels", "*fp32", 1, 2, 8),
    ):
        dot: dict[str, Any] = {
            "basis_ptr": dtype,
            "coefficients_ptr": dtype,
            "plan_ptr": "*i32",
            "scratch_ptr": "*fp32",
            **dict.fromkeys(("N", "D", "height", "width", "stride_d", "stride_y"), "i32"),
            "stride_x": 1,
            **dict.fromkeys(("scratch_height", "scratch_width"), "i32"),
            "ROWS": parts,
            "COLUMNS": parts,
            "SHIFT": shift,
            "SIGMOID": shift == 0,
            "BLOCK_D": 32 if blocks == 1 else 16,
            "D_BLOCKS": blocks,
            "LANES": LANES,
            "TILE_ROWS": BASIS_ROWS,
            "TILE_COLUMNS": BASIS_COLUMNS,
        }
        cases.append(KernelCase(name, _dot_kernel, dot))
    for name, output, parts, shift, prob, lanes in (
        ("prob", "words", 1, 0, True, 128),
        ("prob, 1024 windows", "words", 1, 0, True, 1024),
        ("prob, upsampled", "words", 1, 2, True, 128),
        ("prob, sub-regions", "words", 2, 2, True, 128),
        ("prob, soft", "soft", 2, 2, True, 128),
        ("logits", "words", 1, 0, False, 128),
        ("logits, upsampled", "words", 1, 2, False, 128),
        ("logits, bits and maxima", "maxima", 1, 2, False, 128),
    ):
        tile: dict[str, Any] = {
            "scratch_ptr": "*fp32",
            "private_ptr": "*fp32" if shift else None,
            "plan_ptr": "*i32",
            "ends_ptr": "*i64",
            "y_table_ptr": "*i32",
            "x_table_ptr": "*i32",
            "words_ptr": None if output == "soft" else "*i32",
            "soft_ptr": "*fp32" if output == "soft" else None,
            "column_maxima_ptr": "*fp32" if output == "maxima" else None,
            "row_maxima_ptr": "*fp32" if output == "maxima" else None,
            "threshold": "fp32",
            "N": "i32",
            **lengths,
            **dict.fromkeys(EXTENTS, "i32"),
            "ROWS": parts,
            "COLUMNS": parts,
            "SHIFT": shift,
            "UPSAMPLED": shift > 0,
            "PROB": prob,
            "LANES": lanes,
            "CELLS": CELLS,
            **tiles,
        }
        cases.append(KernelCase(name, _tile_kernel, tile, TILE_WARPS))
    return cases
