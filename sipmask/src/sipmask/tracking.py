"""The tracking branch (Sec. 3.5): features of the whole frame, read at the centre of a box."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn.towers import conv_tower, init_normal
from sipmask.config import SipMaskConfig

STRIDE = 8  # input pixels per cell of the tracking features, P3's
NUM_LEVELS = 3  # P3, P4, P5


class TrackingBranch(nn.Module):
    """Convs shared by P3 to P5, whose outputs are brought to one size and mixed by a 1x1 conv.

    The 1x1 conv is computed where boxes have their centres and nowhere else.

    Args:
        config: `width`, `norm`, `track_depth`, `track_channels`.
    """

    def __init__(self, config: SipMaskConfig):
        super().__init__()
        bias = config.norm == "none"
        self.tower = conv_tower(config.width, config.width, config.track_depth, norm=config.norm, bias=bias)
        self.mix = nn.Conv2d(NUM_LEVELS * config.width, config.track_channels, 1)
        init_normal(self.tower)  # the mixing conv keeps the framework's initialisation

    def forward(self, features: list[Tensor]) -> Tensor:
        """[B, 3 * C, h, w] at stride 8 from the pyramid P3 .., each level [B, C, h, w]."""
        towers = [self.tower(feature) for feature in features[:NUM_LEVELS]]
        size = towers[0].shape[-2:]
        wide = [F.interpolate(tower, size=size, mode="bilinear", align_corners=False) for tower in towers[1:]]
        return torch.cat([towers[0], *wide], 1)

    def embed(self, joined: Tensor, boxes: Tensor) -> Tensor:
        """What objects are recognised by.

        Args:
            joined: [3 * C, h, w] of one frame, from `forward`.
            boxes: [N, 4] legacy xyxy, input pixels. Centres outside the frame read its nearest cell.

        Returns:
            [N, track_channels] float32.
        """
        height, width = joined.shape[1:]
        column = ((boxes[:, 0] + boxes[:, 2]) / (2 * STRIDE)).floor().long().clamp(0, width - 1)
        row = ((boxes[:, 1] + boxes[:, 3]) / (2 * STRIDE)).floor().long().clamp(0, height - 1)
        return F.linear(joined[:, row, column].T, self.mix.weight.flatten(1), self.mix.bias).float()


def match_logits(embeddings: Tensor, known: Tensor) -> Tensor:
    """How well N embeddings fit K known ones: their dot products, and in column 0 a 0 for "none of them".

    Args:
        embeddings: [N, D].
        known: [K, D].

    Returns:
        [N, 1 + K] float32, computed as such under autocast too: the sums reach hundreds, and their exponentials count.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        similarity = embeddings.float() @ known.float().T
    return torch.cat((similarity.new_zeros(len(similarity), 1), similarity), 1)
