"""The parts dense heads are made of: conv towers, per-level scales, initialisation."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

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
    flat = [x.permute(0, 2, 3, 1).reshape(len(x), -1, channels) for x in maps]
    return torch.cat(flat, dim=1)
