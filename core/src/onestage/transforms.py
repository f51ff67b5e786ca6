"""From images of any size to one normalised batch, and the frames that lead back.

Resizing rules are the recipes'; augmentation happened before, on the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from onestage import boxes as box_ops
from onestage.config import InputConfig
from onestage.errors import UsageError
from onestage.structures import ImageFrame, Target


@dataclass(frozen=True)
class Batch:
    """B images as the network sees them.

    Args:
        pixels: [B, 3, H, W] float32, normalised, zero where padded.
        frames: One per image.
        targets: One per image in *input* pixels, masks padded to [G, H, W]; None at inference. Reference boxes are in
            input pixels too.
        references: [B, 3, H, W] reference frames, resized like their images; None if no target has one.
    """

    pixels: Tensor
    frames: list[ImageFrame]
    targets: list[Target] | None
    references: Tensor | None = None


def prepare_batch(
    images: Sequence[Tensor],
    targets: Sequence[Target] | None,
    config: InputConfig,
    *,
    training: bool,
    legacy_boxes: bool = False,
) -> Batch:
    """Resizes, normalises and pads images, and moves their targets along.

    Args:
        images: B tensors [3, h, w] RGB, uint8 or float in 0..1, sizes may differ.
        targets: One per image in image pixels, or None. Reference frames get the size drawn for their image.
        config: Sizes, colours, padding.
        training: Draws one of `config.train_sizes` per image; otherwise `config.test_size`.
        legacy_boxes: Target boxes become inclusive (x2 - 1, y2 - 1) before scaling and are clipped to the last pixel,
            as in code whose widths are x2 - x1 + 1.

    Raises:
        UsageError: no image, or one that is not [3, h, w] uint8 or float.
    """
    if not images:
        raise UsageError("no images", "give at least one")
    resized, frames = [], []
    for image in images:
        _check_image(image)
        frame = plan_resize(
            (image.shape[1], image.shape[2]), _draw_size(config) if training else config.test_size, config
        )
        resized.append(_normalise(_resize(image, frame.input_size, config.antialias), config))
        frames.append(frame)
    multiple = config.pad_multiple
    height = max(-(-frame.input_size[0] // multiple) * multiple for frame in frames)
    width = max(-(-frame.input_size[1] // multiple) * multiple for frame in frames)
    pixels = _on_canvas(resized, (height, width))
    frames = [replace(frame, padded_size=(height, width)) for frame in frames]
    if targets is None:
        return Batch(pixels, frames, None)
    moved = [
        move_target(target.to(pixels.device), frame, legacy_boxes)
        for target, frame in zip(targets, frames, strict=True)
    ]
    references = None
    if all(target.reference is not None for target in targets):
        others = [target.reference.image for target in moved if target.reference is not None]
        for image in others:
            _check_image(image)
        references = _on_canvas(
            [
                _normalise(_resize(image, frame.input_size, config.antialias), config)
                for image, frame in zip(others, frames, strict=True)
            ],
            (height, width),
        )
    return Batch(pixels, frames, moved, references)


def plan_resize(image_size: tuple[int, int], size: tuple[int, int], config: InputConfig) -> ImageFrame:
    """The frame of an image of `image_size` (height, width) under a size of the config, padding not yet known."""
    if config.resize == "fixed":
        scale = (size[0] / image_size[0], size[1] / image_size[1])
        return ImageFrame(image_size, size, size, scale)
    short, long = min(size), max(size)
    factor = min(long / max(image_size), short / min(image_size))
    input_size = (max(1, int(image_size[0] * factor + 0.5)), max(1, int(image_size[1] * factor + 0.5)))
    scale = (factor, factor)
    if config.frame_scale == "sizes":
        scale = (input_size[0] / image_size[0], input_size[1] / image_size[1])
    return ImageFrame(image_size, input_size, input_size, scale)


def move_target(target: Target, frame: ImageFrame, legacy_boxes: bool = False) -> Target:
    """A target of the image frame in the input frame; masks by nearest neighbour, zero-padded to the canvas."""
    vertical, horizontal = frame.scale
    height, width = frame.input_size
    reference = target.reference
    if reference is not None:
        reference = replace(reference, boxes=_move_boxes(reference.boxes, frame, legacy_boxes))
    masks = target.masks
    if masks.shape[-2:] != frame.input_size:
        masks = tvf.resize_mask(masks, list(frame.input_size))
    right, bottom = frame.padded_size[1] - width, frame.padded_size[0] - height
    polygons = target.polygons
    if polygons is not None:
        polygons = tuple(
            None
            if parts is None
            else tuple(
                tuple(value * (vertical if i % 2 else horizontal) for i, value in enumerate(part)) for part in parts
            )
            for parts in polygons
        )
    return replace(
        target,
        boxes=_move_boxes(target.boxes, frame, legacy_boxes),
        masks=F.pad(masks, (0, right, 0, bottom)),
        polygons=polygons,
        reference=reference,
    )


def _move_boxes(boxes: Tensor, frame: ImageFrame, legacy: bool) -> Tensor:
    boxes = box_ops.scale(box_ops.to_legacy(boxes) if legacy else boxes, frame.scale)
    return box_ops.clip(boxes, frame.input_size, legacy)


def _on_canvas(images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """[B, 3, *size] with each image in the top left corner, zeros elsewhere."""
    pixels = images[0].new_zeros(len(images), 3, *size)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return pixels


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise UsageError(
            f"an image is a {type(image).__name__}, not a tensor",
            "give [3, height, width]; a Predictor takes files too",
        )
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise UsageError(
            f"image is {tuple(image.shape)} {image.dtype}", "give [3, height, width] RGB, uint8 or float in 0..1"
        )


def _draw_size(config: InputConfig) -> tuple[int, int]:
    first, last = config.train_sizes[0], config.train_sizes[-1]
    if config.train_draw == "choice":
        return config.train_sizes[int(torch.randint(len(config.train_sizes), ()))]
    return (
        int(torch.randint(min(first[0], last[0]), max(first[0], last[0]) + 1, ())),
        int(torch.randint(min(first[1], last[1]), max(first[1], last[1]) + 1, ())),
    )


def _resize(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    return tvf.resize_image(image, list(size), antialias=antialias)


def _normalise(image: Tensor, config: InputConfig) -> Tensor:
    pixels = image.float() if image.dtype == torch.uint8 else image.float() * 255.0
    if config.channel_order == "bgr":
        pixels = pixels.flip(0)
    return (pixels - _per_channel(config.mean, pixels.device)) / _per_channel(config.std, pixels.device)


@lru_cache(maxsize=32)  # copied to a GPU once, not for every image
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
