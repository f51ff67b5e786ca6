"""Kernels of mask assembly: plan, dot products on the basis grid, tiles of the output. Three launches.

The dot products are shared the other way round than the formula reads: a program holds a tile of the basis and goes
through the detections that overlap it, so the basis is read once or a few times, not once a detection. Their results
lie in a scratch of N basis grids, of which only windows are touched: it costs 4 N h w bytes (27 MB for 100 detections
on a 200 x 336 basis). The tiles then read it line by line. Two linear resizes in a row are one, of three cells an axis;
where a sigmoid is between them, each column makes a line of assembly cells at a time, once for all rows that read it.
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
    TILE_WARPS,
    no_ends,
    num_programs,
    on_its_gpu,
    store_ends,
    tile_programs,
    window_of_tile,
)

BASIS_ROWS, BASIS_COLUMNS = 8, 16  # basis cells of a program of the dot products
LANES = 128  # sub-regions that it looks at together
MAX_SPLITS = 8  # of the detections, where the basis has too few tiles for the GPU
DOT_PROGRAMS_PER_SM = 4
FUSE_CROP = False  # sides land on whole numbers, and round as the twin's
FIXED_ROWS = 12  # of the plan, before those of the sub-regions; the order of `_plan_kernel`
LENGTHS = ("y_cells", "y_valid", "y_output", "x_cells", "x_valid", "x_output")  # of the axes
EXTENTS = ("scratch_height", "scratch_width", "image_height", "image_width")  # of memory


@on_its_gpu
def crop_window_triton(boxes: Tensor, extent: Size, rule: str, padding: float) -> Tensor:
    """Kernel of `crop_window`, with its arguments and its result; boxes are float32."""
    windows = torch.empty(len(boxes), 4, dtype=torch.int64, device=boxes.device)
    if len(boxes) > 0:
        _crop_kernel[(triton.cdiv(len(boxes), PLAN_BLOCK),)](
            boxes.contiguous(),
            windows,
            padding,
            len(boxes),
            *extent,
            rule != "half_open",
            rule == "margin",
            PLAN_BLOCK,
            enable_fp_fusion=FUSE_CROP,
        )
    return windows


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
    tables, lengths = [], []
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
    splits = max(1, min(MAX_SPLITS, count, num_programs(device, 1 << 20, DOT_PROGRAMS_PER_SM) // num_tiles))
    _dot_kernel[(num_tiles, splits)](
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
    _tile_kernel[(tile_programs(device, count, output_size),)](
        scratch,
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
        *output_size,
        rows,
        columns,
        shift,
        prob and upsample > 1,
        2 if upsample == 1 else 3,  # cells of an axis that a position reads
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
        a float32); of each output position its two assembly cells and the weight of the second; of each output
        position the first basis cell of both resizes and the weights of three; for each assembly cell up to and with
        `valid` the first output position that reads it or a later one, and the first that reads only those.
    """
    up = resize_taps(source, source * upsample, False, device)
    out = resize_taps(valid, resized, align_corners, device).first(output)
    parts = []
    for taps in (up, out):
        low, high = taps.index.int().unbind(1)
        parts += [low, high, taps.weight[:, 1].contiguous().view(torch.int32)]
    inside = out.index < len(up.index)  # what is valid may be more than there is
    reads = out.index.where(inside, len(up.index) - 1)
    cells = up.index[reads].flatten(1)  # four a position, of which three may differ
    first = cells.amin(1, keepdim=True)
    products = ((out.weight * inside).double()[:, :, None] * up.weight[reads].double()).flatten(1)
    weights = products.new_zeros(len(cells), 3).scatter_add_(1, cells - first, products).float()
    parts.append(torch.cat((first.int(), weights.view(torch.int32)), 1).flatten())
    low, high = out.index.T.contiguous()
    cell = torch.arange(valid + 1, device=device)
    parts += [torch.searchsorted(high, cell).int(), torch.searchsorted(low, cell).int()]
    return torch.cat(parts)


