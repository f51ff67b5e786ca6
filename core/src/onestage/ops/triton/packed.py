"""Kernel that writes packed window masks out at image size: zeros at the rate of memory, then the windows' pixels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import (
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WARPS,
    on_its_gpu,
    plan_windows,
    tile_in_window,
    tile_programs,
)


@on_its_gpu
def dense_masks_triton(windows: Tensor, words: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernel of `dense_masks`, with its arguments and its result."""
    dense = torch.zeros(len(windows), *size, dtype=torch.bool, device=words.device)
    if dense.numel() > 0:
        _dense_kernel[(tile_programs(words.device, len(windows), size),)](
            windows.contiguous(),
            words.contiguous(),
            plan_windows(windows),
            dense,
            len(windows),
            *size,
            TILE_ROWS,
            TILE_COLUMNS,
            num_warps=TILE_WARPS,
        )
    return dense


@triton.jit(do_not_specialize=["N", "height", "width"])
def _dense_kernel(
    windows_ptr, words_ptr, ends_ptr, dense_ptr, N, height, width, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Tiles of the windows: a word of each column, row by row."""
    total = tl.load(ends_ptr + N - 1)
    tile = tl.program_id(0).to(tl.int64)
    while tile < total:
        n, x0, y0, x1, y1, words_per_column, word, first_column = tile_in_window(
            windows_ptr, ends_ptr, N, tile, TILE_ROWS, TILE_COLUMNS
        )
        column = first_column + tl.arange(0, TILE_COLUMNS)
        live = column < x1 - x0
        words_start = tl.load(ends_ptr + N + n) - (x1 - x0).to(tl.int64) * words_per_column
        packed = tl.load(words_ptr + words_start + column.to(tl.int64) * words_per_column + word, mask=live, other=0)
        y = y0 + word * TILE_ROWS
        pixels_ptr = dense_ptr + (n.to(tl.int64) * height + y) * width + x0 + column
        end = tl.minimum(y + TILE_ROWS, y1)
        while y < end:
            tl.store(pixels_ptr, (packed & 1) != 0, mask=live)
            pixels_ptr += width
            packed = packed >> 1
            y += 1
        tile += tl.num_programs(0)


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles."""
    arguments: dict[str, Any] = {
        "windows_ptr": "*i64",
        "words_ptr": "*i32",
        "ends_ptr": "*i64",
        "dense_ptr": "*i1",
        "N": "i32",
        "height": "i32",
        "width": "i32",
        "TILE_ROWS": TILE_ROWS,
        "TILE_COLUMNS": TILE_COLUMNS,
    }
    return [KernelCase("dense", _dense_kernel, arguments, TILE_WARPS)]
