"""Frozen containers that pass between data, models and evaluation.

Frames: *image* = pixels of the file, *input* = network input after resizing, before padding. Boxes are exclusive
xyxy (width = x2 - x1) unless a name says `legacy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.errors import MachineError, UsageError
from onestage.masks import Masks
from onestage.ops import host


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
class Reference:
    """Another frame of the video that a training image is from, and where its G' objects are in it.

    Args:
        image: [3, h, w] RGB, uint8 or float in 0..1; the size of the frame it belongs to.
        boxes: [G', 4] float32 xyxy, pixels of the same frame as `image`.
        track_ids: [G'] int64, which objects they are; the same numbers as in `Target.track_ids`.
    """

    image: Tensor
    boxes: Tensor
    track_ids: Tensor

    def to(self, device: torch.device | str) -> Reference:
        return Reference(self.image.to(device), self.boxes.to(device), self.track_ids.to(device))


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
        track_ids: [G] int64, which object of its video each instance is; None for images that belong to none.
        reference: The other frame of a training pair, or None.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    iscrowd: Tensor
    image_id: int = -1
    polygons: tuple[tuple[tuple[float, ...], ...] | None, ...] | None = None
    track_ids: Tensor | None = None
    reference: Reference | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> Target:
        """The instances that `keep` (bool or int64 index) selects; the reference frame keeps all of its own."""
        index = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
        return replace(
            self,
            boxes=self.boxes[index],
            labels=self.labels[index],
            masks=self.masks[index],
            iscrowd=self.iscrowd[index],
            polygons=None if self.polygons is None else tuple(self.polygons[i] for i in index.tolist()),
            track_ids=None if self.track_ids is None else self.track_ids[index],
        )

    def to(self, device: torch.device | str) -> Target:
        return replace(
            self,
            boxes=self.boxes.to(device),
            labels=self.labels.to(device),
            masks=self.masks.to(device),
            iscrowd=self.iscrowd.to(device),
            track_ids=None if self.track_ids is None else self.track_ids.to(device),
            reference=None if self.reference is None else self.reference.to(device),
        )

    @staticmethod
    def from_dict(target: dict[str, Any], size: tuple[int, int], num_classes: int) -> Target:
        """Checks one entry of the public `targets` list and completes it.

        Args:
            target: `boxes` [G, 4] xyxy, `labels` [G] in 0..K-1, `masks` ([G, H, W] tensor, non-zero where the
                instance is, or a list of COCO RLE); optional `iscrowd` [G], `image_id`, `track_ids` [G] and
                `reference`, another frame of the same video as a dict of `image`, `boxes` [G', 4] and `track_ids` [G'].
                G = 0 is legal.
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
        masks = torch.as_tensor(masks) != 0
        if masks.numel() and masks.shape[-2:] != size:
            raise UsageError(
                f"target masks are {tuple(masks.shape)}, the image is {size} (height, width)",
                "give [number of instances, height, width]",
            )
        masks = masks.to(torch.uint8).reshape(-1, *size)
        if not len(boxes) == len(labels) == len(masks):
            raise UsageError(
                f"target has {len(boxes)} boxes, {len(labels)} labels and {len(masks)} masks",
                "give one of each per instance",
            )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
            least, most = int(labels.min()), int(labels.max())
            one_based = least >= 1 and most == num_classes
            raise UsageError(
                f"label {least if least < 0 else most} is outside 0..{num_classes - 1}"
                + ("; labels look 1-based" if one_based else ""),
                "subtract 1 from every label" if one_based else f"use labels 0..{num_classes - 1} or raise num_classes",
            )
        if not torch.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
            raise UsageError("a target box is not finite or has x2 < x1 or y2 < y1", "boxes are xyxy in pixels")
        iscrowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(labels))), dtype=torch.bool).flatten()
        if len(iscrowd) != len(labels):
            raise UsageError(
                f"target has {len(labels)} labels and {len(iscrowd)} iscrowd", "give one of each per instance"
            )
        track_ids, reference = _identities(target, size, len(labels))
        return Target(
            boxes,
            labels,
            masks,
            iscrowd.to(boxes.device),
            int(target.get("image_id", -1)),
            track_ids=track_ids,
            reference=reference,
        )


def _identities(target: dict[str, Any], size: tuple[int, int], count: int) -> tuple[Tensor | None, Reference | None]:
    """`track_ids` and `reference` of a public target of `count` instances, each None where it is not there."""
    if target.get("track_ids") is None:
        if target.get("reference") is not None:
            raise UsageError("target has a reference frame but no track_ids", "say which object each instance is")
        return None, None
    track_ids = torch.as_tensor(target["track_ids"], dtype=torch.int64).flatten()
    if len(track_ids) != count:
        raise UsageError(f"target has {count} labels and {len(track_ids)} track_ids", "give one of each per instance")
    other = target.get("reference")
    if other is None or isinstance(other, Reference):
        return track_ids, other
    missing = [key for key in ("image", "boxes", "track_ids") if key not in other]
    if missing:
        raise UsageError(f"reference frame has no {', '.join(missing)}", "give image, boxes and track_ids")
    reference = Reference(
        other["image"],
        torch.as_tensor(other["boxes"], dtype=torch.float32).reshape(-1, 4),
        torch.as_tensor(other["track_ids"], dtype=torch.int64).flatten(),
    )
    if tuple(reference.image.shape[-2:]) != size:
        raise UsageError(
            f"reference frame is {tuple(reference.image.shape[-2:])}, its image {size} (height, width)",
            "both frames of a pair are of one video and one size",
        )
    if len(reference.boxes) != len(reference.track_ids):
        raise UsageError(
            f"reference frame has {len(reference.boxes)} boxes and {len(reference.track_ids)} track_ids",
            "give one of each per object",
        )
    return track_ids, reference


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
    if len(targets) != len(images):
        raise UsageError(f"there are {len(images)} images and {len(targets)} targets", "give one target per image")
    return [
        usable(
            t if isinstance(t, Target) else Target.from_dict(t, (image.shape[1], image.shape[2]), num_classes), crowds
        )
        for t, image in zip(targets, images, strict=True)
    ]


