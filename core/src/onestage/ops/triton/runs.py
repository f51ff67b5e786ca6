"""Kernels that find the changes of packed masks: count them in blocks of words, add up, write them. Three launches.

A word is compared with itself moved by one pixel, 32 pixels at a time. Words lie in the order of COCO's run lengths, so
where a change is stored is how many there are before it: a sum inside its block and one over the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.packed import word_capacity
from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import num_programs, on_its_gpu

BLOCK = 1024  # words of one mask that are looked at together
SUM_BLOCK = 1024
PROGRAMS_PER_SM = 4


@on_its_gpu
def mask_changes_triton(windows: Tensor, words: Tensor, size: tuple[int, int], capacity: int) -> tuple[Tensor, Tensor]:
    """Kernels of `mask_changes`, with its arguments and its result."""
    device, count = words.device, len(windows)
    changes = torch.empty(capacity, dtype=torch.int32, device=device)
    ends = torch.empty(count, dtype=torch.int64, device=device)
    if count == 0:
        return changes, ends
    windows, words = windows.contiguous(), words.contiguous()
    bound = count * triton.cdiv(word_capacity(1, size), BLOCK)
    sums = torch.empty(bound, dtype=torch.int64, device=device)
    programs = num_programs(device, bound, PROGRAMS_PER_SM)
    lanes = max(128, triton.next_power_of_2(count))  # few sizes are compiled
    _count_kernel[(programs,)](windows, words, sums, count, size[0], lanes, BLOCK)
    _sum_kernel[(1,)](windows, sums, ends, count, lanes, BLOCK, SUM_BLOCK)
    _write_kernel[(programs,)](windows, words, sums, changes, count, size[0], capacity, lanes, BLOCK)
    return changes, ends


@triton.jit(do_not_specialize=["N", "height"])
def _count_kernel(windows_ptr, words_ptr, sums_ptr, N, height, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """How many changes each block has."""
    block_ends, word_ends = _ends(windows_ptr, N, LANES, BLOCK)
    total = tl.max(block_ends, 0)
    block = tl.program_id(0).to(tl.int64)
    while block < total:
        bits, closing, _, _ = _changes(windows_ptr, words_ptr, block_ends, word_ends, block, height, BLOCK)
        tl.store(sums_ptr + block, tl.sum(_count_bits(bits) + closing, 0).to(tl.int64))
        block += tl.num_programs(0)


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(windows_ptr, sums_ptr, ends_ptr, N, LANES: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr):
    """Turns the blocks' counts into how many changes there are up to and with each, and says where masks end."""
    block_ends, _ = _ends(windows_ptr, N, LANES, BLOCK)
    total = tl.max(block_ends, 0)
    before = tl.zeros((), tl.int64)
    first = 0
    while first < total:
        block = first + tl.arange(0, SUM_BLOCK)
        counts = tl.load(sums_ptr + block, mask=block < total, other=0)
        tl.store(sums_ptr + block, before + tl.cumsum(counts, 0), mask=block < total)
        before += tl.sum(counts, 0)
        first += SUM_BLOCK
    tl.debug_barrier()  # other threads read what these have written
    lane = tl.arange(0, LANES)
    end = tl.load(sums_ptr + block_ends - 1, mask=(lane < N) & (block_ends > 0), other=0)
    tl.store(ends_ptr + lane, end, mask=lane < N)


