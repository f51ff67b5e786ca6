"""MEInst (Zhang et al., CVPR 2020): FCOS with a third branch that regresses a short code of each instance's mask.

Figure 2: `MEInst` is the whole, `MEInstHead` its three branches, `MaskCodec` (codec.py) the encoding of Sec. 3.2, whose
components are fitted beforehand and never trained. Where the paper differs from the released code, the code is
followed: a mask tower of its own, centerness on the box tower, noisy logits, whitened codes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from meinst.decode import decode
from meinst.losses import compute_losses
from meinst.targets import assign_targets
from onestage.nn import fcos
from onestage.nn.deform import SelfOffsetConv2d
from onestage.nn.fpn import FPN
from onestage.nn.resnet import build_backbone
from onestage.nn.towers import (
    Scale,
    conv_at,
    conv_unit,
    flatten_levels,
    group_norm,
    init_normal,
    prior_bias,
)
from onestage.structures import FORM_OF, Detections, MaskForm, Target, training_targets
from onestage.transforms import prepare_batch


class RawOutput(NamedTuple):
    """What the network says about B images at the P locations of all levels."""

    logits: Tensor  # [B, P, K] class logits
    distances: Tensor  # [B, P, 4] left, top, right, bottom, strides, >= 0
    centerness: Tensor  # [B, P] logits
    codes: Tensor | None  # [B, P, D]; None without a mask branch, and at inference with a 3x3 layer, see `codes_at`
    mask_features: list[Tensor]  # per level [B, C, h, w], what the codes are read from
    points: Tensor  # [P, 2] (x, y) locations, input pixels, level by level, row by row
    sizes: list[tuple[int, int]]  # (h, w) of each level


class MEInst(nn.Module):
    """MEInst.

    Train: `model(images, targets)` -> dict of scalar losses. Eval: `model(images)` -> list of dicts (`boxes` xyxy
    image pixels, `labels`, `scores`, `masks`). Images are [3, H, W] RGB, uint8 or float in 0..1, of any size;
    resizing, normalising and padding happen inside. `mask_output` says in which form "masks" comes
    (`Detections.as_dict`).

    A new model's `codec` holds no fitted encoding yet: `model.codec.load(Encoding.read(path))`.

    Args:
        config: Every switch of the method.
    """

    output_type = RawOutput
    parts_of_decode = ("codec",)

    def __init__(self, config: MEInstConfig):
        super().__init__()
        self.config = config
        self.mask_output = "bool" if config.mask_branch else "none"
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.channels[1:], config.width, extra="p5", init="kaiming")
        self.head = MEInstHead(config)
        self.codec = MaskCodec(config) if config.encoding == "pca" and config.mask_branch else PixelCodec(config)

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            found = self._detect(images, FORM_OF.get(self.mask_output, "binary"))
            return [detections.as_dict(self.mask_output) for detections in found]
        truth = training_targets(targets, images, self.config.num_classes)
        batch = prepare_batch(images, truth, self.config.input, training=True)
        raw = self.raw_outputs(batch.pixels)
        return compute_losses(raw, assign_targets(batch.targets or [], raw, self.config), self.codec, self.config)

    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections with `Masks` in box windows; never a dense mask. Call in eval mode.

        Args:
            images: B tensors [3, H, W] RGB, uint8 or float in 0..1.
            masks: False leaves out decoding and pasting. The mask tower runs all the same; a model without it has
                `mask_branch=False`.
        """
        return self._detect(images, "binary" if masks else "none")

    def raw_outputs(self, pixels: Tensor) -> RawOutput:
        """Network outputs for normalised, padded pixels [B, 3, H, W]."""
        _, *features = self.backbone(pixels)
        return self.head(self.fpn(features))

    def dense_outputs(self, pixels: Tensor) -> RawOutput:
        """`raw_outputs` with the codes of every location in place of what they are read from, for export."""
        raw = self.raw_outputs(pixels)
        codes = self.head.dense_codes(raw.mask_features) if raw.codes is None else raw.codes
        return raw._replace(codes=codes, mask_features=[])

    @torch.no_grad()
    def _detect(self, images: list[Tensor], masks: MaskForm) -> list[Detections]:
        batch = prepare_batch(images, None, self.config.input, training=False)
        raw = self.raw_outputs(batch.pixels)
        return decode(raw, batch.frames, partial(self.head.codes_at, raw), self.codec, self.config, masks)


