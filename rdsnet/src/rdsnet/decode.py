"""From raw outputs to detections: correlation (Sec. 3.1), cropping (Sec. 3.2), refined boxes (Sec. 3.3).

Boxes inside are inclusive (width = x2 - x1 + 1), as in the released code; the detections' are exclusive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.nn import retinanet
from onestage.nn.fcos import top_per_level
from onestage.nn.nms import Kept, class_wise_nms, settled
from onestage.ops.assemble import Size, assemble_masks, crop_window, resize_maps
from onestage.ops.edges import Profiles, assemble_with_profiles, enclosing_boxes
from onestage.structures import Detections, ImageFrame, MaskForm
from rdsnet.config import RDSNetConfig

if TYPE_CHECKING:
    from onestage.masks import Masks
    from rdsnet.model import RawOutput
    from rdsnet.refine import MBRM

PIXEL_STRIDE = 4  # input pixels per pixel vector


@dataclass(frozen=True)
class Correlation:
    """What the masks of one image's N detections are made of.

    Args:
        vectors: [d, h, w] pixel vectors, padding of other images cut off.
        contrasts: [N, d] foreground minus background vectors: of a softmax over two classes only that matters.
        upsample: Factor of a first resize, from cells to input pixels: bilinear, corners not aligned. 1: there is none,
            as in RDSNet_s, whose grid becomes the image in one resize.
        input_size: (height, width) that is kept of the upsampled grid, None: all of it.
        align_corners: Of the second resize, from there to the image.
    """

    vectors: Tensor
    contrasts: Tensor
    upsample: int = 1
    input_size: Size | None = None
    align_corners: bool = False

    def masks(self, windows: Tensor, size: Size, threshold: float) -> Masks:
        """Logits at (height, width) `size`, thresholded inside `windows` [N, 4]."""
        return assemble_masks(
            self.vectors,
            self.contrasts,
            windows,
            upsample=self.upsample,
            order="logits",
            threshold=threshold,
            valid_size=self.input_size,
            output_size=size,
            align_corners=self.align_corners,
        )

    def masks_with_profiles(self, windows: Tensor, size: Size, threshold: float) -> tuple[Masks, Profiles]:
        """The same and the largest probability of every column and row."""
        return assemble_with_profiles(
            self.vectors,
            self.contrasts,
            windows,
            upsample=self.upsample,
            threshold=threshold,
            valid_size=self.input_size,
            output_size=size,
            align_corners=self.align_corners,
        )

    def soft(self, windows: Tensor, size: Size) -> Tensor:
        """The probabilities that `masks` thresholds, dense: [N, height, width] float32, 0 outside `windows`."""
        logits = self.logits()
        if self.upsample > 1:
            logits = resize_maps(logits, (logits.shape[1] * self.upsample, logits.shape[2] * self.upsample))
        height, width = self.input_size or logits.shape[1:]
        soft = resize_maps(logits[:, :height, :width], size, self.align_corners).sigmoid()
        return soft * inside(windows, size)

    def logits(self) -> Tensor:
        """[N, h, w] log odds of the foreground on the vectors' grid, not cropped (Eq. 1 and 2)."""
        with torch.autocast(self.vectors.device.type, enabled=False):
            return torch.einsum("nd,dhw->nhw", self.contrasts.float(), self.vectors.float())


def decode(
    raw: RawOutput,
    frames: list[ImageFrame],
    vectors_at: Callable[[int, Tensor], Tensor],
    mbrm: MBRM,
    config: RDSNetConfig,
    masks: MaskForm = "binary",
) -> list[Detections]:
    """Detections of B images.

    Args:
        raw: Outputs of the network.
        frames: How each image became input.
        vectors_at: (image, anchors [N]) to background and foreground vectors [N, 2, d].
        mbrm: Moves boxes if `config.inference.refine` says so.
        config: Inference settings.
        masks: `binary` fills `masks`; `soft` and `lowres` fill `soft_masks`: at image resolution and cropped, or on the
            grid of the pixel vectors and not cropped. A model without masks fills neither.
    """

    def decode_image(i: int, room: int | None) -> tuple[Detections, Tensor | None]:
        frame = frames[i]
        kept, boxes = select(raw, i, frame, config, room)
        correlation = None
        if raw.pixel_vectors is not None and (masks != "none" or config.inference.refine != "none"):
            correlation = correlate(raw.pixel_vectors[i], vectors_at(i, kept.index), frame, config)
        return complete(kept, boxes, correlation, frame, mbrm, config, masks), kept.count

    return settled(decode_image, len(frames), raw.logits.device, config.inference.max_detections)


def select(
    raw: RawOutput, i: int, frame: ImageFrame, config: RDSNetConfig, room: int | None = None
) -> tuple[Kept, Tensor]:
    """Scores, decodes and suppresses the anchors of image `i`, in `room` rows if that is given.

    Returns:
        The N survivors, `index` into the anchors of all levels, and their boxes [N, 4] inclusive xyxy, image pixels.
    """
    rules = config.inference
    scores = raw.logits[i].float().sigmoid()
    per_cell = len(raw.anchors) // sum(height * width for height, width in raw.sizes)
    best = scores.amax(1).split([height * width * per_cell for height, width in raw.sizes])
    index = top_per_level(best, rules.candidates_per_level)
    boxes = retinanet.decode(raw.anchors[index], raw.deltas[i, index].float(), legacy=True)
    boxes = box_ops.clip(boxes, frame.input_size, legacy=True)
    boxes = box_ops.scale(boxes, (1 / frame.scale[0], 1 / frame.scale[1]))
    kept = class_wise_nms(
        boxes,
        scores[index],
        iou_threshold=rules.iou_threshold,
        score_threshold=rules.score_threshold,
        max_detections=rules.max_detections,
        legacy=True,
        room=room,
    )
    return kept.of(index), kept.take(boxes)


