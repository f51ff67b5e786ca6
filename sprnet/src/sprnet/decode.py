"""From raw outputs to detections (Sec. 3.2, inference): NMS first, masks of what survives, pasted into the boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.nn.fcos import top_pairs_per_level
from onestage.nn.nms import Kept, pair_nms, settled
from onestage.ops.nms import top_by_score
from onestage.ops.paste import with_masks
from onestage.structures import Detections, ImageFrame, MaskForm
from sprnet import coder
from sprnet.config import SPRNetConfig
from sprnet.targets import ANCHORS_PER_PIXEL

if TYPE_CHECKING:
    from sprnet.model import RawOutput


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

    def decode_image(i: int, room: int | None) -> tuple[Detections, Tensor | None]:
        frame = frames[i]
        kept, boxes = select(raw, i, frame, config, room)
        found = Detections(frame.image_size, frame.to_image(boxes), kept.scores, kept.labels)
        if masks_at is not None and masks != "none":
            soft = masks_at(i, kept.index // ANCHORS_PER_PIXEL, kept.labels).float().sigmoid()
            found = with_masks(found, soft, masks, config.inference.mask_threshold)
        return found, kept.count

    return settled(decode_image, len(frames), raw.logits.device, config.inference.max_detections)


def select(
    raw: RawOutput, i: int, frame: ImageFrame, config: SPRNetConfig, room: int | None = None
) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the anchors of image `i`, in `room` rows if that is given.

    Returns:
        The N survivors, `index` into the anchors of all levels, and their boxes [N, 4] xyxy, input pixels, inside the
        unpadded input.
    """
    rules = config.inference
    pairs = best_pairs(
        raw.logits[i], raw.sizes, rules.score_threshold, rules.candidates_per_level, fixed=room is not None
    )
    boxes = coder.decode(raw.anchors[pairs.index], raw.deltas[i, pairs.index].float(), config)
    boxes = box_ops.clip(boxes, frame.input_size)
    kept = pair_nms(boxes, pairs, iou_threshold=rules.iou_threshold, max_detections=rules.max_detections, room=room)
    return kept.of(pairs.index), kept.take(boxes)


def best_pairs(
    logits: Tensor, sizes: list[tuple[int, int]], threshold: float, per_level: int, *, fixed: bool = False
) -> Kept:
    """The best (anchor, class) pairs of each level.

    Args:
        logits: [A, K].
        sizes: (h, w) of each level.
        threshold: Pairs need a larger score.
        per_level: How many are kept of a level.
        fixed: The number of pairs does not depend on values; those that are no candidates score -1.

    Returns:
        M pairs, `index` their anchor, scores float32 in [0, 1]; level by level, best first, equals in their order.
    """
    num_classes, start = logits.shape[1], 0
    least = torch.tensor(threshold).logit().item()  # compared before the sigmoid: few pass
    counts = [height * width * ANCHORS_PER_PIXEL for height, width in sizes]
    if fixed:
        index, labels, best = top_pairs_per_level(torch.where(logits > least, logits, -torch.inf), counts, per_level)
        return Kept(index, labels, torch.where(best > least, best.float().sigmoid(), -1.0))
    pairs = []
    for level in logits.split(counts):
        flat = level.flatten()
        passing = (flat > least).nonzero().flatten()
        pairs.append(passing[top_by_score(flat[passing], per_level)] + start)
        start += len(flat)
    chosen = torch.cat(pairs)
    return Kept(chosen // num_classes, chosen % num_classes, logits.flatten()[chosen].float().sigmoid())
