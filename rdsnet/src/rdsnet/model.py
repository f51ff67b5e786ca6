"""RDSNet (Wang et al., AAAI 2020): RetinaNet whose anchors also predict how their object's pixels look.

Figure 2: `RDSNet` is the whole, `RetinaNetHead` and `ObjectVectors` the object stream, `PixelVectors` the pixel stream.
The correlation and cropping modules are in decode.py (at inference) and losses.py (in training), MBRM in refine.py.
Where the paper differs from the released code, the code is followed (docs/methods/rdsnet.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn import retinanet
from onestage.nn.fpn import FPN
from onestage.nn.resnet import build_backbone
from onestage.nn.retinanet import STRIDES, RetinaNetHead
from onestage.nn.towers import conv_at, conv_tower, conv_unit, flatten_levels, init_normal
from onestage.structures import FORM_OF, Detections, MaskForm, Target, training_targets
from onestage.transforms import Batch, prepare_batch
from rdsnet.config import RDSNetConfig
from rdsnet.decode import decode
from rdsnet.losses import compute_losses
from rdsnet.refine import MBRM
from rdsnet.targets import assign_targets

NUM_ANCHORS = len(retinanet.RATIOS) * len(retinanet.SCALES)


class RawOutput(NamedTuple):
    """What the network says about B images at the A anchors of all levels."""

    logits: Tensor  # [B, A, K] class logits
    deltas: Tensor  # [B, A, 4], see `onestage.nn.retinanet.decode`, legacy
    anchors: Tensor  # [A, 4] inclusive xyxy, input pixels, level by level, row by row, anchor by anchor
    sizes: list[tuple[int, int]]  # (h, w) of each level
    object_features: list[Tensor]  # per level [B, C, h, w], what object vectors are read from; empty without masks
    pixel_vectors: Tensor | None  # [B, d, H / 4, W / 4]; None without masks
    object_vectors: Tensor | None = None  # [B, A, 2, d], for export; else see `vectors_at`


class RDSNet(nn.Module):
    """RDSNet for images.

    Train: `model(images, targets)` -> dict of scalar losses. Eval: `model(images)` -> list of dicts (`boxes` xyxy
    image pixels, `labels`, `scores`, `masks`; where `config.inference.refine` moves boxes, `unrefined_boxes` too).
    Images are [3, H, W] RGB, uint8 or float in 0..1, of any size; resizing, normalising and padding happen inside.
    `mask_output` says in which form "masks" comes (`Detections.as_dict`).

    Args:
        config: Every switch of the method.
    """

    output_type = RawOutput
    parts_of_decode = ("mbrm",)

    def __init__(self, config: RDSNetConfig):
        super().__init__()
        self.config = config
        self.mask_output = "bool" if config.masks != "none" else "none"
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.channels[1:], config.width, extra="c5", relu_p7=False)
        self.head = RetinaNetHead(
            config.num_classes, config.width, config.tower_depth, norm=config.norm, num_anchors=NUM_ANCHORS
        )
        self.object_vectors = ObjectVectors(config) if config.masks != "none" else None
        self.pixel_vectors = PixelVectors(config) if config.masks != "none" else None
        self.mbrm = MBRM(config.refine)

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            found = self._detect(images, FORM_OF.get(self.mask_output, "binary"))
            return [detections.as_dict(self.mask_output) for detections in found]
        batch = self.training_batch(images, targets)
        raw = self.raw_outputs(batch.pixels)
        assigned = assign_targets(batch.targets or [], batch.frames, raw, self.config)
        return compute_losses(raw, assigned, partial(self.vectors_at, raw), self.config)

    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections with `Masks` in box windows; never a dense mask. Call in eval mode."""
        return self._detect(images, "binary" if masks else "none")

    def training_batch(self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None) -> Batch:
        """Images and their usable instances as the losses see them: boxes inclusive, input pixels."""
        truth = training_targets(targets, images, self.config.num_classes)
        return prepare_batch(images, truth, self.config.input, training=True, legacy_boxes=True)

    def raw_outputs(self, pixels: Tensor) -> RawOutput:
        """Network outputs for normalised, padded pixels [B, 3, H, W]."""
        _, *features = self.backbone(pixels)
        return self.head_outputs(self.fpn(features))

    def dense_outputs(self, pixels: Tensor) -> RawOutput:
        """`raw_outputs` with the vectors of every anchor in place of what they are read from, for export."""
        raw = self.raw_outputs(pixels)
        vectors = None if self.object_vectors is None else self.object_vectors.dense(raw.object_features)
        return raw._replace(object_vectors=vectors, object_features=[])

    def head_outputs(self, levels: list[Tensor]) -> RawOutput:
        """The same from the pyramid P3..P7, each [B, C, h, w]."""
        logits, deltas = self.head(levels)
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        anchors = retinanet.anchors(
            sizes, STRIDES, base_size=self.config.anchor_size, legacy=True, device=logits.device
        )
        if self.object_vectors is None or self.pixel_vectors is None:
            return RawOutput(logits, deltas, anchors, sizes, [], None)
        return RawOutput(logits, deltas, anchors, sizes, self.object_vectors(levels), self.pixel_vectors(levels))

    def vectors_at(self, raw: RawOutput, image: int, index: Tensor) -> Tensor:
        """Background and foreground vectors [N, 2, d] of the anchors `index` [N] int64 of one image."""
        if raw.object_vectors is not None:
            return raw.object_vectors[image, index]
        assert self.object_vectors is not None, "a model without masks has no object vectors"
        return self.object_vectors.at([feature[image] for feature in raw.object_features], index)

    @torch.no_grad()
    def _detect(self, images: list[Tensor], masks: MaskForm) -> list[Detections]:
        batch = prepare_batch(images, None, self.config.input, training=False)
        raw = self.raw_outputs(batch.pixels)
        return decode(raw, batch.frames, partial(self.vectors_at, raw), self.mbrm, self.config, masks)


