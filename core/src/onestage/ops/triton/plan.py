"""Which tiles and which packed words belong to which window: the plan that every ragged kernel starts from.

The sizes of N windows are known on the device only. So a kernel is launched with a fixed number of programs, and each
walks over the tiles of all windows: tile t belongs to the first window whose tiles end beyond t. Outputs have the size
of the worst case, every window as large as the image, and only what belongs to a window is written: packed words cost
an eighth of a byte for each pixel of N images (13 MB for 100 masks of 800 x 1333), whatever the windows are.

A program of tiles is one warp. Each of its lanes has a column of the tile and goes down its 32 rows: what a column
reads is found once, lines of the source that several rows read are read once, a word is packed in one register, and
no lane waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.dispatch import is_interpreted
from onestage.ops.triton.check import KernelCase

TILE_ROWS = 32  # a packed word holds 32 pixels of a column
TILE_COLUMNS = 32  # a lane each
TILE_WARPS = 1
TILE_PROGRAMS_PER_SM = 32  # as many as fit
PLAN_BLOCK = 128  # windows that the planning program takes at a time

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_its_gpu(launch: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Makes the GPU of the first argument the current one: that is where Triton launches, wherever tensors lie."""

    @wraps(launch)
    def guarded(first: Tensor, /, *rest: Rest.args, **how: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return launch(first, *rest, **how)

    return guarded


def plan_windows(windows: Tensor) -> Tensor:
    """Where the tiles and words of each window end.

    Args:
        windows: [N, 4] int64 x0, y0, x1, y1, half-open, pixels.

    Returns:
        [2, N] int64: ends of the tiles and ends of the packed words, counted over all windows.
    """
    ends = torch.empty(2, len(windows), dtype=torch.int64, device=windows.device)
    if len(windows) > 0:
        _windows_kernel[(1,)](windows.contiguous(), ends, len(windows), PLAN_BLOCK, TILE_ROWS, TILE_COLUMNS)
    return ends


def num_programs(device: torch.device, bound: int, per_sm: int) -> int:
    """How many persistent programs to launch for at most `bound` pieces of work, so many a multiprocessor."""
    if is_interpreted():
        return min(bound, 3)  # few: a program is slow, and loops that go round are what tests are for
    return min(bound, per_sm * torch.cuda.get_device_properties(device).multi_processor_count)


def tile_programs(device: torch.device, count: int, size: tuple[int, int]) -> int:
    """How many programs go through the tiles of at most `count` windows as large as the image."""
    tiles = count * triton.cdiv(size[0], TILE_ROWS) * triton.cdiv(size[1], TILE_COLUMNS)
    return num_programs(device, tiles, TILE_PROGRAMS_PER_SM)


@triton.jit(do_not_specialize=["N"])
def _windows_kernel(windows_ptr, ends_ptr, N, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    tiles_before, words_before = no_ends()
    first = 0
    while first < N:
        n = first + tl.arange(0, BLOCK)
        live = n < N
        x0 = tl.load(windows_ptr + n * 4, mask=live, other=0)
        y0 = tl.load(windows_ptr + n * 4 + 1, mask=live, other=0)
        x1 = tl.load(windows_ptr + n * 4 + 2, mask=live, other=0)
        y1 = tl.load(windows_ptr + n * 4 + 3, mask=live, other=0)
        tiles_before, words_before = store_ends(
            ends_ptr, n, live, y1 - y0, x1 - x0, tiles_before, words_before, N, TILE_ROWS, TILE_COLUMNS
        )
        first += BLOCK


@triton.jit
def no_ends():
    """The tiles and words before the first window."""
    return tl.zeros((), tl.int64), tl.zeros((), tl.int64)


@triton.jit
def store_ends(
    ends_ptr, n, live, height, width, tiles_before, words_before, N, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Writes the ends of a block of windows; the tiles and words up to and with this block."""
    words_per_column = (height.to(tl.int64) + TILE_ROWS - 1) // TILE_ROWS
    tiles = words_per_column * ((width.to(tl.int64) + TILE_COLUMNS - 1) // TILE_COLUMNS)
    words = words_per_column * width
    tl.store(ends_ptr + n, tiles_before + tl.cumsum(tiles, 0), mask=live)
    tl.store(ends_ptr + N + n, words_before + tl.cumsum(words, 0), mask=live)
    return tiles_before + tl.sum(tiles, 0), words_before + tl.sum(words, 0)


@triton.jit
def window_of_tile(ends_ptr, N, tile):
    """The window that `tile` belongs to, and the number of the tile in it."""
    n = 0
    last = N - 1
    while n < last:  # the first window whose tiles end beyond this one
        middle = (n + last) // 2
        beyond = tl.load(ends_ptr + middle) > tile
        last = tl.where(beyond, middle, last)
        n = tl.where(beyond, n, middle + 1)
    before = tl.load(ends_ptr + n - 1, mask=n > 0, other=0)
    return n, (tile - before).to(tl.int32)


@triton.jit
def tile_in_window(windows_ptr, ends_ptr, N, tile, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The window that `tile` belongs to, where it lies, its words in a column, and the tile's word and first column."""
    n, local = window_of_tile(ends_ptr, N, tile)
    x0 = tl.load(windows_ptr + n * 4).to(tl.int32)
    y0 = tl.load(windows_ptr + n * 4 + 1).to(tl.int32)
    x1 = tl.load(windows_ptr + n * 4 + 2).to(tl.int32)
    y1 = tl.load(windows_ptr + n * 4 + 3).to(tl.int32)
    words_per_column = tl.cdiv(y1 - y0, TILE_ROWS)
    return n, x0, y0, x1, y1, words_per_column, local % words_per_column, local // words_per_column * TILE_COLUMNS


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles."""
    arguments = {
        "windows_ptr": "*i64",
        "ends_ptr": "*i64",
        "N": "i32",
        "BLOCK": PLAN_BLOCK,
        "TILE_ROWS": TILE_ROWS,
        "TILE_COLUMNS": TILE_COLUMNS,
    }
    return [KernelCase("windows", _windows_kernel, arguments)]
