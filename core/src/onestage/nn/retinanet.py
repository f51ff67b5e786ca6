"""What detectors with anchors share (RetinaNet, Lin et al. 2017): anchors, matching, box coding, head, losses.

Anchors are one flat list: level by level, row by row, anchor by anchor; inside a cell the ratio is the outer index
and the scale the inner one. A: anchors of all levels, G: ground truths.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.boxes import iou_matrix
from onestage.nn.losses import sigmoid_focal, zero_of
from onestage.nn.towers import TowerNorm, conv_tower, flatten_levels, init_normal, prior_bias
from onestage.structures import Target

STRIDES = (8, 16, 32, 64, 128)  # of P3..P7, input pixels per cell
RATIOS = (0.5, 1.0, 2.0)  # height / width
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of the level's base size
BASE_SIZE = 4.0  # base size of a level in its strides

NEGATIVE = -1
IGNORED = -2

MAX_LOG_RATIO = math.log(1000 / 16)  # of decoded to anchor side: exp must not overflow

# Ground truths matched at once: [A, 16] IoUs of 200 000 anchors are 13 MB.
MATCH_CHUNK = 16


class RetinaNetHead(nn.Module):
    """Class and box outputs of two conv towers, shared by the levels.

    Args:
        num_classes: K.
        width: Channels of the pyramid and of the towers.
        depth: Convs of each tower.
        norm: Of the towers; their convs have biases only without.
        num_anchors: Anchors per cell.
    """

    def __init__(self, num_classes: int, width: int, depth: int, *, norm: TowerNorm = "none", num_anchors: int = 9):
        super().__init__()
        self.num_classes = num_classes
        self.cls_tower = conv_tower(width, width, depth, norm=norm, bias=norm == "none")
        self.box_tower = conv_tower(width, width, depth, norm=norm, bias=norm == "none")
        self.logits = nn.Conv2d(width, num_anchors * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(width, num_anchors * 4, 3, padding=1)
        init_normal(self)
        nn.init.constant_(self.logits.bias, prior_bias())  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pyramid levels [B, width, h, w] to class logits [B, A, K] and deltas [B, A, 4] as `encode` makes them."""
        logits = [self.logits(self.cls_tower(level)) for level in levels]
        deltas = [self.deltas(self.box_tower(level)) for level in levels]
        return flatten_levels(logits, self.num_classes), flatten_levels(deltas, 4)


@dataclass(frozen=True)
class Assignment:
    """Which ground truth each of A anchors answers for in B images.

    Args:
        index: [B, A] int64, 0..G-1 of the image, NEGATIVE or IGNORED.
        labels: [B, A] int64, class 0..K-1, NEGATIVE or IGNORED.
    """

    index: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Matches:
    """Which ground truth each anchor answers for.

    Args:
        index: [A] int64, 0..G-1, NEGATIVE or IGNORED.
        best: [A] int64, the ground truth of largest IoU whatever that is, of equals the first; -1 without any.
        iou: [A] float32, IoU with `best`; 0 without any.
    """

    index: Tensor
    best: Tensor
    iou: Tensor


