"""The real-time model at 550 x 550: RDSNet_s, which is YOLACT (Bolya et al. 2019) with RDSNet's masks, and YOLACT.

YOLACT is Table 3's baseline, "LC": a mask is a linear combination of prototypes. RDSNet_s was never released; what the
paper leaves open is said in docs/methods/rdsnet.md. Boxes here are exclusive and *relative*: 1 is the input's side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestage import boxes as box_ops
from onestage.nn import retinanet
from onestage.nn.fpn import FPN
from onestage.nn.nms import Kept, fast_nms, settled
from onestage.nn.protonet import ProtoNet, init_xavier
from onestage.nn.resnet import build_backbone
from onestage.nn.towers import conv_at, conv_tower, flatten_levels
from onestage.ops.assemble import assemble_masks, assemble_soft, crop_window, resize_maps
from onestage.structures import FORM_OF, Detections, ImageFrame, MaskForm, Target, training_targets
from onestage.transforms import prepare_batch
from rdsnet.config import RDSNetConfig
from rdsnet.decode import Correlation, complete, contrast
from rdsnet.small_losses import VARIANCES, compute_losses

RATIOS = (1.0, 0.5, 2.0)  # width / height


class SmallOutput(NamedTuple):
    """What the network says about B images at the A anchors of all levels."""

    logits: Tensor  # [B, A, K + 1] of a softmax whose class 0 is the background
    deltas: Tensor  # [B, A, 4] centre shift and log side ratio over `VARIANCES`
    anchors: Tensor  # [A, 4] relative xyxy, level by level, row by row, anchor by anchor
    features: list[Tensor]  # per level [B, C, h, w], what mask vectors are read from
    pixel_vectors: Tensor  # [B, d, h, w]; prototypes in YOLACT's words
    semantic: Tensor | None  # [B, K, h, w] logits at P3, in training only
    vectors: Tensor | None = None  # [B, A, d] or [B, A, 2, d], for export; else see `vectors_at`


class RDSNetSmall(nn.Module):
    """RDSNet_s (`masks="corr"`) or YOLACT (`masks="lc"`) for images; used as `RDSNet`.

    Args:
        config: With detector "yolact".
    """

    output_type = SmallOutput
    parts_of_decode = ()

    def __init__(self, config: RDSNetConfig):
        super().__init__()
        self.config = config
        self.mask_output = "bool"
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.channels[1:], config.width, top_down="bilinear", relu_outputs=True, relu_p7=False)
        self.pixel_vectors = ProtoNet(
            config.width, config.width, config.vector_length, relu=config.yolact.prototype_relu
        )
        self.head = SmallHead(config)
        self.semantic = nn.Conv2d(config.width, config.num_classes, 1)
        init_xavier(self.semantic)

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            found = self._detect(images, FORM_OF.get(self.mask_output, "binary"))
            return [detections.as_dict(self.mask_output) for detections in found]
        truth = training_targets(targets, images, self.config.num_classes, crowds=True)
        batch = prepare_batch(images, truth, self.config.input, training=True)
        raw = self.raw_outputs(batch.pixels)
        return compute_losses(raw, batch.targets or [], partial(self.vectors_at, raw), self.config)

    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections with `Masks` in box windows; never a dense mask. Call in eval mode."""
        return self._detect(images, "binary" if masks else "none")

    def raw_outputs(self, pixels: Tensor) -> SmallOutput:
        """Network outputs for normalised pixels [B, 3, H, W]."""
        _, *features = self.backbone(pixels)
        return self.head_outputs(self.fpn(features), (pixels.shape[2], pixels.shape[3]))

    def dense_outputs(self, pixels: Tensor) -> SmallOutput:
        """`raw_outputs` with the vectors of every anchor in place of what they are read from, for export."""
        raw = self.raw_outputs(pixels)
        return raw._replace(vectors=self.head.dense_vectors(raw.features), features=[])

    def head_outputs(self, levels: list[Tensor], input_size: tuple[int, int]) -> SmallOutput:
        """The same from the pyramid P3..P7, each [B, C, h, w], of inputs of (height, width)."""
        features, logits, deltas = self.head(levels)
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        if logits.device.type == "cuda" and not torch.compiler.is_compiling():
            anchors = _anchors_on(logits.device, tuple(sizes), input_size, self.config)
        else:
            anchors = relative_anchors(sizes, input_size, self.config).to(logits.device)
        semantic = self.semantic(levels[0]) if self.training else None
        return SmallOutput(logits, deltas, anchors, features, self.pixel_vectors(levels[0]), semantic)

    def vectors_at(self, raw: SmallOutput, image: int, index: Tensor) -> Tensor:
        """Of the anchors `index` [N] int64 of one image: coefficients [N, d], or two vectors [N, 2, d]."""
        if raw.vectors is not None:
            return raw.vectors[image, index]
        return self.head.vectors_at([feature[image] for feature in raw.features], index)

    @torch.no_grad()
    def _detect(self, images: list[Tensor], masks: MaskForm) -> list[Detections]:
        batch = prepare_batch(images, None, self.config.input, training=False)
        raw = self.raw_outputs(batch.pixels)
        return decode(raw, batch.frames, partial(self.vectors_at, raw), self.config, masks)


