"""SipMask (Cao et al., ECCV 2020): FCOS whose boxes carry one coefficient set per sub-region.

Figure 3: `SipMask` is the whole, `SipMaskHead` its two branches, `FeatureAlignment` Sec. 3.1, `BasisMasks` Sec. 3.2;
`decode` is Sec. 3.3, `losses` Sec. 3.4, `tracking` and `association` Sec. 3.5. Where the paper is silent or differs
from the released code, the code is followed (docs/methods/sipmask.md): a 1x1 conv before the basis conv, box distances
without exp, centerness.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.errors import UsageError
from onestage.nn import fcos
from onestage.nn.fpn import FPN
from onestage.nn.resnet import build_backbone
from onestage.nn.towers import Scale, conv_at, conv_tower, group_norm, init_normal, prior_bias
from onestage.ops.deform import deform_conv2d
from onestage.structures import FORM_OF, Detections, MaskForm, Target, training_targets
from onestage.transforms import prepare_batch
from sipmask.association import Tracker
from sipmask.config import SipMaskConfig
from sipmask.decode import decode
from sipmask.losses import compute_losses
from sipmask.scoring import MaskScoring
from sipmask.targets import assign_targets
from sipmask.tracking import TrackingBranch

DEFORM_GROUPS = 4


class RawOutput(NamedTuple):
    """What the network says about B images at the P locations of all levels."""

    logits: Tensor  # [B, P, K] class logits
    distances: Tensor  # [B, P, 4] left, top, right, bottom, input pixels; may be negative but under "fc"
    centerness: Tensor  # [B, P] logits
    coefficients: Tensor | None  # [B, P, rows * columns * m]; None at inference, see `coefficients_at`
    aligned: list[Tensor]  # per level [B, C, h, w], what the coefficients are read from
    basis: Tensor  # [B, m, h, w] basis masks at stride 8, >= 0
    points: Tensor  # [P, 2] (x, y) locations, input pixels, level by level, row by row
    sizes: list[tuple[int, int]]  # (h, w) of each level
    tracking: Tensor | None = None  # [B, 3 * C, h, w] tracking features at stride 8, of video models
    reference_tracking: Tensor | None = None  # the same of the reference frames, in training


class SipMask(nn.Module):
    """SipMask for images and, with a tracking branch, for videos.

    Train: `model(images, targets)` -> dict of scalar losses. Eval: `model(images)` -> list of dicts (`boxes` xyxy
    image pixels, `labels`, `scores`, `masks`). Images are [3, H, W] RGB, uint8 or float in 0..1, of any size;
    resizing, normalising and padding happen inside. `mask_output` says in which form "masks" comes
    (`Detections.as_dict`).

    A video model (`config.is_video`) trains on pairs of frames: its targets carry `track_ids` and a `reference`. In
    eval mode it finds instances frame by frame, with an embedding each, and `tracker` says which object they are.

    Args:
        config: Every switch of the method.
    """

    output_type = RawOutput
    parts_of_decode = ("head.scoring", "head.tracking.mix")

    def __init__(self, config: SipMaskConfig):
        super().__init__()
        self.config = config
        self.mask_output = "bool"
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(
            self.backbone.channels[1:],
            config.width,
            extra="p5",
            init="kaiming" if config.profile == "fc" else "xavier",
        )
        self.head = SipMaskHead(config)

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            found = self._detect(images, FORM_OF.get(self.mask_output, "binary"))
            return [detections.as_dict(self.mask_output) for detections in found]
        truth = training_targets(targets, images, self.config.num_classes)
        batch = prepare_batch(images, truth, self.config.input, training=True, legacy_boxes=True)
        if self.config.is_video and batch.references is None:
            raise UsageError(
                "a video model trains on pairs of frames, and a target has no reference frame",
                "give every target track_ids and a reference: a dict of image, boxes and track_ids",
            )
        raw = self.raw_outputs(batch.pixels, batch.references)
        return compute_losses(raw, assign_targets(batch.targets or [], raw, self.config), self.config, self.head)

    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections with `Masks` in box windows; never a dense mask. Call in eval mode."""
        return self._detect(images, "binary" if masks else "none")

    def tracker(self, **overrides: Any) -> Tracker:
        """Follows objects through one video: `tracker.update(model.detect([frame])[0])`, frame by frame.

        Args:
            overrides: Any field of `AssociationConfig` in place of the config's: with `max_age=None` nothing is
                forgotten, with `max_age=30` what was not seen for so many frames.

        Raises:
            UsageError: this is a model for images.
        """
        if not self.config.is_video:
            raise UsageError(
                "this model has no tracking branch and cannot follow objects",
                "use weights of a video variant; sipmask.to_video makes one of an image model, to be trained",
            )
        return Tracker(replace(self.config.association, **overrides))

    def raw_outputs(self, pixels: Tensor, references: Tensor | None = None) -> RawOutput:
        """Network outputs for normalised, padded pixels [B, 3, H, W], and for reference frames of that size."""
        if references is None or not self.config.is_video:
            return self.head(self._pyramid(pixels))
        levels = self._pyramid(torch.cat((pixels, references)))
        raw: RawOutput = self.head([level[: len(pixels)] for level in levels])
        assert self.head.tracking is not None
        return raw._replace(reference_tracking=self.head.tracking([level[len(pixels) :] for level in levels]))

    def dense_outputs(self, pixels: Tensor) -> RawOutput:
        """`raw_outputs` with the coefficients of every location in place of what they are read from, for export."""
        raw = self.raw_outputs(pixels)
        return raw._replace(coefficients=_flatten([self.head.coefficients(x) for x in raw.aligned]), aligned=[])

    def _pyramid(self, pixels: Tensor) -> list[Tensor]:
        _, *features = self.backbone(pixels)
        levels: list[Tensor] = self.fpn(features)
        return levels

    @torch.no_grad()
    def _detect(self, images: list[Tensor], masks: MaskForm) -> list[Detections]:
        batch = prepare_batch(images, None, self.config.input, training=False)
        raw = self.raw_outputs(batch.pixels)
        return decode(raw, batch.frames, self.head, self.config, masks)


