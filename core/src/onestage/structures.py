"""Frozen containers that pass between data, models and evaluation.

Frames: *image* = pixels of the file, *input* = network input after resizing, before padding. Boxes are exclusive
xyxy (width = x2 - x1) unless a name says `legacy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.errors import MachineError, UsageError
from onestage.masks import Masks


@dataclass(frozen=True)
class ImageFrame:
    """How one image became network input, and so how to get back.

    Args:
        image_size: (height, width) of the image, pixels.
        input_size: (height, width) after resizing, before padding, pixels.
        padded_size: (height, width) of the batch canvas that holds it.
        scale: (vertical, horizontal) input pixels per image pixel, as the recipe defines it: with kept aspect it is
            one number for both axes and may differ from input_size / image_size by the rounding of the sizes.
    """

    image_size: tuple[int, int]
    input_size: tuple[int, int]
    padded_size: tuple[int, int]
    scale: tuple[float, float]

    def to_image(self, boxes: Tensor) -> Tensor:
        """Exclusive boxes [N, 4] xyxy from input pixels to image pixels, cut to the image."""
        vertical, horizontal = self.scale
        return box_ops.clip(box_ops.scale(boxes, (1 / vertical, 1 / horizontal)), self.image_size)


@dataclass(frozen=True)
class Target:
    """One image's ground truth, G instances; crowd regions included and marked.

    Args:
        boxes: [G, 4] float32 xyxy, pixels of the frame it is in.
        labels: [G] int64, 0..K-1.
        masks: [G, H, W] uint8 of 0 and 1, same frame.
        iscrowd: [G] bool.
        image_id: The data set's id, -1 where there is none.
        polygons: For each instance its polygons as flat x, y lists in the same frame, or None where the data set has
            RLE; None altogether where nobody asked for them.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    iscrowd: Tensor
    image_id: int = -1
    polygons: tuple[tuple[tuple[float, ...], ...] | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> Target:
        """The instances that `keep` (bool or int64 index) selects."""
        index = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        polygons = None if self.polygons is None else tuple(self.polygons[i] for i in index.tolist())
        return Target(
            self.boxes[index], self.labels[index], self.masks[index], self.iscrowd[index], self.image_id, polygons
        )

    def to(self, device: torch.device | str) -> Target:
        return Target(
            self.boxes.to(device),
            self.labels.to(device),
            self.masks.to(device),
            self.iscrowd.to(device),
            self.image_id,
            self.polygons,
        )

    @staticmethod
    def from_dict(target: dict[str, Any], size: tuple[int, int], num_classes: int) -> Target:
        """Checks one entry of the public `targets` list and completes it.

        Args:
            target: `boxes` [G, 4] xyxy, `labels` [G] in 0..K-1, `masks` ([G, H, W] tensor or a list of COCO RLE);
                optional `iscrowd` [G] and `image_id`. G = 0 is legal.
            size: (height, width) of the image the target belongs to.
            num_classes: K.

        Raises:
            UsageError: a shape, a label or a box that cannot be meant.
        """
        missing = [key for key in ("boxes", "labels", "masks") if key not in target]
        if missing:
            raise UsageError(f"target has no {', '.join(missing)}", "give boxes, labels and masks for every image")
        boxes = torch.as_tensor(target["boxes"], dtype=torch.float32).reshape(-1, 4)
        labels = torch.as_tensor(target["labels"], dtype=torch.int64).flatten()
        masks = target["masks"]
        if isinstance(masks, Sequence):
            masks = Masks.from_rle(list(masks), size).to_bool()
        masks = torch.as_tensor(masks).to(torch.uint8).reshape(-1, *size)
        if not len(boxes) == len(labels) == len(masks):
            raise UsageError(
                f"target has {len(boxes)} boxes, {len(labels)} labels and {len(masks)} masks",
                "give one of each per instance",
            )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
            one_based = int(labels.min()) >= 1 and int(labels.max()) == num_classes
            raise UsageError(
                f"label {int(labels.max())} is outside 0..{num_classes - 1}"
                + ("; labels look 1-based" if one_based else ""),
                "subtract 1 from every label" if one_based else f"use labels 0..{num_classes - 1} or raise num_classes",
            )
        if not torch.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
            raise UsageError("a target box is not finite or has x2 < x1 or y2 < y1", "boxes are xyxy in pixels")
        iscrowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(labels))), dtype=torch.bool).flatten()
        return Target(boxes, labels, masks, iscrowd.to(boxes.device), int(target.get("image_id", -1)))


