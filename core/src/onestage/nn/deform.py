"""A deformable convolution as a module; the operation itself is `onestage.ops.deform`."""

import torch
from torch import Tensor, nn

from onestage.ops.deform import deform_conv2d


class SelfOffsetConv2d(nn.Conv2d):
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
        nn.init.constant_(self.conv_offset.weight, 0.0)
        nn.init.constant_(self.conv_offset.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """[B, in, h, w] to [B, out, h / stride, w / stride]."""
        predicted = self.conv_offset(input)
        offset, mask = predicted, None
        if self.modulated:
            offset, logits = predicted.split((2 * self.num_taps, self.num_taps), dim=1)
            mask = torch.sigmoid(logits)
        return deform_conv2d(
            input, offset, self.weight, self.bias, stride=self.stride[0], padding=int(self.padding[0]), mask=mask
        )