def usable(target: Target, crowds: bool = False) -> Target:
    """Drops crowds, unless `crowds`, and boxes under one pixel, as the recipes do. Boxes exclusive, image pixels.

    So does it with the boxes of a reference frame.
    """
    reference = target.reference
    if reference is not None:
        keep = _a_pixel_wide(reference.boxes)
        reference = replace(reference, boxes=reference.boxes[keep], track_ids=reference.track_ids[keep])
        target = replace(target, reference=reference)
    return target[_a_pixel_wide(target.boxes) & (~target.iscrowd | crowds)]


def _a_pixel_wide(boxes: Tensor) -> Tensor:
    """[N] bool of exclusive boxes: at least one pixel wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)


# What decoding fills for each public `mask_output`: `masks`, `soft_masks` at image resolution or on their own grid.
MaskForm = Literal["binary", "soft", "lowres", "none"]
FORM_OF: dict[str, MaskForm] = {
    "bool": "binary",
    "rle": "binary",
    "packed": "binary",
    "prob": "soft",
    "lowres": "lowres",
    "none": "none",
}
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
        embeddings: [N, D] float32, by which a method that follows objects recognises them, else None.
        track_ids: [N] int64, which object of its video each detection is, once that was found out, else None.
    """

    image_size: tuple[int, int]
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Masks | None = None
    mask_scores: Tensor | None = None
    soft_masks: Tensor | None = None
    unrefined_boxes: Tensor | None = None
    embeddings: Tensor | None = None
    track_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor | slice) -> Detections:
        """The detections that `keep` (bool, int64 index or slice) selects."""
        return self._map(lambda part: part[keep])

    @staticmethod
    def cat(parts: Sequence[Detections]) -> Detections:
        """Those of one image, one after the other: no longer sorted. What some of them lack is left out."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                return None
            return Masks.cat(values) if isinstance(values[0], Masks) else torch.cat(values)

        names = [entry.name for entry in fields(Detections) if entry.name != "image_size"]
        return Detections(parts[0].image_size, **{name: joined(name) for name in names})

    def mirrored(self) -> Detections:
        """The same things in the image's mirror image, left for right."""

        def boxes(boxes: Tensor) -> Tensor:
            turned = boxes[:, [2, 1, 0, 3]]
            turned[:, ::2] = self.image_size[1] - turned[:, ::2]
            return turned

        return replace(
            self,
            boxes=boxes(self.boxes),
            masks=None if self.masks is None else self.masks.mirrored(),
            soft_masks=None if self.soft_masks is None else self.soft_masks.flip(-1),
            unrefined_boxes=None if self.unrefined_boxes is None else boxes(self.unrefined_boxes),
        )

    def to(self, device: torch.device | str) -> Detections:
        """On another device; from a GPU to the CPU everything travels together, and the host waits once."""
        if torch.device(device).type != "cpu" or not host.keeps_fixed_shapes(self.boxes.device):
            return self._map(lambda part: part.to(device))
        sent: list[Tensor] = []
        for part in vars(self).values():
            if isinstance(part, Masks):
                sent += part.sent()
            elif isinstance(part, Tensor):
                sent.append(part)
        arrived = iter(host.to_host(*sent))
        return self._map(
            lambda part: (
                part.arrived(next(arrived), next(arrived)) if isinstance(part, Masks) else next(arrived).clone()
            )
        )

    def as_dict(self, mask_output: str = "bool") -> dict[str, Any]:
        """The public form: `boxes`, `labels`, `scores` and `masks`, and those of the optional fields that are there.

        Args:
            mask_output: `bool` [N, H, W]; `prob` float32 [N, 1, H, W]; `rle` list of COCO RLE; `packed` bits of the
                box windows, and these as `windows` (`Masks.from_bits`); `lowres` float32 [N, 1, h, w]; `none` leaves
                `masks` out.

        Raises:
            UsageError: unknown form.
            MachineError: a dense form would take more than MASK_MEMORY bytes.
        """
        if mask_output not in FORM_OF:
            raise UsageError(f"mask_output '{mask_output}' is unknown", f"use one of {', '.join(FORM_OF)}")
        public: dict[str, Any] = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        for name in ("mask_scores", "unrefined_boxes", "embeddings", "track_ids"):
            if getattr(self, name) is not None:
                public[name] = getattr(self, name)
        if mask_output in ("prob", "lowres"):
            assert self.soft_masks is not None, "the model left soft masks out"
            public["masks"] = self.soft_masks[:, None]
        elif mask_output != "none":
            assert self.masks is not None, "the model left masks out"
            if mask_output == "bool":
                self._check_memory()
                public["masks"] = self.masks.to_bool()
            elif mask_output == "rle":
                public["masks"] = self.masks.to_rle()
            else:
                public |= {"masks": self.masks.to_bits(), "windows": self.masks.windows}
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
        optional = (
            self.masks,
            self.mask_scores,
            self.soft_masks,
            self.unrefined_boxes,
            self.embeddings,
            self.track_ids,
        )
        return Detections(
            self.image_size,
            change(self.boxes),
            change(self.scores),
            change(self.labels),
            *(None if part is None else change(part) for part in optional),
        )
