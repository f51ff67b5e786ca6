"""Kernel of `onestage.ops.deform`: bilinear gather and matrix product in one pass, without a column buffer.

A program makes BLOCK_M cells of one image and BLOCK_N channels. For each tap it computes where its cells sample, then
walks through the channels: four gathered corners, their bilinear sum in float32, one product with the tap's weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import on_its_gpu

# (BLOCK_M, BLOCK_N, BLOCK_K, warps). Half types use the tensor cores; one program over all 256 channels gathers once.
HALF_WIDE = (64, 256, 32, 8)
HALF_NARROW = (64, 64, 32, 4)
SINGLE = (32, 64, 16, 4)
CONFIGS = (HALF_WIDE, HALF_NARROW, SINGLE)
WIDE_FROM = 128  # output channels of a weight group
NUM_STAGES = 2


@on_its_gpu
def deform_conv2d_triton(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    """As `deform_conv2d_gather`, for float32, float16 and bfloat16 and any number of weight groups.

    In half types samples are interpolated and products summed in float32; the factors of a product have the type of
    `x`. Nothing depends on values on the host: safe in a CUDA graph.

    Returns:
        [B, O, h, w] in the type of `x` and channels-last order.
    """
    num_images, channels, height, width = x.shape
    num_outputs, group_channels, kernel_height, kernel_width = weight.shape
    out_height, out_width = offset.shape[2:]
    num_taps = kernel_height * kernel_width
    num_groups = channels // group_channels
    offset_group_channels = channels * 2 * num_taps // offset.shape[1]
    # Runs of channels that share weights' group and offsets.
    segment = math.gcd(group_channels, offset_group_channels)

    cells = x.permute(0, 2, 3, 1).contiguous()
    kernel = weight.to(x.dtype).permute(2, 3, 1, 0).contiguous()  # [T, C / groups, O]
    offset = offset.flatten(2)
    mask = None if mask is None else mask.flatten(2)
    out = torch.empty(num_images, out_height, out_width, num_outputs, dtype=x.dtype, device=x.device)
    num_cells = out_height * out_width
    # Within an image addresses are 32-bit, for the sake of registers.
    assert max(_reach(part) for part in (cells, out, offset, mask) if part is not None) < 2**31
    if out.numel() > 0:
        block_m, block_n, block_k, num_warps = choose_config(x.dtype, num_outputs // num_groups)
        tiles = triton.cdiv(num_outputs // num_groups, block_n)
        _deform_kernel[(triton.cdiv(num_cells, block_m), num_groups * tiles, num_images)](
            cells,
            offset,
            mask,
            kernel,
            None if bias is None else bias.contiguous(),
            out,
            num_cells,
            height,
            width,
            out_width,
            *offset.stride(),
            *((0, 0, 0) if mask is None else mask.stride()),
            *stride,
            *padding,
            *dilation,
            group_channels,
            num_outputs // num_groups,
            offset_group_channels,
            segment,
            num_groups,
            num_taps,
            kernel_width,
            block_m,
            block_n,
            block_k,
            num_warps=num_warps,
            num_stages=NUM_STAGES,
        )
    return out.permute(0, 3, 1, 2)


def _reach(images: Tensor) -> int:
    """How far from the first element of an image its last one lies."""
    return sum((length - 1) * stride for length, stride in zip(images.shape[1:], images.stride()[1:], strict=True))


def choose_config(dtype: torch.dtype, group_outputs: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps) for a type and a number of output channels per weight group."""
    if dtype == torch.float32:
        return SINGLE
    return HALF_WIDE if group_outputs >= WIDE_FROM else HALF_NARROW


