"""Kernels of `onestage.ops.edges`: profiles from the tiles of mask assembly, and the most probable position of a side.

Profiles are one more thing that a tile of `assemble` leaves behind: the maxima of its columns and rows, raised
atomically in two vectors a detection; a maximum has no order, so runs repeat bit for bit.

For the sides a program is one side of one box. The prior is cut off at 3.3 deviations, so it reads that stretch of the
profile and no more: convolution, sigmoid, prior and the running best in registers, one integer out.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.assemble import Size
from onestage.ops.triton.assemble import assemble_masks_triton
from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import on_its_gpu

BLOCK = 128  # positions that a program looks at together
NUM_WARPS = 1


def assemble_with_profiles_triton(
    basis: Tensor, coefficients: Tensor, windows: Tensor, *, output_size: Size, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows and words as of `assemble_masks_triton`, and the profiles.

    Returns:
        The profiles are one vector [N * (W + H)] float32, all of the columns' first.
    """
    height, width = output_size
    count = len(windows)
    # One vector: one fill, one sigmoid.
    profiles = torch.full((count * (width + height),), -torch.inf, device=basis.device)
    columns, rows = profiles.split((count * width, count * height))
    maxima = columns.view(count, width), rows.view(count, height)
    image_windows, words = assemble_masks_triton(
        basis, coefficients, windows, order="logits", output_size=output_size, maxima=maxima, **how
    )
    return image_windows, words, profiles.sigmoid_()


@on_its_gpu
def refine_boxes_triton(
    columns: Tensor,
    rows: Tensor,
    boxes: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: float,
    least_deviation: float,
    prior_cut: float,
) -> Tensor:
    """Every side at its most probable position, as `onestage.ops.edges.refine_boxes`.

    Args:
        columns: [N, W] float32 profile of the columns, 0..1.
        rows: [N, H] likewise.
        boxes: [N, 4] float32 inclusive xyxy.
        weight: [2 s + 1] float32, for left and top; right and bottom see it mirrored.
        bias: [] or [1] float32.
        gamma: > 0, standard deviation of the prior in box sides.
        least_deviation: Pixels.
        prior_cut: The prior is 0 where it is not larger.

    Returns:
        [N, 4] float32.
    """
    columns, rows = (profile if profile.stride(1) == 1 else profile.contiguous() for profile in (columns, rows))
    refined = torch.empty_like(boxes, memory_format=torch.contiguous_format)
    if len(boxes) > 0:
        _refine_kernel[(len(boxes), 4)](
            columns,
            rows,
            boxes.contiguous(),
            weight.contiguous(),
            bias,
            refined,
            columns.shape[1],
            rows.shape[1],
            columns.stride(0),
            rows.stride(0),
            gamma,
            least_deviation,
            prior_cut,
            math.sqrt(-2.0 * math.log(prior_cut)) + 0.01,
            len(weight),
            BLOCK,
            num_warps=NUM_WARPS,
        )
    return refined


@triton.jit(do_not_specialize=["width", "height", "columns_stride", "rows_stride"])
def _refine_kernel(
    columns_ptr,  # [N, W]
    rows_ptr,  # [N, H]
    boxes_ptr,  # [N, 4]
    weight_ptr,  # [TAPS]
    bias_ptr,  # [1]
    refined_ptr,  # [N, 4]
    width,
    height,
    columns_stride,
    rows_stride,
    gamma,
    least_deviation,
    prior_cut,
    reach,  # deviations at which the prior is certainly cut off
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    box, side = tl.program_id(0).to(tl.int64), tl.program_id(1)  # sides: left, top, right, bottom
    if side % 2 == 0:
        profile_ptr = columns_ptr + box * columns_stride
    else:
        profile_ptr = rows_ptr + box * rows_stride
    extent = tl.where(side % 2 == 0, width, height)
    low = tl.load(boxes_ptr + box * 4 + side % 2)
    high = tl.load(boxes_ptr + box * 4 + side % 2 + 2)
    centre = tl.where(side < 2, low, high)
    deviation = tl.maximum(gamma * (high - low), least_deviation)
    # Cut to the image as floats: a side may lie too far outside for an integer.
    first, end = centre - reach * deviation, centre + reach * deviation + 1.0
    start = tl.where(first > 0.0, tl.where(first < extent, first, extent), 0.0).to(tl.int32)
    stop = tl.where(end > 0.0, tl.where(end < extent, end, extent), 0.0).to(tl.int32)
    bias = tl.load(bias_ptr)

    best, best_position = tl.full((), 0.0, tl.float32), tl.full((), -1, tl.int32)
    while start < stop:
        position = start + tl.arange(0, BLOCK)
        logit = tl.zeros((BLOCK,), dtype=tl.float32) + bias
        for tap in tl.static_range(TAPS):
            # A convolution in torch's sense; for the far sides the kernel is read backwards.
            weight = tl.load(weight_ptr + tl.where(side < 2, tap, TAPS - 1 - tap))
            seen = position + (tap - TAPS // 2)
            value = tl.load(profile_ptr + seen, mask=(seen >= 0) & (seen < extent), other=0.0)
            logit += weight * value
        distance = position.to(tl.float32) - centre
        prior = tl.exp(-(distance * distance) / (2.0 * deviation * deviation))
        joint = tl.where((prior > prior_cut) & (position < extent), tl.sigmoid(logit) * prior, 0.0)
        most = tl.max(joint, axis=0)
        if most > best:
            best = most
            best_position = start + tl.argmax(joint, axis=0)
        start += BLOCK
    tl.store(refined_ptr + box * 4 + side, tl.where(best_position >= 0, best_position.to(tl.float32), centre))


def compile_cases() -> list[KernelCase]:
    """What the compile check covers, see `onestage.ops.triton.check`."""
    given: dict[str, Any] = dict.fromkeys(("width", "height", "columns_stride", "rows_stride"), "i32")
    given |= dict.fromkeys(("gamma", "least_deviation", "prior_cut", "reach"), "fp32") | {"TAPS": 9, "BLOCK": BLOCK}
    arguments = {argument: given.get(argument, "*fp32") for argument in _refine_kernel.arg_names}
    return [KernelCase("9 taps", _refine_kernel, arguments, NUM_WARPS)]
