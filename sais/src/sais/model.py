"""SAIS (Xiang et al., 2019): FCOS whose locations also predict how to combine image-wide prototype masks.

Figure 1: `SAIS` is the whole, `SAISHead` the shared head of a pyramid level (yellow), the core's `ProtoNet` the green
box. Eq. 1 is `decode`, Eq. 2 to 4 are `targets`. The paper leaves most layers open; docs/methods/sais.md says whose
choice each one is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestage.nn import fcos
from onestage.nn.fpn import FPN
from onestage.nn.protonet import ProtoNet
from onestage.nn.resnet import build_backbone
from onestage.nn.towers import Scale, conv_at, conv_tower, flatten_levels, init_normal, prior_bias
from onestage.structures import FORM_OF, Detections, MaskForm, Target, training_targets
from onestage.transforms import prepare_batch
from sais.config import SAISConfig
from sais.decode import decode
from sais.losses import compute_losses
from sais.targets import assign_targets


class RawOutput(NamedTuple):
    """What the network says about B images at the P locations of all levels."""

    points: Tensor  # [P, 2] (x, y) locations, input pixels, level by level, row by row
    sizes: list[tuple[int, int]]  # (h, w) of each level
    logits: Tensor  # [B, P, K] class logits
    distances: Tensor  # [B, P, 4] left, top, right, bottom, input pixels, > 0
    centerness: Tensor  # [B, P] logits
    features: list[Tensor]  # per level [B, C, h, w], what the coefficients are read from
    coefficients: Tensor | None  # [B, P, k] in (-1, 1); None at inference, see `SAISHead.coefficients_at`
    prototypes: Tensor | None  # [B, k, H / 4, W / 4], >= 0; None without masks


class SAIS(nn.Module):
    """SAIS for images.

    Train: `model(images, targets)` -> dict of scalar losses. Eval: `model(images)` -> list of dicts (`boxes` xyxy
    image pixels, `labels`, `scores`, `masks`). Images are [3, H, W] RGB, uint8 or float in 0..1, of any size;
    resizing, normalising and padding happen inside. `mask_output` says in which form "masks" comes
    (`Detections.as_dict`).

    Args:
        config: Every switch of the method.
    """

    output_type = RawOutput
    parts_of_decode = ()

    def __init__(self, config: SAISConfig):
        super().__init__()
        self.config = config
        self.mask_output = "bool" if config.masks else "none"
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.channels[1:], config.width, extra="p5")
        self.head = SAISHead(config)
        self.protonet = ProtoNet(config.width, config.prototype_width, config.num_prototypes) if config.masks else None

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            found = self._detect(images, FORM_OF.get(self.mask_output, "binary"))
            return [detections.as_dict(self.mask_output) for detections in found]
        truth = training_targets(targets, images, self.config.num_classes)
        batch = prepare_batch(images, truth, self.config.input, training=True)
        raw = self.raw_outputs(batch.pixels)
        return compute_losses(raw, assign_targets(batch.targets or [], raw, self.config), self.config)

    def raw_outputs(self, pixels: Tensor) -> RawOutput:
        """Network outputs for normalised, padded pixels [B, 3, H, W]."""
        _, *features = self.backbone(pixels)
        levels = self.fpn(features)
        raw: RawOutput = self.head(levels)
        # Not by `_replace`, which torch.compile does not trace.
        return raw if self.protonet is None else RawOutput(*(*raw[:-1], self.protonet(levels[0])))

    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections with `Masks` in box windows; never a dense mask. Call in eval mode."""
        return self._detect(images, "binary" if masks else "none")

    def dense_outputs(self, pixels: Tensor) -> RawOutput:
        """`raw_outputs` with the coefficients of every location in place of what they are read from, for export."""
        raw = self.raw_outputs(pixels)
        return raw._replace(coefficients=self.head.dense_coefficients(raw.features), features=[])

    @torch.no_grad()
    def _detect(self, images: list[Tensor], masks: MaskForm) -> list[Detections]:
        batch = prepare_batch(images, None, self.config.input, training=False)
        raw = self.raw_outputs(batch.pixels)
        return decode(raw, batch.frames, partial(self.head.coefficients_at, raw), self.config, masks)


class SAISHead(nn.Module):
    """Class, centerness, box and coefficient outputs of two towers, shared by the levels.

    Pyramid levels [B, C, h, w] in, `RawOutput` of their P locations out (`forward`).

    Args:
        config: Widths, and whether coefficients are predicted and from what (`masks`, `fuse`).
    """

    def __init__(self, config: SAISConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.cls_tower = conv_tower(width, width, config.tower_depth, norm="gn", bias=False)
        self.box_tower = conv_tower(width, width, config.tower_depth, norm="gn", bias=False)
        self.logits = nn.Conv2d(width, config.num_classes, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.coefficients = nn.Conv2d(width, config.num_prototypes, 3, padding=1) if config.masks else None
        self.scales = nn.ModuleList(Scale() for _ in fcos.STRIDES)
        init_normal(self)
        nn.init.constant_(self.logits.bias, prior_bias(0.01))  # type: ignore[arg-type]

    def forward(self, levels: list[Tensor]) -> RawOutput:
        """Raw outputs, prototypes not yet among them, from the pyramid P3..P7, each [B, C, h, w]."""
        logits, distances, centerness, fused = [], [], [], []
        for level, scale in zip(levels, self.scales, strict=True):
            cls_feature, box_feature = self.cls_tower(level), self.box_tower(level)
            logits.append(self.logits(cls_feature))
            centerness.append(self.centerness(cls_feature))
            with _no_autocast(level.device.type):  # one step of bf16 would be 1 % of a box's side
                distances.append(scale(self.distances(box_feature.float())).exp())
            fused.append(cls_feature + box_feature if self.config.fuse else cls_feature)
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        return RawOutput(
            fcos.locations(sizes, device=levels[0].device),
            sizes,
            flatten_levels(logits, self.config.num_classes),
            flatten_levels(distances, 4),
            flatten_levels(centerness, 1).squeeze(2),
            fused,
            self.dense_coefficients(fused) if self.training else None,
            None,
        )

    def dense_coefficients(self, features: list[Tensor]) -> Tensor | None:
        """Coefficients [B, P, k] of all locations, from the features they are read from; None without masks."""
        if self.coefficients is None:
            return None
        return flatten_levels([self.coefficients(x) for x in features], self.config.num_prototypes).tanh()

    def coefficients_at(self, raw: RawOutput, image: int, index: Tensor) -> Tensor:
        """Coefficients [N, k] of the locations `index` [N] int64 of one image."""
        if raw.coefficients is not None:
            return raw.coefficients[image, index]
        assert self.coefficients is not None, "a model without masks has no coefficients"
        return conv_at(self.coefficients, [feature[image] for feature in raw.features], index).tanh()


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Ends autocast where there is any; an exported graph would keep the context as an operator of its own."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