def correlate(pixel_vectors: Tensor, vectors: Tensor, frame: ImageFrame, config: RDSNetConfig) -> Correlation:
    """What the masks of one image are made of.

    Args:
        pixel_vectors: [d, h, w] of one image of a batch, with the padding of the others.
        vectors: [N, 2, d] background and foreground vectors of its detections.
        frame: The image's.
        config: Whose padding multiple counts.
    """
    height, width = own_padded_size(frame, config)
    own = pixel_vectors[:, : height // PIXEL_STRIDE, : width // PIXEL_STRIDE]
    return Correlation(own, contrast(vectors), PIXEL_STRIDE, frame.input_size, align_corners=True)


def contrast(vectors: Tensor) -> Tensor:
    """Foreground minus background: [N, 2, d] to [N, d]."""
    return vectors[:, 1] - vectors[:, 0]


def own_padded_size(frame: ImageFrame, config: RDSNetConfig) -> Size:
    """(height, width) of the canvas the image would have had alone, input pixels."""
    multiple = config.input.pad_multiple
    height, width = (-(-extent // multiple) * multiple for extent in frame.input_size)
    return height, width


def complete(
    kept: Kept,
    boxes: Tensor,
    correlation: Correlation | None,
    frame: ImageFrame,
    mbrm: MBRM | None,
    config: RDSNetConfig,
    masks: MaskForm,
) -> Detections:
    """Detections of one image with masks and refined boxes as asked for.

    Args:
        kept: N survivors.
        boxes: [N, 4] inclusive xyxy, image pixels.
        correlation: Of the survivors; None: boxes only.
        frame: The image's.
        mbrm: Needed where boxes are refined.
        config: Inference settings.
        masks: As in `decode`.
    """
    rules, size = config.inference, frame.image_size
    found = Detections(size, public_boxes(boxes, size), kept.scores, kept.labels)
    if correlation is None:
        return found
    windows = crop_window(boxes, size, "expand", padding=rules.crop_padding)
    if masks == "binary" and rules.refine == "none":
        return replace(found, masks=correlation.masks(windows, size, rules.mask_threshold))
    if rules.refine != "none":
        assert mbrm is not None
        binary, profiles = correlation.masks_with_profiles(windows, size, rules.mask_threshold)
        refined = refine(profiles, boxes, correlation, frame, mbrm, config)
        found = replace(found, boxes=public_boxes(refined, size), unrefined_boxes=found.boxes)
        if masks == "binary":
            return replace(found, masks=binary)
    if masks == "soft":
        return replace(found, soft_masks=correlation.soft(windows, size))
    return found if masks == "none" else replace(found, soft_masks=correlation.logits().sigmoid())


def refine(
    profiles: Profiles,
    boxes: Tensor,
    correlation: Correlation,
    frame: ImageFrame,
    mbrm: MBRM,
    config: RDSNetConfig,
) -> Tensor:
    """Boxes [N, 4] inclusive xyxy, image pixels, moved as `config.inference.refine` says.

    Args:
        profiles: Of the masks at image resolution.
        boxes: [N, 4] likewise, as regressed.
        correlation: For masks at another resolution.
        frame: The image's.
        mbrm: The module.
        config: Inference settings.
    """
    rules = config.inference
    if rules.refine == "direct":
        return enclosing_boxes(profiles, boxes, rules.mask_threshold)
    if rules.refine_frame == "image":
        return mbrm(profiles, boxes)
    in_input = box_ops.scale(boxes, frame.scale)
    moved = mbrm(input_profiles(correlation, in_input, config), in_input)
    return box_ops.scale(moved, (1 / frame.scale[0], 1 / frame.scale[1]))


def input_profiles(correlation: Correlation, boxes: Tensor, config: RDSNetConfig) -> Profiles:
    """Profiles of masks at input resolution, padding included, cropped as at inference.

    Args:
        correlation: Of N instances.
        boxes: [N, 4] inclusive xyxy, input pixels.
        config: Whose crop counts.
    """
    _, height, width = correlation.vectors.shape
    size = (height * correlation.upsample, width * correlation.upsample)
    windows = crop_window(boxes, size, "expand", padding=config.inference.crop_padding)
    whole = replace(correlation, input_size=None, align_corners=False)
    return whole.masks_with_profiles(windows, size, config.inference.mask_threshold)[1]


def public_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Exclusive boxes inside the image; sides of a narrow box that refinement moved past each other change places."""
    first, second = box_ops.clip(box_ops.from_legacy(boxes), size).split(2, -1)
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), -1)


def inside(windows: Tensor, size: Size) -> Tensor:
    """[N, height, width] bool, true in each of the windows [N, 4]."""
    y = torch.arange(size[0], device=windows.device)
    x = torch.arange(size[1], device=windows.device)
    left, top, right, bottom = windows[:, :, None].unbind(1)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return rows[:, :, None] & columns[:, None, :]