class SmallHead(nn.Module):
    """One shared conv and three prediction convs, for all levels."""

    def __init__(self, config: RDSNetConfig):
        super().__init__()
        self.config = config
        self.num_vectors = 1 if config.masks == "lc" else 2
        self.shared = conv_tower(config.width, config.width, 1, norm="none", bias=True)
        self.logits = nn.Conv2d(config.width, len(RATIOS) * (config.num_classes + 1), 3, padding=1)
        self.deltas = nn.Conv2d(config.width, len(RATIOS) * 4, 3, padding=1)
        self.vectors = nn.Conv2d(config.width, len(RATIOS) * self.num_vectors * config.vector_length, 3, padding=1)
        init_xavier(self)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Shared features [B, C, h, w] per level, class logits [B, A, K + 1] and deltas [B, A, 4]."""
        features = [self.shared(level) for level in levels]
        logits = flatten_levels([self.logits(feature) for feature in features], self.config.num_classes + 1)
        return features, logits, flatten_levels([self.deltas(feature) for feature in features], 4)

    def dense_vectors(self, features: list[Tensor]) -> Tensor:
        """What `vectors_at` says of all anchors: [B, A, d] or [B, A, 2, d]."""
        length = self.config.vector_length
        vectors = flatten_levels([self.vectors(x) for x in features], self.num_vectors * length)
        return vectors.tanh() if self.config.masks == "lc" else vectors.unflatten(2, (self.num_vectors, length))

    def vectors_at(self, features: list[Tensor], index: Tensor) -> Tensor:
        """[N, d] in (-1, 1) or [N, 2, d] of any sign, of the anchors `index` [N] int64."""
        shape = (len(index), len(RATIOS), self.num_vectors, self.config.vector_length)
        cells = conv_at(self.vectors, features, index // len(RATIOS)).view(shape)
        vectors = cells[torch.arange(len(index), device=index.device), index % len(RATIOS)]
        return vectors[:, 0].tanh() if self.config.masks == "lc" else vectors


def relative_anchors(sizes: list[tuple[int, int]], input_size: tuple[int, int], config: RDSNetConfig) -> Tensor:
    """Anchors [A, 4] relative xyxy, centred in their cells, one for each of `RATIOS`.

    The published weights were trained with `config.yolact.square_anchors`: a slip gave all of them their width as
    height, and keeping it keeps the weights usable.
    """
    levels = []
    for (height, width), side in zip(sizes, config.yolact.anchor_sides, strict=True):
        root = torch.tensor(RATIOS).sqrt()
        wide = side * root / input_size[1]
        high = side * root / input_size[0] if config.yolact.square_anchors else side / root / input_size[0]
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        centre = torch.stack((x.repeat(height), y.repeat_interleave(width)), 1)[:, None]  # [cells, 1, 2]
        half = torch.stack((wide, high), 1)[None] / 2
        levels.append(torch.cat((centre - half, centre + half), 2).reshape(-1, 4))
    return torch.cat(levels)


@lru_cache(maxsize=8)  # copied once: a copy to the GPU has no place in a CUDA graph
def _anchors_on(
    device: torch.device, sizes: tuple[tuple[int, int], ...], input_size: tuple[int, int], config: RDSNetConfig
) -> Tensor:
    return relative_anchors(list(sizes), input_size, config).to(device)


def decode(
    raw: SmallOutput,
    frames: list[ImageFrame],
    vectors_at: Callable[[int, Tensor], Tensor],
    config: RDSNetConfig,
    masks: MaskForm = "binary",
) -> list[Detections]:
    """Detections of B images; arguments as of `rdsnet.decode.decode`, `vectors_at` as the method of that name.

    `masks`: a linear combination is cropped on its own grid, so `lowres` is cropped too.
    """

    def decode_image(i: int, room: int | None) -> tuple[Detections, Tensor | None]:
        frame = frames[i]
        kept, boxes = select(raw, i, config, room)
        whole = box_ops.to_legacy(whole_pixels(boxes, frame.image_size))
        if masks == "none" or config.masks == "corr":
            correlation = None
            if masks != "none":
                correlation = Correlation(raw.pixel_vectors[i], contrast(vectors_at(i, kept.index)))
            return complete(kept, whole, correlation, frame, None, config, masks), kept.count
        found = complete(kept, whole, None, frame, None, config, "none")
        combined = raw.pixel_vectors[i], vectors_at(i, kept.index), crop(boxes, raw.pixel_vectors[i])
        if masks == "binary":
            threshold = config.inference.mask_threshold
            found = replace(found, masks=assemble_masks(*combined, threshold=threshold, output_size=frame.image_size))
        else:
            soft = assemble_soft(*combined)
            if masks == "soft":
                soft = resize_maps(soft, frame.image_size)
            found = replace(found, soft_masks=soft)
        return found, kept.count

    return settled(decode_image, len(frames), raw.logits.device, config.inference.max_detections)


def select(raw: SmallOutput, i: int, config: RDSNetConfig, room: int | None = None) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the anchors of image `i`, in `room` rows if that is given.

    Returns:
        The N survivors, `index` into the anchors of all levels, and their boxes [N, 4], relative.
    """
    rules = config.inference
    scores = raw.logits[i].float().softmax(1)[:, 1:]
    # The threshold chooses anchors: a chosen one brings all its classes along.
    chosen = scores.amax(1) > rules.score_threshold
    if room is None:
        index = chosen.nonzero().flatten()
        scores = scores[index]
    else:
        index = torch.arange(len(scores), device=scores.device)
        scores = torch.where(chosen[:, None], scores, -1.0)
    deltas = raw.deltas[i, index].float()
    deltas = torch.cat((deltas[:, :2] * VARIANCES[0], deltas[:, 2:] * VARIANCES[2]), 1)
    boxes = retinanet.decode(raw.anchors[index], deltas)
    kept = fast_nms(
        boxes,
        scores,
        iou_threshold=rules.iou_threshold,
        score_threshold=0.0,
        max_detections=rules.max_detections,
        top_k=config.yolact.top_k,
        room=room,
    )
    return kept.of(index), kept.take(boxes)


def whole_pixels(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Relative boxes [N, 4] in whole pixels of an image of (height, width): ends put in order, clipped, exclusive."""
    boxes = torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)
    pixels = box_ops.scale(boxes, (float(image_size[0]), float(image_size[1])))
    return box_ops.clip(pixels, image_size).trunc()


def crop(boxes: Tensor, pixel_vectors: Tensor) -> Tensor:
    """Windows [N, 4] of relative boxes on the grid of [d, h, w], one cell more on each side."""
    extent = (pixel_vectors.shape[1], pixel_vectors.shape[2])
    return crop_window(box_ops.scale(boxes, (float(extent[0]), float(extent[1]))), extent, "margin")
