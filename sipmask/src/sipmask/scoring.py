"""Mask re-scoring of SipMask++ (Sec. 4.2): a small net says what IoU a mask has with the truth."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sipmask.config import SipMaskConfig

CHANNELS = (1, 16, 16, 16, 32, 64, 128)
MIN_SIDE = 127  # cells that six convs of stride 2 without padding reduce to one


class MaskScoring(nn.Module):
    """Predicts the IoU of soft masks, as YOLACT++ does it: six convs of stride 2, one number a class, the largest.

    Args:
        config: `num_classes`.
    """

    def __init__(self, config: SipMaskConfig):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, stride=2) for before, after in pairwise(CHANNELS))
        self.out = nn.Conv2d(CHANNELS[-1], config.num_classes, 1)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        assert self.out.bias is not None
        nn.init.normal_(self.out.weight, std=0.001)
        nn.init.zeros_(self.out.bias)

    def forward(self, masks: Tensor, labels: Tensor) -> Tensor:
        """Predicted IoU of each mask with the object it is of.

        Args:
            masks: [N, h, w] probabilities on the canvas of the basis masks, 0 outside the boxes; a canvas that is too
                small for the convs gets zeros at the right and at the bottom.
            labels: [N] int64.

        Returns:
            [N], >= 0; nothing keeps it below 1.
        """
        height, width = masks.shape[1:]
        feature = F.pad(masks[:, None], (0, max(0, MIN_SIDE - width), 0, max(0, MIN_SIDE - height)))
        for conv in self.convs:
            feature = conv(feature).relu()
        scores = self.out(feature).relu().amax((2, 3))  # [N, K]
        return scores.gather(1, labels[:, None]).squeeze(1)


@torch.no_grad()
def mask_iou(soft: Tensor, truth: Tensor, threshold: float) -> Tensor:
    """What `MaskScoring` should say, with the released code's 0.1 in the denominator.

    Args:
        soft: [N, h, w] probabilities inside the boxes.
        truth: [N, h, w] of 0 and 1, the whole objects.
        threshold: Probability above which a cell is in the mask.

    Returns:
        [N] float32 in [0, 1).
    """
    mask, truth = soft > threshold, truth > 0
    inter = (mask & truth).sum((1, 2)).float()
    return inter / (mask.sum((1, 2)) + truth.sum((1, 2)) - inter + 0.1)
