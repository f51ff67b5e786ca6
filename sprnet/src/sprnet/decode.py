"""From raw outputs to detections (Sec. 3.2, inference): NMS first, masks of what survives, pasted into the boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.nn.nms import Kept, greedy_nms, top_by_score
from onestage.ops.paste import with_masks
from onestage.structures import Detections, ImageFrame
from sprnet import coder
from sprnet.config import SPRNetConfig
from sprnet.targets import ANCHORS_PER_PIXEL

if TYPE_CHECKING:
    from sprnet.model import RawOutput

MaskForm = Literal["binary", "soft", "lowres", "none"]


def decode(
    raw: RawOutput,
    frames: list[ImageFrame],
    masks_at: Callable[[int, Tensor, Tensor], Tensor] | None,
    config: SPRNetConfig,
    masks: MaskForm = "binary",
) -> list[Detections]:
    """Detections of B images.

    Args:
        raw: Outputs of the network.
        frames: How each image became input.
        masks_at: (image, pixels [N], classes [N]) to mask logits [N, 32, 32]; None without a mask head.
        config: Inference settings.
        masks: `binary` fills `masks`; `soft` and `lowres` fill `soft_masks` at image size or 32 x 32.
    """
    decoded = []
    for i, frame in enumerate(frames):
        kept, boxes = select(raw, i, frame, config)
        found = Detections(frame.image_size, frame.to_image(boxes), kept.scores, kept.labels)
        if masks_at is not None and masks != "none":
            soft = masks_at(i, kept.index // ANCHORS_PER_PIXEL, kept.labels).float().sigmoid()
            found = with_masks(found, soft, masks, config.inference.mask_threshold)
        decoded.append(found)
    return decoded


def select(raw: RawOutput, i: int, frame: ImageFrame, config: SPRNetConfig) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the anchors of image `i`.

    Returns:
        The N survivors, `index` into the anchors of all levels, and their boxes [N, 4] xyxy, input pixels, inside the
        unpadded input.
    """
    rules = config.inference
    index, labels, scores = best_pairs(raw.logits[i], raw.sizes, rules.score_threshold, rules.candidates_per_level)
    boxes = coder.decode(raw.anchors[index], raw.deltas[i, index].float(), config)
    boxes = box_ops.clip(boxes, frame.input_size)
    kept = greedy_nms(boxes, scores, labels, rules.iou_threshold)
    kept = kept[top_by_score(scores[kept], rules.max_detections)]
    return Kept(index[kept], labels[kept], scores[kept]), boxes[kept]


def best_pairs(
    logits: Tensor, sizes: list[tuple[int, int]], threshold: float, per_level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (anchor, class) pairs of each level.

    Args:
        logits: [A, K].
        sizes: (h, w) of each level.
        threshold: Pairs need a larger score.
        per_level: How many are kept of a level.

    Returns:
        index: [M] int64 anchor.
        labels: [M] int64.
        scores: [M] float32 in [0, 1].
    """
    num_classes, start = logits.shape[1], 0
    least = torch.tensor(threshold).logit().item()  # compared before the sigmoid: few pass
    pairs = []
    for level in logits.split([height * width * ANCHORS_PER_PIXEL for height, width in sizes]):
        flat = level.flatten()
        passing = (flat > least).nonzero().flatten()
        pairs.append(passing[top_by_score(flat[passing], per_level)] + start)
        start += len(flat)
    chosen = torch.cat(pairs)
    return chosen // num_classes, chosen % num_classes, logits.flatten()[chosen].float().sigmoid()
