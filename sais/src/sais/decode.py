"""From raw outputs to detections (Sec. III-A, Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.nn import fcos
from onestage.nn.nms import Kept, class_wise_nms, settled
from onestage.ops.assemble import assemble_masks, assemble_soft, crop_window, resize_maps
from onestage.structures import Detections, ImageFrame, MaskForm
from sais.config import SAISConfig

if TYPE_CHECKING:
    from onestage.masks import Masks
    from sais.model import RawOutput

PROTOTYPE_STRIDE = 4  # input pixels per prototype cell


def decode(
    raw: RawOutput,
    frames: list[ImageFrame],
    coefficients_at: Callable[[int, Tensor], Tensor],
    config: SAISConfig,
    masks: MaskForm = "binary",
) -> list[Detections]:
    """Detections of B images.

    Args:
        raw: Outputs of the network; `coefficients` is not read.
        frames: How each image became input.
        coefficients_at: (image, locations [N]) to coefficients [N, k].
        config: Inference settings.
        masks: `binary` fills `masks`; `soft` and `lowres` fill `soft_masks` at image or prototype resolution. A
            model without masks fills neither.
    """

    def decode_image(i: int, room: int | None) -> tuple[Detections, Tensor | None]:
        frame = frames[i]
        kept, boxes = select(raw, i, frame, config, room)
        found = Detections(frame.image_size, frame.to_image(boxes), kept.scores, kept.labels)
        if raw.prototypes is not None and masks != "none":
            parts = raw.prototypes[i], coefficients_at(i, kept.index), boxes
            if masks == "binary":
                found = replace(found, masks=binary_masks(*parts, frame, config))
            elif masks == "soft":
                found = replace(found, soft_masks=soft_masks(*parts, frame, config))
            else:
                found = replace(found, soft_masks=low_resolution_masks(*parts))
        return found, kept.count

    return settled(decode_image, len(frames), raw.logits.device, config.inference.max_detections)


def select(
    raw: RawOutput, i: int, frame: ImageFrame, config: SAISConfig, room: int | None = None
) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the locations of image `i`, in `room` rows if that is given.

    Returns:
        The N survivors, `index` into the locations of all levels, and their boxes [N, 4] xyxy, input pixels, inside
        the unpadded input.
    """
    rules = config.inference
    scores, centerness = raw.logits[i].float().sigmoid(), raw.centerness[i].float().sigmoid()
    rank = (scores.amax(1) * centerness).split([height * width for height, width in raw.sizes])
    index = fcos.top_per_level(rank, rules.candidates_per_level)
    boxes = box_ops.clip(fcos.decode_ltrb(raw.points[index], raw.distances[i, index]), frame.input_size)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # all of a box around a location in the padding may lie there
    kept = class_wise_nms(
        boxes,
        torch.where(inside[:, None], scores[index], -1.0),
        iou_threshold=rules.iou_threshold,
        score_threshold=rules.score_threshold,
        max_detections=rules.max_detections,
        factors=centerness[index],
        room=room,
    )
    return kept.of(index), kept.take(boxes)


def binary_masks(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, frame: ImageFrame, config: SAISConfig
) -> Masks:
    """Masks of one image: combine, sigmoid, crop, resize, threshold.

    Args:
        prototypes: [k, h, w] at stride 4, >= 0.
        coefficients: [N, k] in (-1, 1).
        boxes: [N, 4] xyxy, input pixels.
        frame: Gives the sizes to resample to.
        config: The threshold, and whether padding is cut off (after the resize).

    Returns:
        `Masks` of the image's size.
    """
    return assemble_masks(
        prototypes,
        coefficients,
        _crop(boxes, prototypes),
        order="prob",
        threshold=config.inference.mask_threshold,
        resized_size=_resized_size(frame, config),
        output_size=frame.image_size,
    )


def soft_masks(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, frame: ImageFrame, config: SAISConfig
) -> Tensor:
    """The probabilities that `binary_masks` thresholds, dense: [N, height, width] of the image, float32."""
    low = low_resolution_masks(prototypes, coefficients, boxes)
    height, width = frame.image_size
    size = _resized_size(frame, config)
    return resize_maps(low, size)[:, :height, :width]


def low_resolution_masks(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Cropped probabilities on the prototype grid, padding included: [N, h, w] float32."""
    return assemble_soft(prototypes, coefficients, _crop(boxes, prototypes))


def _crop(boxes: Tensor, prototypes: Tensor) -> Tensor:
    """Columns with x1 - 1 <= j < x2 + 1 in cells, rows alike, as YOLACT crops."""
    return crop_window(boxes / PROTOTYPE_STRIDE, (prototypes.shape[1], prototypes.shape[2]), "margin")


def _resized_size(frame: ImageFrame, config: SAISConfig) -> tuple[int, int]:
    """Size of the whole prototype canvas in image pixels; what exceeds the image is padding and cut off."""
    if config.inference.emulate_padding_bug:
        return frame.image_size
    height, width = (
        round(padded * image / unpadded)
        for padded, image, unpadded in zip(frame.padded_size, frame.image_size, frame.input_size, strict=True)
    )
    return height, width
