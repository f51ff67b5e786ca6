"""Kernel that writes packed window masks out at image size: every byte of the result once, zeros included."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import on_its_gpu, plan_windows

ROWS, COLUMNS = 32, 128  # pixels of a program
NUM_WARPS = 8


@on_its_gpu
def dense_masks_triton(windows: Tensor, words: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernel of `dense_masks`, with its arguments and its result."""
    dense = torch.empty(len(windows), *size, dtype=torch.bool, device=words.device)
    if dense.numel() > 0:
        grid = (triton.cdiv(size[1], COLUMNS), triton.cdiv(size[0], ROWS), len(windows))
        ends = plan_windows(windows)
        _dense_kernel[grid](
            windows.contiguous(),
            words.contiguous(),
            ends,
            dense,
            len(windows),
            *size,
            ROWS,
            COLUMNS,
            num_warps=NUM_WARPS,
        )
    return dense


# The width stays: where it is a multiple of 16 rows are written in vectors.
@triton.jit(do_not_specialize=["N", "height"])
def _dense_kernel(
    windows_ptr, words_ptr, ends_ptr, dense_ptr, N, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A piece of ROWS x COLUMNS pixels of one mask."""
    n = tl.program_id(2)
    x0 = tl.load(windows_ptr + n * 4).to(tl.int32)
    y0 = tl.load(windows_ptr + n * 4 + 1).to(tl.int32)
    x1 = tl.load(windows_ptr + n * 4 + 2).to(tl.int32)
    y1 = tl.load(windows_ptr + n * 4 + 3).to(tl.int32)
    words_per_column = tl.cdiv(y1 - y0, 32)
    words_start = tl.load(ends_ptr + N + n) - (x1 - x0).to(tl.int64) * words_per_column
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
    place = (x - x0)[None, :] * words_per_column + ((y - y0) // 32)[:, None]
    word = tl.load(words_ptr + words_start + place, mask=inside, other=0)
    bit = (word >> ((y - y0) & 31)[:, None]) & 1  # `%` is negative above the window
    lines = n.to(tl.int64) * height + y
    live = (y < height)[:, None] & (x < width)[None, :]
    tl.store(dense_ptr + lines[:, None] * width + x[None, :], bit != 0, mask=live)


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
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    return [KernelCase("dense", _dense_kernel, arguments, NUM_WARPS)]
