"""Deformable 3x3 convolutions as modules; the operation itself is `onestage.ops.deform`."""

import torch
from torch import Tensor, nn
from torchvision import ops

from onestage.ops.deform import deform_conv2d


class DeformConv2d(ops.DeformConv2d):
    """torchvision's module, offsets given by the caller, computed by our operation."""

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `onestage.ops.deform.deform_conv2d`."""
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )


class SelfOffsetConv2d(DeformConv2d):
    """A deformable convolution that predicts its own offsets from its input (Dai et al. 2017, Zhu et al. 2019).

    `conv_offset` is a convolution of the same kernel, stride and padding with bias, initialised to zero, so that the
    layer starts as a plain convolution (halved if modulated).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel.
        stride: Of both convolutions.
        padding: Of both convolutions.
        groups: Weight groups of the main convolution.
        bias: Of the main convolution.
        modulated: Each sample is weighted by a sigmoid, predicted as well (the last k * k channels).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
        bias: bool = False,
        modulated: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.modulated = modulated
        self.num_taps = kernel_size * kernel_size
        channels = (3 if modulated else 2) * self.num_taps
        self.conv_offset = nn.Conv2d(in_channels, channels, kernel_size, stride, padding)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """[B, in, h, w] to [B, out, h / stride, w / stride]."""
        predicted = self.conv_offset(input)
        if not self.modulated:
            return super().forward(input, predicted)
        offset, mask = predicted.split((2 * self.num_taps, self.num_taps), dim=1)
        return super().forward(input, offset, torch.sigmoid(mask))
