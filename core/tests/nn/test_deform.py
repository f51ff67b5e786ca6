"""The deformable convolution that predicts its own offsets."""

import torch
from torch import nn
from torchvision import ops

from onestage.nn.deform import SelfOffsetConv2d


def test_it_starts_as_a_plain_convolution_and_modulated_as_half_of_it():
    x = torch.randn(1, 4, 6, 7)
    for modulated, factor in ((False, 1.0), (True, 0.5)):
        conv = SelfOffsetConv2d(4, 5, stride=2, modulated=modulated)
        plain = nn.functional.conv2d(x, conv.weight, stride=2, padding=1)
        torch.testing.assert_close(conv(x), plain * factor, rtol=0, atol=1e-5)


def test_names_and_channels():
    shapes = {name: tuple(p.shape) for name, p in SelfOffsetConv2d(4, 5, modulated=True).named_parameters()}
    assert shapes == {"weight": (5, 4, 3, 3), "conv_offset.weight": (27, 4, 3, 3), "conv_offset.bias": (27,)}


def test_the_last_nine_channels_are_the_modulation():
    torch.manual_seed(0)
    conv = SelfOffsetConv2d(4, 5, modulated=True)
    nn.init.normal_(conv.conv_offset.weight, std=0.3)
    x = torch.randn(2, 4, 6, 7)
    predicted = conv.conv_offset(x)
    expected = ops.deform_conv2d(x, predicted[:, :18], conv.weight, padding=1, mask=torch.sigmoid(predicted[:, 18:]))
    torch.testing.assert_close(conv(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected.detach(), rtol=0, atol=1e-5)
