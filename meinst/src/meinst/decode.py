"""From raw outputs to detections, and their masks pasted into the image (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from onestage import boxes as box_ops
from onestage.nn import fcos
from onestage.nn.nms import Kept, greedy_nms, top_by_score
from onestage.ops.paste import with_masks
from onestage.structures import Detections, ImageFrame

if TYPE_CHECKING:
    from meinst.model import RawOutput

MaskForm = Literal["binary", "soft", "lowres", "none"]


def decode(
    raw: RawOutput,
    frames: list[ImageFrame],
    codes_at: Callable[[int, Tensor], Tensor],
    codec: MaskCodec | PixelCodec,
    config: MEInstConfig,
    masks: MaskForm = "binary",
) -> list[Detections]:
    """Detections of B images.

    Args:
        raw: Outputs of the network; `codes` is not read.
        frames: How each image became input.
        codes_at: (image, locations [N]) to codes [N, D].
        codec: Decodes them.
        config: Inference settings.
        masks: `binary` fills `masks`; `soft` and `lowres` fill `soft_masks` at image or box resolution. Without a mask
            branch there are none.
    """
    decoded = []
    for i, frame in enumerate(frames):
        kept, found = to_image(*select(raw, i, config), frame)
        if masks != "none" and config.mask_branch:
            soft = codec.decode(codes_at(i, kept.index), kept.labels)
            found = with_masks(found, soft, masks, config.inference.mask_threshold)
        decoded.append(found)
    return decoded


def select(raw: RawOutput, i: int, config: MEInstConfig) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the locations of image `i`.

    Returns:
        The N survivors, `index` into the locations of all levels, and their boxes [N, 4] xyxy, input pixels, not
        clipped.
    """
    rules = config.inference
    index, labels, scores = fcos.best_pairs(
        raw.logits[i],
        raw.centerness[i],
        raw.sizes,
        score_threshold=rules.score_threshold,
        per_level=rules.candidates_per_level,
        threshold_with_centerness=rules.threshold_with_centerness,
    )
    strides = fcos.per_location(raw.sizes, fcos.STRIDES, index.device)[index]
    boxes = fcos.decode_ltrb(raw.points[index], raw.distances[i, index].float() * strides[:, None])
    kept = greedy_nms(boxes, scores, labels, rules.iou_threshold)
    kept = kept[top_by_score(scores[kept], rules.max_detections, keep_ties=True)]
    return Kept(index[kept], labels[kept], scores[kept]), boxes[kept]


def to_image(kept: Kept, boxes: Tensor, frame: ImageFrame) -> tuple[Kept, Detections]:
    """Boxes in image pixels, cut to the image; those with nothing left are dropped from both."""
    vertical, horizontal = (out / net for out, net in zip(frame.image_size, frame.input_size, strict=True))
    boxes = box_ops.clip(box_ops.scale(boxes, (vertical, horizontal)), frame.image_size)
    left = (boxes[:, 2:] > boxes[:, :2]).all(1)
    kept = Kept(kept.index[left], kept.labels[left], kept.scores[left])
    return kept, Detections(frame.image_size, boxes[left], kept.scores, kept.labels)