# Sizes of levels and images; the strides of cells stay, 1 of those lets offsets be read side by side.
@triton.jit(
    do_not_specialize=[
        "num_cells",
        "height",
        "width",
        "out_width",
        "offset_image",
        "offset_channel",
        "mask_image",
        "mask_channel",
    ]
)
def _deform_kernel(
    x_ptr,  # [B, H, W, C]
    offset_ptr,  # [B, g * T * 2, h * w], any strides
    mask_ptr,  # [B, g * T, h * w], any strides, or None
    weight_ptr,  # [T, C / groups, O]
    bias_ptr,  # [O] or None
    out_ptr,  # [B, h, w, O]
    num_cells,
    height,
    width,
    out_width,
    offset_image,
    offset_channel,
    offset_cell,
    mask_image,
    mask_channel,
    mask_cell,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_OUTPUTS: tl.constexpr,
    OFFSET_GROUP_CHANNELS: tl.constexpr,
    SEGMENT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cell = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = cell < num_cells
    channels: tl.constexpr = GROUP_CHANNELS * NUM_GROUPS
    num_outputs: tl.constexpr = GROUP_OUTPUTS * NUM_GROUPS
    group = tl.program_id(1) % NUM_GROUPS
    output = tl.program_id(1) // NUM_GROUPS * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = output < GROUP_OUTPUTS
    output += group * GROUP_OUTPUTS

    image = tl.program_id(2).to(tl.int64)
    corner_y = (cell // out_width * stride_y - padding_y).to(tl.float32)
    corner_x = (cell % out_width * stride_x - padding_x).to(tl.float32)
    offset_row = offset_ptr + image * offset_image
    image_ptr = x_ptr + image * height * width * channels + group * GROUP_CHANNELS
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for step in range(GROUP_CHANNELS // SEGMENT * NUM_TAPS):
        tap = step % NUM_TAPS
        first = step // NUM_TAPS * SEGMENT  # channel within the weight group
        sampled = (group * GROUP_CHANNELS + first) // OFFSET_GROUP_CHANNELS * NUM_TAPS + tap
        offsets = offset_row + sampled * 2 * offset_channel
        y = tl.load(offsets + cell * offset_cell, mask=live, other=0.0).to(tl.float32)
        x = tl.load(offsets + offset_channel + cell * offset_cell, mask=live, other=0.0).to(tl.float32)
        y = _clamp(y + (corner_y + tap // KERNEL_WIDTH * dilation_y), height)
        x = _clamp(x + (corner_x + tap % KERNEL_WIDTH * dilation_x), width)
        top, left = tl.floor(y), tl.floor(x)
        down, right = y - top, x - left
        if mask_ptr is not None:
            mask_row = mask_ptr + image * mask_image + sampled * mask_channel
            factor = tl.load(mask_row + cell * mask_cell, mask=live, other=0.0).to(tl.float32)
        else:
            factor = 1.0
        # A corner outside counts as zero. NaN is outside too, but its share stays NaN and reaches the output.
        top_in, bottom_in = live & (top >= 0) & (top < height), live & (top >= -1) & (top < height - 1)
        left_in, right_in = (left >= 0) & (left < width), (left >= -1) & (left < width - 1)
        row = tl.where(top_in | bottom_in, top, 0.0).to(tl.int32)
        column = tl.where(left_in | right_in, left, 0.0).to(tl.int32)
        base = (row * width + column) * channels + first
        below = width * channels
        up_share, down_share = (1.0 - down) * factor, down * factor
        for start in range(0, SEGMENT, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            inner = channel < SEGMENT
            corner = image_ptr + (base[:, None] + channel[None, :])
            sample = _corner(corner, top_in & left_in, inner) * (up_share * (1.0 - right))[:, None]
            sample += _corner(corner + channels, top_in & right_in, inner) * (up_share * right)[:, None]
            sample += _corner(corner + below, bottom_in & left_in, inner) * (down_share * (1.0 - right))[:, None]
            sample += _corner(corner + below + channels, bottom_in & right_in, inner) * (down_share * right)[:, None]
            weight_row = (tap * GROUP_CHANNELS + first + channel) * num_outputs
            weights = tl.load(
                weight_ptr + weight_row[:, None] + output[None, :], mask=inner[:, None] & kept[None, :], other=0.0
            )
            total = tl.dot(sample.to(weights.dtype), weights, total, input_precision="ieee")

    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=kept, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + image * num_cells * num_outputs + (cell[:, None] * num_outputs + output[None, :]),
        total.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & kept[None, :],
    )


@triton.jit
def _clamp(position, extent):
    # Beyond one cell outside everything is zero, so clamping there changes nothing; NaN passes both comparisons.
    position = tl.where(position < -1.0, -1.0, position)
    return tl.where(position > extent, extent * 1.0, position)


@triton.jit
def _corner(pointers, inside, inner):
    return tl.load(pointers, mask=inside[:, None] & inner[None, :], other=0.0).to(tl.float32)


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles: a feature alignment of four offset groups, and the same modulated."""
    cases = []
    for modulated in (False, True):
        for dtype, config in (("bf16", HALF_WIDE), ("fp16", HALF_NARROW), ("fp32", SINGLE)):
            pointers = ("x_ptr", "offset_ptr", "mask_ptr", "weight_ptr", "bias_ptr", "out_ptr")
            given: dict[str, Any] = dict.fromkeys(pointers, f"*{dtype}")
            if not modulated:
                given |= {"mask_ptr": None, "bias_ptr": None}
            given |= {
                "GROUP_CHANNELS": 256,
                "GROUP_OUTPUTS": 256,
                "OFFSET_GROUP_CHANNELS": 64,
                "SEGMENT": 64,
                "NUM_GROUPS": 1,
            }
            given |= {"NUM_TAPS": 9, "KERNEL_WIDTH": 3}
            given |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), config, strict=False))
            arguments = {argument: given.get(argument, "i32") for argument in _deform_kernel.arg_names}
            name = f"{dtype}{' modulated' if modulated else ''}"
            cases.append(KernelCase(name, _deform_kernel, arguments, config[3], NUM_STAGES))
    return cases
