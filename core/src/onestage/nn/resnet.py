"""ResNet and ResNeXt trunks: torchvision's, built and then adapted to the recipes.

Parameter names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, ..), so its ImageNet weights load as they are.
"""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from onestage.config import BackboneConfig
from onestage.nn.deform import SelfOffsetConv2d

NUM_STAGES = 5  # stem, layer1 .. layer4


def build_backbone(config: BackboneConfig) -> "ResNet":
    """A trunk as configured, with torchvision's random initialisation."""
    return ResNet(config)


class ResNet(nn.Module):
    """Images to C2..C5.

    Args:
        config: Depth, stride placement, what is frozen, which convs are deformable. `stride_in_1x1` and frozen norms
            have the meaning of the recipes; the basic blocks of ResNet-18 and 34 have no 1x1 conv and ignore the
            former.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        trunk = getattr(torchvision.models, config.name)(weights=None)
        self.config = config
        self.conv1, self.bn1, self.maxpool = trunk.conv1, trunk.bn1, trunk.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4
        if config.stride_in_1x1:
            _move_stride(self)
        for stage in config.deformable_stages:
            _deform(getattr(self, f"layer{stage}"), config.deformable_interval, config.modulated)
        self.channels: tuple[int, ...] = tuple(_out_channels(layer[-1]) for layer in self._layers())
        _freeze(self)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to (C2, C3, C4, C5): [B, channels, H / s, W / s], strides 4, 8, 16, 32."""
        x = self.maxpool(F.relu_(conv_norm(self.conv1, self.bn1, pixels)))
        features = []
        for layer in self._layers():
            for block in layer:
                x = _residual_block(block, x)
            features.append(x)
        return tuple(features)

    def train(self, mode: bool = True) -> "ResNet":
        """As in `nn.Module`, but frozen norms keep using their stored statistics."""
        super().train(mode)
        frozen = self.stages() if self.config.norm != "train" else self.stages()[: self.config.frozen_stages]
        for stage in frozen:
            for module in stage.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too
                    module.eval()
        return self

    def stages(self) -> list[nn.Module]:
        """Stem and the four layers; the modules themselves, not copies."""
        return [nn.ModuleList([self.conv1, self.bn1]), *self._layers()]

    def _layers(self) -> tuple[nn.Sequential, ...]:
        return (self.layer1, self.layer2, self.layer3, self.layer4)


def conv_norm(conv: nn.Module, norm: Any, x: Tensor) -> Tensor:
    """Convolution, then batch norm; at inference one convolution with the norm folded into its weights.

    The folded form saves two passes over every map of the trunk and equals the other up to rounding.
    """
    if torch.is_grad_enabled() or norm.training or type(conv) is not nn.Conv2d:
        return norm(conv(x))
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * factor
    weight = conv.weight * factor[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _residual_block(block: Any, x: Tensor) -> Tensor:
    """torchvision's blocks as they are, but with `conv_norm`."""
    out = F.relu_(conv_norm(block.conv1, block.bn1, x))
    out = conv_norm(block.conv2, block.bn2, out)
    if isinstance(block, Bottleneck):
        out = conv_norm(block.conv3, block.bn3, F.relu_(out))
    shortcut = x if block.downsample is None else conv_norm(block.downsample[0], block.downsample[1], x)
    return F.relu_(out + shortcut)


def _move_stride(trunk: ResNet) -> None:
    """From the 3x3 conv, where torchvision has it, to the first 1x1, where the MSRA weights were trained."""
    for layer in (trunk.layer2, trunk.layer3, trunk.layer4):
        block = layer[0]
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _deform(layer: Any, interval: int, modulated: bool) -> None:
    for block in layer[::interval]:
        conv = block.conv2
        block.conv2 = SelfOffsetConv2d(
            conv.in_channels,
            conv.out_channels,
            kernel_size=3,
            stride=conv.stride[0],
            padding=conv.padding[0],
            groups=conv.groups,
            modulated=modulated,
        )
        block.conv2.weight = conv.weight


def _out_channels(block: Any) -> int:
    return int((block.conv2 if isinstance(block, BasicBlock) else block.conv3).out_channels)


def _freeze(trunk: ResNet) -> None:
    if trunk.config.norm == "frozen":
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    for stage in trunk.stages()[: trunk.config.frozen_stages]:
        stage.requires_grad_(False)