@triton.jit(do_not_specialize=["N", "height", "width"])
def _crop_kernel(
    boxes_ptr,
    windows_ptr,
    padding,
    N,
    height,
    width,
    SORTED: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The windows of a block of boxes: half open, with a margin, or else expanded."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _crop_axis(boxes_ptr + n * 4, windows_ptr + n * 4, padding, n < N, width, SORTED, MARGIN)
    _crop_axis(boxes_ptr + n * 4 + 1, windows_ptr + n * 4 + 1, padding, n < N, height, SORTED, MARGIN)


@triton.jit
def _crop_axis(box_ptr, window_ptr, padding, live, extent, SORTED: tl.constexpr, MARGIN: tl.constexpr):
    """Writes one axis of windows: `width` or `height` is its `extent`."""
    low = tl.load(box_ptr, mask=live, other=0.0)
    high = tl.load(box_ptr + 2, mask=live, other=0.0)
    low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, 0.0)  # NaN stays inside
    if not SORTED:
        start, stop = tl.ceil(low), tl.ceil(high)
    else:
        low, high = tl.minimum(low, high), tl.maximum(low, high)
        if MARGIN:
            start, stop = tl.ceil(low - 1.0), tl.ceil(high + 1.0)
        else:
            pad = tl.where(padding > 0, tl.maximum(padding * (high - low + 1.0), 1.0), 0.0)
            # Towards zero; what is below it is cut off.
            start, stop = tl.floor(tl.maximum(low - pad, 0.0)), tl.floor(tl.maximum(high + pad, 0.0))
    limit = extent * 1.0
    start = tl.minimum(tl.maximum(start, 0.0), limit)
    stop = tl.maximum(tl.minimum(stop, limit), start)
    tl.store(window_ptr, start.to(tl.int64), mask=live)
    tl.store(window_ptr + 2, stop.to(tl.int64), mask=live)


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
    reach_ptr = out_ptr + 7 * output
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
    image_height,
    image_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    STAGED: tl.constexpr,
    TAPS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Tiles of the output, inside windows only: resize, then compare and pack, or store, or take maxima.

    A line is what the columns of the tile take of a row of assembly cells (STAGED) or of basis cells.
    """
    total = tl.load(ends_ptr + N - 1)
    tile = tl.program_id(0).to(tl.int64)
    while tile < total:
        n, local = window_of_tile(ends_ptr, N, tile)
        image_y0 = tl.load(plan_ptr + n)
        image_y1 = tl.load(plan_ptr + N + n)
        image_x0 = tl.load(plan_ptr + 2 * N + n)
        image_x1 = tl.load(plan_ptr + 3 * N + n)
        words_per_column = tl.cdiv(image_y1 - image_y0, TILE_ROWS)
        word = local % words_per_column
        top = image_y0 + word * TILE_ROWS
        x = image_x0 + local // words_per_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        live = x < image_x1
        source_ptr = scratch_ptr + n.to(tl.int64) * scratch_height * scratch_width
        # Cells outside the window count as zero: they are not read.
        if STAGED:
            y0 = tl.load(plan_ptr + 4 * N + n)
            y1 = tl.load(plan_ptr + 5 * N + n)
            x0 = tl.load(plan_ptr + 6 * N + n)
            x1 = tl.load(plan_ptr + 7 * N + n)
            y_taps_ptr = y_table_ptr + 3 * y_cells
            low, high, weight = _taps(x_table_ptr + 3 * x_cells, x, live, x_output)
            reads_low = live & (low >= x0) & (low < x1)
            reads_high = live & (high >= x0) & (high < x1)
            x_plan_ptr = plan_ptr + (12 + 3 * ROWS) * N + n
            low_0, low_1, low_weight = _cell(x_table_ptr, x_plan_ptr, low, reads_low, x_cells, N, COLUMNS, SHIFT)
            high_0, high_1, high_weight = _cell(x_table_ptr, x_plan_ptr, high, reads_high, x_cells, N, COLUMNS, SHIFT)
            read = tl.load(y_taps_ptr + top) - 1  # the last line that was read
            held = -1  # which two lines of the scratch these four are of
            low_above = tl.zeros((TILE_COLUMNS,), tl.float32)
            low_below = tl.zeros((TILE_COLUMNS,), tl.float32)
            high_above = tl.zeros((TILE_COLUMNS,), tl.float32)
            high_below = tl.zeros((TILE_COLUMNS,), tl.float32)
        else:
            y0 = tl.load(plan_ptr + 8 * N + n)
            y1 = tl.load(plan_ptr + 9 * N + n)
            x0 = tl.load(plan_ptr + 10 * N + n)
            x1 = tl.load(plan_ptr + 11 * N + n)
            y_taps_ptr = y_table_ptr + 3 * (y_cells + y_output)
            x_taps_ptr = x_table_ptr + 3 * (x_cells + x_output) + 4 * x
            column = tl.load(x_taps_ptr, mask=live, other=0)
            reads_0, weight_0 = _tap(x_taps_ptr, column, 0, live, x0, x1)
            reads_1, weight_1 = _tap(x_taps_ptr, column, 1, live, x0, x1)
            reads_2, weight_2 = _tap(x_taps_ptr, column, 2, live, x0, x1)
            read = tl.load(y_taps_ptr + 4 * top) - 1
        line_0 = tl.zeros((TILE_COLUMNS,), tl.float32)
        line_1 = tl.zeros((TILE_COLUMNS,), tl.float32)
        line_2 = tl.zeros((TILE_COLUMNS,), tl.float32)
        packed = tl.zeros((TILE_COLUMNS,), tl.int32)
        largest = tl.full((TILE_COLUMNS,), float("-inf"), tl.float32)
        y = top
        while y < tl.minimum(top + TILE_ROWS, image_y1):
            if STAGED:
                first = tl.load(y_taps_ptr + y)
                y_weight = tl.load(y_taps_ptr + 2 * y_output + y).to(tl.float32, bitcast=True)
                while read <= first:
                    read += 1
                    line_0 = line_1
                    line_1 = tl.zeros((TILE_COLUMNS,), tl.float32)
                    cell = tl.minimum(read, y_valid - 1)
                    if (cell >= y0) & (cell < y1):
                        above, below, between = _cell(
                            y_table_ptr, plan_ptr + 12 * N + n, cell, True, y_cells, N, ROWS, SHIFT
                        )
                        if above + below != held:
                            held = above + below
                            above_ptr = source_ptr + above * scratch_width
                            below_ptr = source_ptr + below * scratch_width
                            low_above = _between(above_ptr, low_0, low_1, low_weight, reads_low)
                            low_below = _between(below_ptr, low_0, low_1, low_weight, reads_low)
                            high_above = _between(above_ptr, high_0, high_1, high_weight, reads_high)
                            high_below = _between(below_ptr, high_0, high_1, high_weight, reads_high)
                        at_low = tl.sigmoid((1.0 - between) * low_above + between * low_below)
                        at_high = tl.sigmoid((1.0 - between) * high_above + between * high_below)
                        line_1 = (1.0 - weight) * tl.where(reads_low, at_low, 0.0)
                        line_1 += weight * tl.where(reads_high, at_high, 0.0)
                value = (1.0 - y_weight) * line_0 + y_weight * line_1
            else:
                first = tl.load(y_taps_ptr + 4 * y)
                of_0 = _weight(y_taps_ptr + 4 * y, 0)
                of_1 = _weight(y_taps_ptr + 4 * y, TAPS - 2)
                of_2 = _weight(y_taps_ptr + 4 * y, TAPS - 1)
                while read < first + (TAPS - 1):
                    read += 1
                    inside = (read >= y0) & (read < y1)
                    cells_ptr = source_ptr + read * scratch_width + column
                    line_0 = line_1
                    line_1 = line_2
                    line_2 = weight_0 * tl.load(cells_ptr, mask=reads_0 & inside, other=0.0)
                    line_2 += weight_1 * tl.load(cells_ptr + 1, mask=reads_1 & inside, other=0.0)
                    if TAPS == 3:
                        line_2 += weight_2 * tl.load(cells_ptr + 2, mask=reads_2 & inside, other=0.0)
                value = of_1 * line_1 + of_2 * line_2
                if TAPS == 3:
                    value += of_0 * line_0
            packed |= (value > threshold).to(tl.int32) << (y - top)
            if column_maxima_ptr is not None:
                value = tl.where(live, value, float("-inf"))
                largest = tl.maximum(largest, value)
                tl.atomic_max(row_maxima_ptr + n.to(tl.int64) * image_height + y, tl.max(value, 0), sem="relaxed")
            if soft_ptr is not None:
                tl.store(soft_ptr + (n.to(tl.int64) * image_height + y) * image_width + x, value, mask=live)
            y += 1
        if column_maxima_ptr is not None:
            tl.atomic_max(column_maxima_ptr + n.to(tl.int64) * image_width + x, largest, mask=live, sem="relaxed")
        if words_ptr is not None:
            words_start = tl.load(ends_ptr + N + n) - (image_x1 - image_x0).to(tl.int64) * words_per_column
            place = words_start + (x - image_x0).to(tl.int64) * words_per_column + word
            tl.store(words_ptr + place, packed, mask=live)
        tile += tl.num_programs(0)


@triton.jit
def _taps(table_ptr, position, live, length):
    """The two cells that positions of an axis read, and the weight of the second."""
    low = tl.load(table_ptr + position, mask=live, other=0)
    high = tl.load(table_ptr + length + position, mask=live, other=0)
    weight = tl.load(table_ptr + 2 * length + position, mask=live, other=0).to(tl.float32, bitcast=True)
    return low, high, weight


@triton.jit
def _cell(table_ptr, region_ptr, cell, live, cells, N, PARTS: tl.constexpr, SHIFT: tl.constexpr):
    """Where the scratch has the two basis cells that assembly cells of an axis read, and the weight of the second."""
    low, high, weight = _taps(table_ptr, cell, live, cells)
    for part in tl.static_range(PARTS - 1):
        beyond = (cell >= tl.load(region_ptr + (3 * part + 2) * N)).to(tl.int32) * SHIFT
        low += beyond
        high += beyond
    return low, high, weight


@triton.jit
def _between(line_ptr, low, high, weight, live):
    """Values between two cells of a line of the scratch."""
    at_low = tl.load(line_ptr + low, mask=live, other=0.0)
    return (1.0 - weight) * at_low + weight * tl.load(line_ptr + high, mask=live, other=0.0)


@triton.jit
def _tap(taps_ptr, column, STEP: tl.constexpr, live, x0, x1):
    """Whether columns read the cell `STEP` behind their first, and its weight."""
    reads = live & (column + STEP >= x0) & (column + STEP < x1)
    return reads, tl.load(taps_ptr + 1 + STEP, mask=reads, other=0).to(tl.float32, bitcast=True)


@triton.jit
def _weight(taps_ptr, STEP: tl.constexpr):
    """The weight of the cell `STEP` behind the first."""
    return tl.load(taps_ptr + 1 + STEP).to(tl.float32, bitcast=True)


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles: the orders, inputs and outputs that the methods use."""
    lengths = dict.fromkeys(LENGTHS, "i32")
    tiles = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS}
    crop: dict[str, Any] = {"boxes_ptr": "*fp32", "windows_ptr": "*i64", "padding": "fp32"}
    crop |= dict.fromkeys(("N", "height", "width"), "i32") | {"SORTED": True, "MARGIN": False, "BLOCK": PLAN_BLOCK}
    cases = [KernelCase("expand", _crop_kernel, crop, fp_fusion=FUSE_CROP)]
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
    for name, output, parts, upsampled, prob in (
        ("prob", "words", 1, False, True),
        ("prob, upsampled", "words", 1, True, True),
        ("prob, sub-regions", "words", 2, True, True),
        ("prob, soft", "soft", 2, True, True),
        ("logits", "words", 1, False, False),
        ("logits, upsampled", "words", 1, True, False),
        ("logits, bits and maxima", "maxima", 1, True, False),
    ):
        tile: dict[str, Any] = {
            "scratch_ptr": "*fp32",
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
            "SHIFT": 2 if upsampled else 0,
            "STAGED": upsampled and prob,
            "TAPS": 3 if upsampled else 2,
            **tiles,
        }
        cases.append(KernelCase(name, _tile_kernel, tile, TILE_WARPS))
    return cases