class SipMaskHead(nn.Module):
    """The mask-specialised classification and regression branches (Fig. 3a), shared by the levels."""

    def __init__(self, config: SipMaskConfig):
        super().__init__()
        self.config = config
        width = config.width
        bias = config.norm == "none" or config.profile == "fc"  # fc keeps conv biases beside GN
        self.cls_tower = conv_tower(width, width, config.tower_depth - 1, norm=config.norm, bias=bias)
        self.box_tower = conv_tower(width, width, config.tower_depth, norm=config.norm, bias=bias)
        self.alignment = FeatureAlignment(config)
        self.logits = nn.Conv2d(width, config.num_classes, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.coefficients = nn.Conv2d(width, config.num_coefficients, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in fcos.STRIDES)
        self.basis = BasisMasks(config)
        self._initialise()
        # After what an image model has, so that the same seed gives both the same start.
        self.scoring = MaskScoring(config) if config.rescore else None
        self.tracking = TrackingBranch(config) if config.is_video else None

    def forward(self, features: list[Tensor]) -> RawOutput:
        """Raw outputs from the pyramid P3..P7, each [B, C, h, w]."""
        logits, distances, centerness, aligned, box_features = [], [], [], [], []
        sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
        for feature, scale, stride in zip(features, self.scales, fcos.STRIDES, strict=True):
            box_feature = self.box_tower(feature)
            distance = scale(self.distances(box_feature))  # strides, linear: no exp
            if self.config.profile == "fc":
                distance = distance.relu()
            aligned.append(self.alignment(self.cls_tower(feature), distance.detach()))
            logits.append(self.logits(aligned[-1]))
            distances.append(distance * stride)
            centerness.append(self.centerness(box_feature))
            box_features.append(box_feature)
        return RawOutput(
            logits=_flatten(logits),
            distances=_flatten(distances),
            centerness=_flatten(centerness).squeeze(2),
            coefficients=_flatten([self.coefficients(feature) for feature in aligned]) if self.training else None,
            aligned=aligned,
            basis=self.basis(box_features[:3]),
            points=fcos.locations(sizes, device=features[0].device),
            sizes=sizes,
            tracking=None if self.tracking is None else self.tracking(features),
        )

    def coefficients_at(self, raw: RawOutput, image: int, index: Tensor) -> Tensor:
        """Coefficients [N, rows * columns * m] of the locations `index` [N] int64 of one image."""
        if raw.coefficients is not None:
            return raw.coefficients[image, index]
        return conv_at(self.coefficients, [feature[image] for feature in raw.aligned], index)

    def _initialise(self) -> None:
        for part in (self.cls_tower, self.box_tower, self.alignment, self.logits, self.distances, self.centerness):
            init_normal(part)
        if self.config.profile != "fc":  # fc leaves both to the framework's default
            init_normal(self.basis)
            init_normal(self.coefficients, 0.001 if self.config.profile == "mm" else 0.01)
        assert self.logits.bias is not None
        nn.init.constant_(self.logits.bias, prior_bias())
        if self.alignment.offset is not None:
            nn.init.zeros_(self.alignment.offset.weight)


class FeatureAlignment(nn.Module):
    """Re-samples the class feature where the predicted box says (Sec. 3.1, Eq. 1): a deformable 3x3 conv.

    Its offsets are a linear function of the four distances and start at zero, as a plain conv.
    """

    def __init__(self, config: SipMaskConfig):
        super().__init__()
        width = config.width
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=config.profile == "fc")
        self.norm = group_norm(width) if config.norm == "gn" else nn.Identity()
        # (group, tap, dy dx), as torchvision orders them.
        self.offset = nn.Conv2d(4, DEFORM_GROUPS * 9 * 2, 1, bias=False) if config.align_features else None

    def forward(self, feature: Tensor, distances: Tensor) -> Tensor:
        """Aligned feature [B, C, h, w].

        Args:
            feature: [B, C, h, w] last class-tower feature.
            distances: [B, 4, h, w] left, top, right, bottom in strides, detached.
        """
        if self.offset is None:
            aligned = self.conv(feature)
        else:
            aligned = deform_conv2d(feature, self.offset(distances), self.conv.weight, self.conv.bias, padding=1)
        return self.norm(aligned).relu()


class BasisMasks(nn.Module):
    """Contextual basis masks from the box features of P3 to P5 (Sec. 3.2), at stride 8 and non-negative.

    Everything after is linear, so the up-sampling to `config.basis_stride` is left to whoever combines them.
    """

    def __init__(self, config: SipMaskConfig):
        super().__init__()
        self.levels = tuple(("P3", "P4", "P5").index(level) for level in config.basis_levels)
        self.reduce = nn.Conv2d(config.width * len(self.levels), config.basis_hidden, 1)
        self.out = nn.Conv2d(config.basis_hidden, config.num_bases, 3, padding=1)

    def forward(self, box_features: list[Tensor]) -> Tensor:
        """[B, m, h, w] from the box-tower outputs of P3, P4, P5, each [B, C, h / 2^i, w / 2^i]."""
        size = box_features[0].shape[-2:]
        joined = torch.cat(
            [
                box_features[i]
                if i == 0
                else F.interpolate(box_features[i], size=size, mode="bilinear", align_corners=False)
                for i in self.levels
            ],
            1,
        )
        return self.out(self.reduce(joined).relu()).relu()


def _flatten(maps: list[Tensor]) -> Tensor:
    """[B, P, C] from per-level [B, C, h, w], row-major."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
