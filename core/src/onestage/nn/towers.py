"""The parts dense heads are made of: conv towers, per-level scales, initialisation."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from onestage.ops import host

TowerNorm = Literal["gn", "none"]

NUM_GROUPS = 32  # of every group norm in a head


def conv_tower(in_channels: int, width: int, depth: int, *, norm: TowerNorm, bias: bool) -> nn.Sequential:
    """`depth` conv units one after another; parameters are named `{i}.0` (conv) and `{i}.1` (norm)."""
    channels = [in_channels] + [width] * depth
    return nn.Sequential(*(conv_unit(channels[i], width, norm=norm, bias=bias) for i in range(depth)))


def conv_unit(
    in_channels: int, out_channels: int, *, norm: TowerNorm, bias: bool, dilation: int = 1
) -> Conv2dNormActivation:
    """3x3 conv, group norm if asked for, ReLU; keeps the size."""
    return Conv2dNormActivation(
        in_channels,
        out_channels,
        kernel_size=3,
        dilation=dilation,
        norm_layer=group_norm if norm == "gn" else None,
        bias=bias,
    )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm as every head uses it."""
    return nn.GroupNorm(NUM_GROUPS, channels)


class Scale(nn.Module):
    """One learnable factor, the scale of one pyramid level."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """Gives every convolution in `module` (plain, transposed, deformable) weights N(0, std) and zero biases."""
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 4:
            nn.init.normal_(weight, std=std)
            bias = getattr(part, "bias", None)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)


def prior_bias(probability: float = 0.01) -> float:
    """The logit of `probability`: class biases start there, or the many negatives swamp the first steps."""
    return -math.log((1 - probability) / probability)


def flatten_levels(maps: Sequence[Tensor], channels: int) -> Tensor:
    """Head outputs of all levels as one list.

    Args:
        maps: [B, A * channels, h, w] per level, anchors outermost in the channels (A = 1 without anchors).
        channels: Numbers per anchor or location.

    Returns:
        [B, P * A, channels]: level by level, row by row, anchor by anchor.
    """
    flat = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels) for x in maps]
    return torch.cat(flat, dim=1)


def conv_at(conv: nn.Conv2d, levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """What a convolution says at some locations only.

    A conv without a norm behind it is linear in its patch: only the patches of the locations that count are read.
    Differentiable.

    Args:
        conv: Square kernel of odd side, stride 1, any dilation, a padding that keeps the size, one group; shared by
            the levels.
        levels: Features of one image, [C, h, w] per level.
        index: [N] int64 into the locations of all levels, in the order of `flatten_levels`; repeats are legal.

    Returns:
        [N, out] in the type of `conv`.
    """
    assert conv.kernel_size[0] == conv.kernel_size[1]
    assert conv.stride == (1, 1)
    assert conv.groups == 1
    if host.keeps_fixed_shapes(index.device):
        patches = _patches_of_levels(conv, levels, index)
        return F.linear(patches, conv.weight.flatten(1), conv.bias).to(conv.weight.dtype)
    values = conv.weight.new_empty(len(index), conv.out_channels)
    start = 0
    for feature in levels:
        height, width = feature.shape[-2:]
        inside = ((index >= start) & (index < start + height * width)).nonzero().flatten()
        cell = index[inside] - start
        patches = _patches(feature, cell // width, cell % width, conv.kernel_size[0], conv.dilation[0])
        values[inside] = F.linear(patches, conv.weight.flatten(1), conv.bias).to(values.dtype)
        start += height * width
    return values


def _patches_of_levels(conv: nn.Conv2d, levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """[N, C * side^2] at locations of all levels; reads every level for each, so that no size depends on values."""
    start, chosen = 0, None
    for feature in levels:
        height, width = feature.shape[-2:]
        cell = (index - start).clamp(0, height * width - 1)
        patches = _patches(feature, cell // width, cell % width, conv.kernel_size[0], conv.dilation[0])
        chosen = patches if chosen is None else torch.where((index >= start)[:, None], patches, chosen)
        start += height * width
    assert chosen is not None
    return chosen


def _patches(feature: Tensor, rows: Tensor, columns: Tensor, side: int, dilation: int) -> Tensor:
    """[N, C * side^2] zero-padded neighbourhoods of a feature [C, h, w], in the order of a conv weight."""
    height, width = feature.shape[-2:]
    offsets = (torch.arange(side, device=feature.device) - side // 2) * dilation
    y, x = (rows[:, None] + offsets)[:, :, None], (columns[:, None] + offsets)[:, None]  # [N, side, 1], [N, 1, side]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    patches = feature[:, y.clamp(0, height - 1), x.clamp(0, width - 1)].where(inside, 0)  # [C, N, side, side]
    return patches.transpose(0, 1).flatten(1)