@triton.jit(do_not_specialize=["N", "height", "capacity"])
def _write_kernel(
    windows_ptr, words_ptr, sums_ptr, changes_ptr, N, height, capacity, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """The changes themselves."""
    block_ends, word_ends = _ends(windows_ptr, N, LANES, BLOCK)
    total = tl.max(block_ends, 0)
    block = tl.program_id(0).to(tl.int64)
    while block < total:
        bits, closing, position, rows = _changes(windows_ptr, words_ptr, block_ends, word_ends, block, height, BLOCK)
        counts = _count_bits(bits)
        end = tl.load(sums_ptr + block) - tl.sum(counts + closing, 0) + tl.cumsum(counts + closing, 0)
        tl.store(changes_ptr + end - 1, position + rows, mask=(closing != 0) & (end <= capacity))
        place = end - closing - counts
        while tl.max(bits, 0) != 0:
            row = _count_bits((bits ^ (bits - 1)) >> 1)  # of the lowest bit: the zeros below it
            tl.store(changes_ptr + place, position + row, mask=(bits != 0) & (place < capacity))
            place += 1
            bits &= bits - 1
        block += tl.num_programs(0)


@triton.jit
def _ends(windows_ptr, N, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """[LANES] int64 twice: one past each window's last block, and one past its last word."""
    lane = tl.arange(0, LANES)
    x0 = tl.load(windows_ptr + lane * 4, mask=lane < N, other=0)
    y0 = tl.load(windows_ptr + lane * 4 + 1, mask=lane < N, other=0)
    x1 = tl.load(windows_ptr + lane * 4 + 2, mask=lane < N, other=0)
    y1 = tl.load(windows_ptr + lane * 4 + 3, mask=lane < N, other=0)
    words = (x1 - x0) * ((y1 - y0 + 31) // 32)
    return tl.cumsum((words + BLOCK - 1) // BLOCK, 0), tl.cumsum(words, 0)


@triton.jit
def _changes(windows_ptr, words_ptr, block_ends, word_ends, block, height, BLOCK: tl.constexpr):
    """What changes in the words of a block.

    Returns:
        [BLOCK] each: uint32, the rows that differ from the pixel before them; int32, 1 where the mask ends with the
        word's last row; int32, position of its first row; int32, how many rows it has.
    """
    before = block_ends <= block
    n = tl.sum(before.to(tl.int32), 0)
    local = (block - tl.max(tl.where(before, block_ends, 0), 0)).to(tl.int32)
    first_word = tl.max(tl.where(before, word_ends, 0), 0)
    x0 = tl.load(windows_ptr + n * 4).to(tl.int32)
    y0 = tl.load(windows_ptr + n * 4 + 1).to(tl.int32)
    x1 = tl.load(windows_ptr + n * 4 + 2).to(tl.int32)
    y1 = tl.load(windows_ptr + n * 4 + 3).to(tl.int32)
    per_column = tl.cdiv(y1 - y0, 32)
    number = local * BLOCK + tl.arange(0, BLOCK)
    live = number < (x1 - x0) * per_column
    column = number // per_column
    word = number % per_column
    rows = tl.where(live, tl.minimum(y1 - y0 - word * 32, 32), 32)
    # Where the window is as high as the image, the pixel before a column is the last one of the column before.
    whole = y1 - y0 == height
    follows = live & ((word > 0) | (whole & (column > 0)))
    words_ptr += first_word + number
    here = tl.load(words_ptr, mask=live, other=0).to(tl.uint32, bitcast=True)
    before = tl.load(words_ptr - 1, mask=follows, other=0).to(tl.uint32, bitcast=True)
    before = before >> tl.where(word > 0, 31, (y1 - y0 - 1) % 32).to(tl.uint32)
    bits = here ^ ((here << 1) | (before & 1))
    bits &= tl.full((BLOCK,), 0xFFFFFFFF, tl.uint32) >> (32 - rows).to(tl.uint32)
    ends_here = live & (word == per_column - 1) & ((column == x1 - x0 - 1) | (y1 - y0 != height))
    closing = ((here >> (rows - 1).to(tl.uint32)) & 1).to(tl.int32)
    return bits, tl.where(ends_here, closing, 0), (x0 + column) * height + y0 + word * 32, rows


@triton.jit
def _count_bits(bits):
    """How many bits of each uint32 are set, int32."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles."""
    pointers = {"windows_ptr": "*i64", "words_ptr": "*i32", "sums_ptr": "*i64", "ends_ptr": "*i64"}
    given: dict[str, Any] = pointers | {"changes_ptr": "*i32"} | dict.fromkeys(("N", "height", "capacity"), "i32")
    cases = []
    for lanes in (128, 1024):
        given |= {"LANES": lanes, "BLOCK": BLOCK, "SUM_BLOCK": SUM_BLOCK}
        for kernel in (_count_kernel, _sum_kernel, _write_kernel):
            cases.append(KernelCase(f"{lanes} windows", kernel, {name: given[name] for name in kernel.arg_names}))
    return cases
