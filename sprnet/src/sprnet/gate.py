"""The gated merge of the pyramid (Sec. 3.1, Fig. 3). Any detector takes it: `FPN(..., merge=GatedMerge(...))`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class GatedMerge(nn.Module):
    """A lateral and an upsampled map, both weighed by one and the same gate, then added.

    There is no softmax between the two scores, and the gradient to the coarser level is scaled, not blocked. At
    initialisation all scores are close to one half.

    Args:
        channels: Of the pyramid.
        num_merges: Levels of the top-down path but the coarsest.
        scores: "full": one for each channel and place; "spatial": one for each place.
        share_levels: All merges use one gate.
    """

    def __init__(
        self, channels: int, num_merges: int, *, scores: Literal["full", "spatial"] = "full", share_levels: bool = False
    ):
        super().__init__()
        num_scores = channels if scores == "full" else 1
        self.gates = nn.ModuleList(Gate(channels, num_scores) for _ in range(1 if share_levels else num_merges))

    def forward(self, lateral: Tensor, upsampled: Tensor, level: int) -> Tensor:
        """The merge of two [B, C, h, w] on the pyramid level of index `level`, 0 the finest."""
        gate = self.gates[level if len(self.gates) > 1 else 0]
        return gate(lateral) + gate(upsampled)


class Gate(nn.Module):
    """A map times the sigmoid of its own scores, which a separable 3x3 convolution finds.

    Args:
        channels: Of the map.
        num_scores: Per place: `channels`, or 1 for all channels.
    """

    def __init__(self, channels: int, num_scores: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, num_scores, 1)
        for weight in (self.depthwise.weight, self.pointwise.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.pointwise.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] to the same."""
        return x * self.pointwise(self.depthwise(x)).sigmoid()