class MEInstHead(nn.Module):
    """Class, box and mask branch (Fig. 2), shared by the levels."""

    def __init__(self, config: MEInstConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.shared_tower = _tower(config, config.shared_depth)
        self.cls_tower = _tower(config, config.tower_depth)
        self.box_tower = _tower(config, config.tower_depth)
        self.logits = nn.Conv2d(width, config.num_classes, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() if config.scales else nn.Identity() for _ in fcos.STRIDES)
        if config.mask_branch:
            self.mask_tower = _tower(config, config.tower_depth)
            self.codes: nn.Module = (
                LargeKernelConv(width, config.num_codes, config.large_kernel)
                if config.large_kernel
                else nn.Conv2d(width, config.num_codes, 3, padding=1)
            )
        self._initialise()

    def forward(self, features: list[Tensor]) -> RawOutput:
        """Raw outputs from the pyramid P3..P7, each [B, C, h, w]."""
        features = [self.shared_tower(feature) for feature in features]
        sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
        box_features = [self.box_tower(feature) for feature in features]
        distances = [scale(self.distances(x)).relu() for scale, x in zip(self.scales, box_features, strict=True)]
        mask_features = [self.mask_tower(feature) for feature in features] if self.config.mask_branch else []
        # At inference the codes of kept locations are enough, if the layer is one convolution.
        dense = self.config.mask_branch and (self.training or self.config.large_kernel > 0)
        return RawOutput(
            logits=flatten_levels(
                [self.logits(self.cls_tower(feature)) for feature in features], self.config.num_classes
            ),
            distances=flatten_levels(distances, 4),
            centerness=flatten_levels([self.centerness(x) for x in box_features], 1).squeeze(2),
            codes=self.dense_codes(mask_features) if dense else None,
            mask_features=mask_features,
            points=fcos.locations(sizes, device=features[0].device),
            sizes=sizes,
        )

    def dense_codes(self, features: list[Tensor]) -> Tensor | None:
        """Codes [B, P, D] of all locations, from the features they are read from; None without a mask branch."""
        if not self.config.mask_branch:
            return None
        return flatten_levels([self.codes(x) for x in features], self.config.num_codes)

    def codes_at(self, raw: RawOutput, image: int, index: Tensor) -> Tensor:
        """Codes [N, D] of the locations `index` [N] int64 of one image."""
        if raw.codes is not None:
            return raw.codes[image, index]
        assert isinstance(self.codes, nn.Conv2d)
        return conv_at(self.codes, [feature[image] for feature in raw.mask_features], index)

    def _initialise(self) -> None:
        init_normal(self)
        nn.init.constant_(self.logits.bias, prior_bias(0.01))  # type: ignore[arg-type]
        for part in self.modules():
            if isinstance(part, SelfOffsetConv2d):  # its offsets are drawn like plain convs, not zero
                nn.init.kaiming_uniform_(part.weight, nonlinearity="relu")


class LargeKernelConv(nn.Module):
    """A k x k prediction layer as two pairs of k x 1 and 1 x k convs (GCN; Table 5, "LK").

    Args:
        in_channels: C of the feature map.
        out_channels: Of the prediction, and between the convs of a pair.
        kernel_size: k, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        k, p = kernel_size, kernel_size // 2
        self.left = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, (k, 1), padding=(p, 0)),
            nn.Conv2d(out_channels, out_channels, (1, k), padding=(0, p)),
        )
        self.right = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, (1, k), padding=(0, p)),
            nn.Conv2d(out_channels, out_channels, (k, 1), padding=(p, 0)),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[B, out_channels, h, w] from a feature map [B, C, h, w]."""
        return self.left(feature) + self.right(feature)


def _tower(config: MEInstConfig, depth: int) -> nn.Sequential:
    """`depth` conv units, parameters named `{i}.0` (conv) and `{i}.1` (norm); some of them deformable."""
    units = []
    for i in range(depth):
        deformable = config.deformable == "all" or (config.deformable == "last" and i == depth - 1)
        if deformable:
            conv = SelfOffsetConv2d(config.width, config.width, modulated=config.modulated)
            norm = [group_norm(config.width)] if config.norm == "gn" else []
            units.append(nn.Sequential(conv, *norm, nn.ReLU(inplace=True)))
        else:
            units.append(conv_unit(config.width, config.width, norm=config.norm, bias=True))
    return nn.Sequential(*units)
