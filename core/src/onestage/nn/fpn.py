"""Feature pyramid P3..P7 from C3..C5 (Lin et al. 2017), with the variations the recipes need.

torchvision's FeaturePyramidNetwork is not used: its P7 always has a ReLU before it, its P6 goes to C5 or P5 by
comparing channel counts, and it has neither bilinear upsampling nor a place for another merge.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """1x1 laterals, top-down merge, 3x3 outputs, and two stride-2 convs for the extra levels.

    Args:
        in_channels: Channels of the backbone maps, fine to coarse: (C3, C4, C5) usually.
        out_channels: Channels of every output level.
        extra: What P6 is computed from: "p5", the pyramid's coarsest output, or "c5", the backbone's; "none": no P6
            and P7.
        relu_p7: ReLU between P6 and the conv that makes P7; P6 itself is returned without.
        top_down: Upsampling to the exact size of the finer map; bilinear is align_corners=False.
        relu_outputs: ReLU on the outputs of the laterals' levels, before P6 is computed from them.
        merge: Called as `merge(lateral, upsampled, level)`, two [B, out, h, w] and the index of the finer level
            (0 is the finest); returns their merge. None: the sum. A module's parameters are the pyramid's.
        init: "xavier": Xavier uniform; "kaiming": Kaiming uniform with a = 1; biases 0.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        extra: Literal["p5", "c5", "none"] = "p5",
        relu_p7: bool = True,
        top_down: Literal["nearest", "bilinear"] = "nearest",
        relu_outputs: bool = False,
        merge: Callable[[Tensor, Tensor, int], Tensor] | None = None,
        init: Literal["xavier", "kaiming"] = "xavier",
    ):
        super().__init__()
        self.from_backbone = extra == "c5"
        self.relu_p7 = relu_p7
        self.top_down = top_down
        self.relu_outputs = relu_outputs
        self.lateral = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        p6_channels = in_channels[-1] if extra == "c5" else out_channels
        self.extra = nn.ModuleList(
            nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
            for channels in ((p6_channels, out_channels) if extra != "none" else ())
        )
        _init(self, init)
        self.merge = merge  # after _init: its parameters are its own affair

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Backbone maps [B, C, h, w], fine to coarse, to pyramid levels [B, out, h, w], P3 first."""
        laterals = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        for level in range(len(laterals) - 2, -1, -1):
            laterals[level] = self._merge(laterals[level], laterals[level + 1], level)
        levels = [conv(x) for conv, x in zip(self.output, laterals, strict=True)]
        if self.relu_outputs:
            levels = [F.relu(x) for x in levels]
        if len(self.extra) > 0:
            p6 = self.extra[0](features[-1] if self.from_backbone else levels[-1])
            p7 = self.extra[1](F.relu(p6) if self.relu_p7 else p6)
            levels += [p6, p7]
        return levels

    def _merge(self, lateral: Tensor, coarser: Tensor, level: int) -> Tensor:
        align_corners = False if self.top_down == "bilinear" else None
        upsampled = F.interpolate(coarser, size=lateral.shape[-2:], mode=self.top_down, align_corners=align_corners)
        return lateral + upsampled if self.merge is None else self.merge(lateral, upsampled, level)


def _init(module: nn.Module, init: str) -> None:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            if init == "xavier":
                nn.init.xavier_uniform_(conv.weight)
            else:
                nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.constant_(conv.bias, 0.0)  # type: ignore[arg-type]