def anchors(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    base_size: float = BASE_SIZE,
    ratios: Sequence[float] = RATIOS,
    scales: Sequence[float] = SCALES,
    legacy: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Anchors of all levels.

    torchvision's generator is not used: it centres them on the cell's corner and rounds their sizes.

    Args:
        sizes: (h, w) of each level.
        strides: Input pixels per cell of each level.
        base_size: Side of the square anchor of scale 1, in strides.
        ratios: Heights over widths; the area stays.
        scales: Factors on the base size.
        legacy: Inclusive boxes around pixel (stride - 1) / 2, rounded to whole pixels.
        device: Where the result lives.

    Returns:
        [A, 4] float32 xyxy, input pixels, not clipped; centred at (j + 0.5) * stride unless `legacy`.
    """
    levels = []
    shape: dict[str, Any] = {"base_size": base_size, "ratios": tuple(ratios), "scales": tuple(scales), "legacy": legacy}
    keep = device is not None and device.type == "cuda" and not torch.compiler.is_compiling()
    for (height, width), stride in zip(sizes, strides, strict=True):
        cell = _cell_anchors_on(device, stride, **shape) if keep else cell_anchors(stride, **shape).to(device)
        # Broadcast, not repeated: ONNX's exporter gets repeat_interleave wrong where sizes are open.
        y = (torch.arange(height, dtype=torch.float32, device=device) * stride)[:, None].expand(height, width)
        x = (torch.arange(width, dtype=torch.float32, device=device) * stride).expand(height, width)
        shift = torch.stack((x, y, x, y), dim=2).flatten(0, 1)
        levels.append((shift[:, None] + cell[None]).reshape(-1, 4))
    return torch.cat(levels)


@lru_cache(maxsize=64)  # copied once: a copy to the GPU has no place in a CUDA graph
def _cell_anchors_on(device: torch.device, stride: int, **shape: Any) -> Tensor:
    return cell_anchors(stride, **shape).to(device)


def cell_anchors(
    stride: int,
    *,
    base_size: float = BASE_SIZE,
    ratios: Sequence[float] = RATIOS,
    scales: Sequence[float] = SCALES,
    legacy: bool = False,
) -> Tensor:
    """The [len(ratios) * len(scales), 4] anchors of a level's first cell; arguments as in `anchors`."""
    ratio = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    side = stride * base_size * torch.tensor(scales, dtype=torch.float32)[None]
    width, height = (side / ratio).flatten(), (side * ratio).flatten()
    one = 1.0 if legacy else 0.0
    center = (stride - one) / 2
    half = torch.stack((width - one, height - one), dim=1) / 2
    corners = torch.cat((center - half, center + half), dim=1)
    return corners.round() if legacy else corners


def match(
    anchors: Tensor,
    boxes: Tensor,
    *,
    negative_iou: float = 0.4,
    positive_iou: float = 0.5,
    force_match: bool = False,
    legacy: bool = False,
    valid: Tensor | None = None,
) -> Matches:
    """Matches anchors to ground truths by IoU.

    Below `negative_iou` an anchor is negative, from `positive_iou` on it belongs to its best ground truth, between
    them it is ignored.

    Args:
        anchors: [A, 4] xyxy, input pixels.
        boxes: [G, 4] xyxy, input pixels; G = 0 is legal, then everything valid is negative.
        negative_iou: See above.
        positive_iou: See above.
        force_match: Every anchor that ties a ground truth's best IoU becomes positive for it, if that IoU is above 0;
            of several such ground truths the last has it.
        legacy: Widths are x2 - x1 + 1.
        valid: [A] bool; the others take no part and are ignored. None: all are.
    """
    iou = anchors.new_zeros(len(anchors))
    best = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    forced = best.clone()
    for start in range(0, len(boxes), MATCH_CHUNK):
        part = iou_matrix(anchors, boxes[start : start + MATCH_CHUNK], legacy)  # [A, chunk]
        if valid is not None:
            part = part * valid[:, None]
        part_iou, part_best = part.max(dim=1)
        better = part_iou > iou if start > 0 else torch.ones_like(best, dtype=torch.bool)
        iou = torch.where(better, part_iou, iou)
        best = torch.where(better, part_best + start, best)
        if force_match:
            top = part.amax(dim=0)
            order = torch.arange(start, start + part.shape[1], device=anchors.device)
            ties = torch.where((part == top) & (top > 0), order, -1).amax(dim=1)
            forced = torch.maximum(forced, ties)
    index = torch.where(iou >= positive_iou, best, torch.where(iou < negative_iou, NEGATIVE, IGNORED))
    index = torch.where(forced >= 0, forced, index)
    if valid is not None:
        index = torch.where(valid, index, IGNORED)
    return Matches(index, best, iou)


def match_batch(
    anchors: Tensor,
    targets: Sequence[Target],
    *,
    valid: Sequence[Tensor] | None = None,
    negative_iou: float = 0.4,
    positive_iou: float = 0.5,
    force_match: bool = False,
    legacy: bool = False,
) -> Assignment:
    """`match` for each of B images, `targets` in input pixels, `valid` [A] bool each; the rest as there."""
    return assignment_of(
        [
            match(
                anchors,
                target.boxes,
                negative_iou=negative_iou,
                positive_iou=positive_iou,
                force_match=force_match,
                legacy=legacy,
                valid=None if valid is None else valid[i],
            )
            for i, target in enumerate(targets)
        ],
        targets,
    )


def assignment_of(matches: Sequence[Matches], targets: Sequence[Target]) -> Assignment:
    """The matches of B images as one value, with the classes of `targets`."""
    index = [matched.index for matched in matches]
    labels = []
    for own, target in zip(index, targets, strict=True):
        classes = torch.cat((target.labels, target.labels.new_zeros(1)))  # for images without any
        labels.append(torch.where(own >= 0, classes[own.clamp(min=0)], own))
    return Assignment(torch.stack(index), torch.stack(labels))


def detection_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    assignment: Assignment,
    boxes: Sequence[Tensor],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    beta: float = 1 / 9,
    legacy: bool = False,
    code: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Class and box loss summed over a batch; recipes divide them by different numbers.

    Args:
        logits: [B, A, K].
        deltas: [B, A, 4].
        anchors: [A, 4] xyxy, input pixels.
        assignment: What the anchors answer for; ignored ones count in neither.
        boxes: B tensors [G, 4] xyxy, input pixels.
        alpha: Of the focal loss.
        gamma: Of the focal loss.
        beta: Where smooth L1 becomes linear.
        legacy: Widths are x2 - x1 + 1.
        code: (anchors, boxes) to the deltas wanted of them, [N, 4] each; None: `encode`.

    Returns:
        Focal loss over anchors and classes, smooth L1 over positives and coordinates; each connected to its outputs
        even where the batch has no positive.
    """
    counted = assignment.labels != IGNORED
    class_loss = sigmoid_focal(logits[counted], assignment.labels[counted], alpha, gamma)
    box_loss = zero_of(deltas)
    for i, index in enumerate(assignment.index):
        positive = (index >= 0).nonzero().flatten()
        pairs = anchors[positive], boxes[i][index[positive]]
        wanted = encode(*pairs, legacy) if code is None else code(*pairs)
        box_loss = box_loss + F.smooth_l1_loss(deltas[i, positive].float(), wanted, reduction="sum", beta=beta)
    return class_loss, box_loss


def encode(anchors: Tensor, boxes: Tensor, legacy: bool = False) -> Tensor:
    """What a head must say to turn anchors into boxes: centre shift in anchor sides, log of side ratio.

    Args:
        anchors: [..., 4] xyxy.
        boxes: [..., 4] xyxy, same frame, sides > 0.
        legacy: Widths are x2 - x1 + 1.

    Returns:
        [..., 4] (dx, dy, dw, dh), means 0 and deviations 1 taken as they come.
    """
    center, sides = _center_and_sides(anchors, legacy)
    target_center, target_sides = _center_and_sides(boxes, legacy)
    return torch.cat(((target_center - center) / sides, (target_sides / sides).log()), dim=-1)


def decode(anchors: Tensor, deltas: Tensor, legacy: bool = False) -> Tensor:
    """The inverse of `encode`; side ratios are kept within 16/1000 and 1000/16. [..., 4] xyxy, not clipped."""
    center, sides = _center_and_sides(anchors, legacy)
    center = center + deltas[..., :2] * sides
    half = sides * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    inset = 0.5 if legacy else 0.0
    return torch.cat((center - half + inset, center + half - inset), dim=-1)


def _center_and_sides(boxes: Tensor, legacy: bool) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low + (1.0 if legacy else 0.0)