class ObjectVectors(nn.Module):
    """The third tower of the object stream: two vectors for every anchor, of its background and its foreground.

    Of a hundred thousand anchors a hundred are asked for their vectors, in training as at inference: the last conv
    runs at those alone.
    """

    def __init__(self, config: RDSNetConfig):
        super().__init__()
        self.length = config.vector_length
        self.tower = conv_tower(
            config.width, config.width, config.tower_depth, norm=config.norm, bias=config.norm == "none"
        )
        self.out = nn.Conv2d(config.width, NUM_ANCHORS * 2 * self.length, 3, padding=1)
        init_normal(self)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """The tower's features, [B, C, h, w] per level."""
        return [self.tower(level) for level in levels]

    def dense(self, features: list[Tensor]) -> Tensor:
        """Vectors [B, A, 2, d] of all anchors, from the tower's features."""
        return flatten_levels([self.out(x) for x in features], 2 * self.length).unflatten(2, (2, self.length))

    def at(self, features: list[Tensor], index: Tensor) -> Tensor:
        """Vectors [N, 2, d] of the anchors `index` [N] int64, from the features [C, h, w] of one image's levels."""
        cells = conv_at(self.out, features, index // NUM_ANCHORS)
        anchors = cells.view(len(index), NUM_ANCHORS, 2, self.length)
        return anchors[torch.arange(len(index), device=index.device), index % NUM_ANCHORS]


class PixelVectors(nn.Module):
    """The pixel stream: P3 to P5 brought to one size and turned into one vector for every stride-4 pixel."""

    def __init__(self, config: RDSNetConfig):
        super().__init__()
        width = config.width
        self.lateral = nn.ModuleList(conv_tower(width, width, depth, norm="gn", bias=False) for depth in (1, 1, 2))
        self.fused = conv_unit(width, width, norm="gn", bias=False)
        self.out = nn.Conv2d(width, config.vector_length, 1)
        for part in (self.lateral, self.fused):
            for conv in part.modules():
                if isinstance(conv, nn.Conv2d):
                    nn.init.xavier_uniform_(conv.weight)
        init_normal(self.out)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """[B, d, H / 4, W / 4], any sign, from the pyramid P3..P5 (more levels are not read)."""
        fused = self.lateral[0](levels[0])
        for units, level in zip(self.lateral[1:], levels[1:3], strict=True):
            for unit in units:  # type: ignore[attr-defined]
                level = _twice(unit(level))
            fused = fused + level
        return self.out(_twice(self.fused(fused)))


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
