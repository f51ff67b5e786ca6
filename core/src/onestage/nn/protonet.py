"""Prototype masks for a whole image (YOLACT, Bolya et al. 2019)."""

from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn.towers import conv_tower, conv_unit

UPSAMPLE = 2  # prototype cells per cell of the input, and axis


class ProtoNet(nn.Module):
    """Three convs, twice the size, one conv, and one map for each prototype.

    Args:
        in_channels: Of the pyramid's finest level.
        width: Channels of the convs.
        num_prototypes: k.
        relu: Prototypes are >= 0; without, they have any sign.
    """

    def __init__(self, in_channels: int, width: int, num_prototypes: int, *, relu: bool = True):
        super().__init__()
        self.relu = relu
        self.before = conv_tower(in_channels, width, 3, norm="none", bias=True)
        self.after = conv_unit(width, width, norm="none", bias=True)
        self.out = nn.Conv2d(width, num_prototypes, 1)
        init_xavier(self)

    def forward(self, finest: Tensor) -> Tensor:
        """[B, k, 2 h, 2 w] from the finest pyramid level [B, in, h, w]."""
        x = F.interpolate(self.before(finest), scale_factor=UPSAMPLE, mode="bilinear", align_corners=False)
        prototypes = self.out(self.after(x))
        return F.relu(prototypes) if self.relu else prototypes


def init_xavier(module: nn.Module) -> None:
    """Gives every convolution in `module` Xavier-uniform weights and zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
