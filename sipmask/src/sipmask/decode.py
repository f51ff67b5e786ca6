"""From raw outputs to detections (Sec. 3.3; both released ways, docs/methods/sipmask.md).

Boxes stay legacy (inclusive) until `to_image`, which makes them exclusive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage import boxes as box_ops
from onestage.nn import fcos
from onestage.nn.nms import TIES, Kept, class_wise_nms, fast_nms, pair_nms, settled
from onestage.ops.assemble import assemble_masks, assemble_soft, crop_window, resize_maps
from onestage.structures import Detections, ImageFrame, MaskForm
from sipmask.config import SipMaskConfig

if TYPE_CHECKING:
    from onestage.masks import Masks
    from sipmask.model import RawOutput, SipMaskHead


@dataclass(frozen=True)
class Selected:
    """The N detections of one image before their masks exist, scores descending.

    Args:
        index: [N] int64 location of each detection; one location may appear with several classes.
        boxes: [N, 4] legacy xyxy, input pixels, inside the unpadded input.
        scores: [N] float32 in [0, 1].
        labels: [N] int64.
        count: How many of the N there are, as `onestage.nn.nms.Kept` has it.
    """

    index: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor | None = None

    @staticmethod
    def of(kept: Kept, index: Tensor, boxes: Tensor) -> Selected:
        """The survivors of candidates at locations `index`, with boxes [*, 4]."""
        return Selected(kept.take(index), kept.take(boxes), kept.scores, kept.labels, kept.count)


def decode(
    raw: RawOutput,
    frames: list[ImageFrame],
    head: SipMaskHead,
    config: SipMaskConfig,
    masks: MaskForm = "binary",
) -> list[Detections]:
    """Detections of B images.

    Args:
        raw: Outputs of the network; `coefficients` is not read.
        frames: How each image became input.
        head: Gives the coefficients of what was selected, the masks' scores and the embeddings.
        config: Inference settings and grid.
        masks: `binary` fills `masks`; `soft` and `lowres` fill `soft_masks` at image or basis resolution. But for
            `none`, a model that re-scores fills `mask_scores`.
    """

    def decode_image(i: int, room: int | None) -> tuple[Detections, Tensor | None]:
        frame = frames[i]
        selected = select(raw, i, frame, config, room)
        found = to_image(selected, frame)
        if head.tracking is not None:
            assert raw.tracking is not None
            found = replace(found, embeddings=head.tracking.embed(raw.tracking[i], selected.boxes))
        if masks != "none":
            parts = raw.basis[i], head.coefficients_at(raw, i, selected.index), selected.boxes
            if head.scoring is not None:
                iou = head.scoring(low_resolution_masks(*parts, config), selected.labels)
                found = replace(found, mask_scores=iou * selected.scores)
            if masks == "binary":
                found = replace(found, masks=assemble(*parts, frame, config))
            elif masks == "soft":
                found = replace(found, soft_masks=soft_masks(*parts, frame, config))
            else:
                found = replace(found, soft_masks=low_resolution_masks(*parts, config))
        return found, selected.count

    return settled(decode_image, len(frames), raw.logits.device, config.inference.max_detections + TIES)


def select(raw: RawOutput, i: int, frame: ImageFrame, config: SipMaskConfig, room: int | None = None) -> Selected:
    """Scores, decodes and suppresses the locations of one image.

    Args:
        raw: Outputs of the network for B images; class scores, distances and centerness are read.
        i: Which of the B images.
        frame: How it became input.
        config: Inference settings and profile.
        room: Rows of the result, see `onestage.nn.nms.settled`; None: as many as there are detections.
    """
    rules = config.inference
    if config.profile == "fc":
        return _select_pairs(raw, i, frame, config, room)
    scores, centerness = raw.logits[i].float().sigmoid(), raw.centerness[i].float().sigmoid()
    index = _candidates(scores.amax(1) * centerness, raw.sizes, rules.candidates_per_level)
    scores, centerness = scores[index], centerness[index]
    boxes = _boxes(raw, i, index, frame)
    if rules.nms == "fast":
        # No +1 in this IoU, so neither the frame nor unequal axis scales matter.
        kept = fast_nms(
            boxes,
            scores * centerness[:, None],
            iou_threshold=rules.iou_threshold,
            score_threshold=rules.score_threshold,
            max_detections=rules.max_detections,
            room=room,
        )
    else:
        kept = class_wise_nms(
            _unscale(boxes, frame),  # the +1 of this IoU is one pixel of the original image
            scores,
            iou_threshold=rules.iou_threshold,
            score_threshold=rules.score_threshold,
            max_detections=rules.max_detections,
            factors=centerness,
            legacy=True,
            room=room,
        )
    return Selected.of(kept, index, boxes)


def to_image(selected: Selected, frame: ImageFrame) -> Detections:
    """What was selected as `Detections` without masks: boxes in image pixels, exclusive, at least one pixel wide and
    high.

    Linear distances may be negative and turn a box inside out, mostly in untrained models.

    Args:
        selected: N detections, boxes legacy, input pixels.
        frame: How the image became input.
    """
    boxes = _unscale(selected.boxes, frame)
    boxes = torch.cat((boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)
    return Detections(frame.image_size, box_ops.from_legacy(boxes), selected.scores, selected.labels)


def assemble(basis: Tensor, coefficients: Tensor, boxes: Tensor, frame: ImageFrame, config: SipMaskConfig) -> Masks:
    """Masks of one image: combine, sigmoid, prune by sub-region, up-sample, threshold, cut

    Args:
        basis: [m, h, w] basis masks at stride 8, >= 0.
        coefficients: [N, rows * columns * m].
        boxes: [N, 4] legacy xyxy, input pixels.
        frame: Gives the sizes to resample to.
        config: Grid, up-sampling, threshold.

    Returns:
        `Masks` of the image's size.
    """
    cells, windows, extent = _on_grid(boxes, basis, config)
    return assemble_masks(
        basis,
        coefficients,
        windows,
        boxes=cells,
        grid=config.grid,
        upsample=config.basis_upsample,
        order="prob",
        threshold=config.inference.mask_threshold,
        resized_size=_resized_size(extent, frame, config),
        output_size=frame.image_size,
    )


def soft_masks(basis: Tensor, coefficients: Tensor, boxes: Tensor, frame: ImageFrame, config: SipMaskConfig) -> Tensor:
    """The probabilities that `assemble` thresholds, dense: [N, height, width] of the image, float32."""
    low = low_resolution_masks(basis, coefficients, boxes, config)
    size = _resized_size((low.shape[1], low.shape[2]), frame, config)
    height, width = frame.image_size
    soft = resize_maps(low, size)[:, :height, :width]
    return F.pad(soft, (0, width - soft.shape[2], 0, height - soft.shape[1]))


def low_resolution_masks(basis: Tensor, coefficients: Tensor, boxes: Tensor, config: SipMaskConfig) -> Tensor:
    """Cropped probabilities on the basis grid after up-sampling: [N, h, w] at `config.basis_stride`, float32."""
    cells, windows, _ = _on_grid(boxes, basis, config)
    return assemble_soft(basis, coefficients, windows, boxes=cells, grid=config.grid, upsample=config.basis_upsample)


def _select_pairs(raw: RawOutput, i: int, frame: ImageFrame, config: SipMaskConfig, room: int | None) -> Selected:
    """The fcos_core way: candidates are (location, class) pairs, their score a geometric mean."""
    rules = config.inference
    pairs = fcos.best_pairs(
        raw.logits[i],
        raw.centerness[i],
        raw.sizes,
        score_threshold=rules.score_threshold,
        per_level=rules.candidates_per_level,
        fixed=room is not None,
    )
    boxes = _boxes(raw, i, pairs.index, frame)
    kept = pair_nms(
        boxes,
        pairs,
        iou_threshold=rules.iou_threshold,
        max_detections=rules.max_detections,
        legacy=True,
        keep_ties=True,
        room=room,
    )
    return Selected.of(kept, pairs.index, boxes)


def _candidates(rank: Tensor, sizes: list[tuple[int, int]], count: int) -> Tensor:
    return fcos.top_per_level(rank.split([height * width for height, width in sizes]), count)


def _boxes(raw: RawOutput, i: int, index: Tensor, frame: ImageFrame) -> Tensor:
    boxes = fcos.decode_ltrb(raw.points[index], raw.distances[i, index])
    return box_ops.clip(boxes, frame.input_size, legacy=True)


def _unscale(boxes: Tensor, frame: ImageFrame) -> Tensor:
    vertical, horizontal = frame.scale
    return box_ops.scale(boxes, (1 / vertical, 1 / horizontal))


def _on_grid(boxes: Tensor, basis: Tensor, config: SipMaskConfig) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Boxes [N, 4] in cells of the up-sampled basis masks, their windows [N, 4] int64, and that grid's size."""
    cells = boxes / config.basis_stride
    extent = (basis.shape[1] * config.basis_upsample, basis.shape[2] * config.basis_upsample)
    return cells, crop_window(cells, extent), extent


def _resized_size(extent: tuple[int, int], frame: ImageFrame, config: SipMaskConfig) -> tuple[int, int]:
    """Size of the whole up-sampled canvas in image pixels; the padding is cut off afterwards."""
    rounding = math.floor if config.inference.mask_rounding == "floor" else math.ceil
    height, width = (
        max(1, rounding(cells * (config.basis_stride / scale) - (0.0 if rounding is math.floor else 1e-6)))
        for cells, scale in zip(extent, frame.scale, strict=True)
    )
    return height, width
