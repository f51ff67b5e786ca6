"""From raw outputs to detections (spec section 6), and their masks pasted into the image (spec section 3.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from onestage import boxes as box_ops
from onestage.nn import fcos
from onestage.nn.nms import greedy_nms, top_by_score
from onestage.ops.paste import paste_masks, paste_soft
from onestage.structures import Detections, ImageFrame

if TYPE_CHECKING:
    from meinst.model import RawOutput


@dataclass(frozen=True)
class Selected:
    """The N detections of one image before their masks exist, scores descending.

    Args:
        index: [N] int64 location of each detection; one location may appear with several classes.
        boxes: [N, 4] xyxy, input pixels, not clipped.
        scores: [N] float32 in [0, 1].
        labels: [N] int64.
    """

    index: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __getitem__(self, keep: Tensor) -> Selected:
        return Selected(self.index[keep], self.boxes[keep], self.scores[keep], self.labels[keep])


def decode(
    raw: RawOutput,
    frames: list[ImageFrame],
    codes_at: Callable[[int, Tensor], Tensor],
    codec: MaskCodec | PixelCodec,
    config: MEInstConfig,
    masks: Literal["binary", "soft", "lowres", "none"] = "binary",
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
        selected, found = to_image(select(raw, i, config), frame)
        if masks != "none" and config.mask_branch:
            soft = codec.decode(codes_at(i, selected.index), selected.labels)
            if masks == "binary":
                pasted = paste_masks(soft, found.boxes, frame.image_size, config.inference.mask_threshold)
                found = replace(found, masks=pasted)
            else:
                found = replace(
                    found, soft_masks=soft if masks == "lowres" else paste_soft(soft, found.boxes, frame.image_size)
                )
        decoded.append(found)
    return decoded


def select(raw: RawOutput, i: int, config: MEInstConfig) -> Selected:
    """Scores, decodes and suppresses the locations of image `i`."""
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
    return Selected(index[kept], boxes[kept], scores[kept], labels[kept])


def to_image(selected: Selected, frame: ImageFrame) -> tuple[Selected, Detections]:
    """Boxes in image pixels, cut to the image; those with nothing left are dropped from both."""
    vertical, horizontal = (out / net for out, net in zip(frame.image_size, frame.input_size, strict=True))
    boxes = box_ops.clip(box_ops.scale(selected.boxes, (vertical, horizontal)), frame.image_size)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    selected = selected[kept]
    return selected, Detections(frame.image_size, boxes[kept], selected.scores, selected.labels)