def training_targets(
    targets: Sequence[Target | dict[str, Any]] | None, images: Sequence[Tensor], num_classes: int, crowds: bool = False
) -> list[Target]:
    """What a training step sees: public dicts checked and completed, then the `usable` instances alone.

    Args:
        targets: One per image, in image pixels; None is what a caller forgot.
        images: [3, H, W] each; only their sizes are read.
        num_classes: K.
        crowds: Keep crowd regions, for a recipe that leaves out what lies in them.

    Raises:
        UsageError: no targets, or one that cannot be meant (`Target.from_dict`).
    """
    if targets is None:
        raise UsageError("training needs targets", "call model(images, targets), or model.eval() first")
    return [
        usable(
            t if isinstance(t, Target) else Target.from_dict(t, (image.shape[1], image.shape[2]), num_classes), crowds
        )
        for t, image in zip(targets, images, strict=True)
    ]


def usable(target: Target, crowds: bool = False) -> Target:
    """Drops crowds, unless `crowds`, and boxes under one pixel, as the recipes do. Boxes exclusive, image pixels."""
    width = target.boxes[:, 2] - target.boxes[:, 0]
    height = target.boxes[:, 3] - target.boxes[:, 1]
    return target[(width >= 1) & (height >= 1) & (~target.iscrowd | crowds)]


MASK_OUTPUTS = ("bool", "prob", "rle", "packed", "lowres", "none")
MASK_MEMORY = 8 * 2**30  # bytes a dense mask tensor may take


@dataclass(frozen=True)
class Detections:
    """What a model found in one image, N detections, scores descending.

    Args:
        image_size: (height, width) of the image, pixels.
        boxes: [N, 4] float32 xyxy, image pixels.
        scores: [N] float32 in [0, 1].
        labels: [N] int64, 0..K-1.
        masks: N masks of the image's size, or None where the model was asked for something else.
        mask_scores: [N] float32 for methods that score masks apart from boxes, else None.
        soft_masks: [N, h, w] float32 probabilities at image size or at the method's own resolution, where the model
            was asked for them, else None.
        unrefined_boxes: [N, 4] like `boxes`, as they were before a method moved their sides, else None.
    """

    image_size: tuple[int, int]
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Masks | None = None
    mask_scores: Tensor | None = None
    soft_masks: Tensor | None = None
    unrefined_boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor | slice) -> Detections:
        """The detections that `keep` (bool, int64 index or slice) selects."""
        return self._map(lambda part: part[keep])

    def to(self, device: torch.device | str) -> Detections:
        return self._map(lambda part: part.to(device))

    def as_dict(self, mask_output: str = "bool") -> dict[str, Any]:
        """The public form: `boxes`, `labels`, `scores` and `masks`.

        Args:
            mask_output: `bool` [N, H, W]; `prob` float32 [N, 1, H, W]; `rle` list of COCO RLE; `packed` bits of the
                box windows (`Masks.to_bits`); `lowres` float32 [N, 1, h, w]; `none` leaves `masks` out.

        Raises:
            UsageError: unknown form.
            MachineError: a dense form would take more than MASK_MEMORY bytes.
        """
        if mask_output not in MASK_OUTPUTS:
            raise UsageError(f"mask_output '{mask_output}' is unknown", f"use one of {', '.join(MASK_OUTPUTS)}")
        public: dict[str, Any] = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        if self.mask_scores is not None:
            public["mask_scores"] = self.mask_scores
        if self.unrefined_boxes is not None:
            public["unrefined_boxes"] = self.unrefined_boxes
        if mask_output in ("prob", "lowres"):
            assert self.soft_masks is not None, "the model left soft masks out"
            public["masks"] = self.soft_masks[:, None]
        elif mask_output != "none":
            assert self.masks is not None, "the model left masks out"
            if mask_output == "bool":
                self._check_memory()
                public["masks"] = self.masks.to_bool()
            else:
                public["masks"] = self.masks.to_rle() if mask_output == "rle" else self.masks.to_bits()
        return public

    def _check_memory(self) -> None:
        height, width = self.image_size
        wanted = len(self) * height * width
        if wanted > MASK_MEMORY:
            raise MachineError(
                f"{len(self)} dense masks of {height} x {width} px take {wanted / 2**30:.1f} GiB",
                'set model.mask_output = "rle" or "packed"',
            )

    def _map(self, change: Callable[[Any], Any]) -> Detections:
        optional = (self.masks, self.mask_scores, self.soft_masks, self.unrefined_boxes)
        return Detections(
            self.image_size,
            change(self.boxes),
            change(self.scores),
            change(self.labels),
            *(None if part is None else change(part) for part in optional),
        )
