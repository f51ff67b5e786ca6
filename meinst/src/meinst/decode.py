"""From raw outputs to detections, and their masks pasted into the image (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from onestage import boxes as box_ops
from onestage.nn import fcos
from onestage.nn.nms import TIES, Kept, pair_nms, settled
from onestage.ops.paste import with_masks
from onestage.structures import Detections, ImageFrame, MaskForm

if TYPE_CHECKING:
    from meinst.model import RawOutput


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

    def decode_image(i: int, room: int | None) -> tuple[Detections, Tensor | None]:
        kept, found = to_image(*select(raw, i, config, room), frames[i])
        if masks != "none" and config.mask_branch:
            soft = codec.decode(codes_at(i, kept.index), kept.labels)
            found = with_masks(found, soft, masks, config.inference.mask_threshold)
        return found, kept.count

    return settled(decode_image, len(frames), raw.logits.device, config.inference.max_detections + TIES)


def select(raw: RawOutput, i: int, config: MEInstConfig, room: int | None = None) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the locations of image `i`, in `room` rows if that is given.

    Returns:
        The N survivors, `index` into the locations of all levels, and their boxes [N, 4] xyxy, input pixels, not
        clipped.
    """
    rules = config.inference
    pairs = fcos.best_pairs(
        raw.logits[i],
        raw.centerness[i],
        raw.sizes,
        score_threshold=rules.score_threshold,
        per_level=rules.candidates_per_level,
        threshold_with_centerness=rules.threshold_with_centerness,
        fixed=room is not None,
    )
    index = pairs.index
    strides = fcos.per_location(raw.sizes, fcos.STRIDES, index.device)[index]
    boxes = fcos.decode_ltrb(raw.points[index], raw.distances[i, index].float() * strides[:, None])
    kept = pair_nms(
        boxes,
        pairs,
        iou_threshold=rules.iou_threshold,
        max_detections=rules.max_detections,
        keep_ties=True,
        room=room,
    )
    return kept.of(index), kept.take(boxes)


def to_image(kept: Kept, boxes: Tensor, frame: ImageFrame) -> tuple[Kept, Detections]:
    """Boxes in image pixels, cut to the image; those with nothing left are dropped from both."""
    vertical, horizontal = (out / net for out, net in zip(frame.image_size, frame.input_size, strict=True))
    boxes = box_ops.clip(box_ops.scale(boxes, (vertical, horizontal)), frame.image_size)
    kept, place = kept.those((boxes[:, 2:] > boxes[:, :2]).all(1))
    return kept, Detections(frame.image_size, boxes[place], kept.scores, kept.labels)
