"""Greedy NMS: which of many boxes stay, and the best of those in a fixed number of rows.

torchvision's NMS has as many rows as boxes stay, so on a GPU the host waits for their number. `top_nms` has a fixed
number of rows and a count, which stays on the device, whatever the number of candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import ops

from onestage.boxes import from_legacy
from onestage.ops.dispatch import wants_triton


def greedy_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, *, legacy: bool = False
) -> Tensor:
    """Greedy NMS within labels; on a GPU the host waits.

    Args:
        boxes: [N, 4] xyxy, any frame.
        scores: [N].
        labels: [N] int64, only boxes of equal label compete; None: all do.
        iou_threshold: A box is removed if its IoU with a better kept one is larger.
        legacy: Widths are x2 - x1 + 1.

    Returns:
        [M] int64 index of the kept boxes, best first.
    """
    # torchvision moves classes apart by adding to coordinates: in float64 that rounds nothing that matters, and
    # from zero on it cannot make boxes with negative coordinates meet their neighbours.
    exact = boxes.double()
    if legacy:
        exact = from_legacy(exact)
    if labels is None:
        return ops.nms(exact, scores.double(), iou_threshold)
    if len(exact) > 0:
        exact = exact - exact.min()
    return ops.batched_nms(exact, scores.double(), labels, iou_threshold)


def top_by_score(scores: Tensor, k: int, keep_ties: bool = False) -> Tensor:
    """Index of the k best of `scores` [N], best first, equals in their order; all if there are at most k.

    Args:
        scores: [N].
        k: How many.
        keep_ties: Also keeps those that score as the k-th; on a GPU the host waits for their number.
    """
    ordered, order = scores.sort(descending=True, stable=True)
    if keep_ties and 0 < k < len(scores):
        return order[ordered >= ordered[k - 1]]
    return order[:k]


def top_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    *,
    iou_threshold: float,
    max_detections: int,
    room: int,
    keep_ties: bool = False,
    legacy: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best survivors of greedy NMS within classes, in a fixed number of rows.

    Candidates are ranked by score, equals in their order (box by box, class by class). On a GPU nothing waits.

    Args:
        boxes: [N, 4] xyxy, any frame.
        scores: [N, K] of each box in each class, 0 or more; below 0 it is no candidate.
        labels: [N] int64 where a box has one class (K = 1); None: column k is class k.
        iou_threshold: A box is removed if its IoU with a better kept one of its class is larger.
        max_detections: How many are kept over all classes.
        room: Rows of the result, `max_detections` or more.
        keep_ties: Also keeps those that score as the last one kept.
        legacy: Widths are x2 - x1 + 1.

    Returns:
        number: [room] int64, box * K + column of what is kept, best first; 0 in the rows behind.
        count: [] int64, how many; larger than `room` where not all equals of the last found room.
    """
    assert max_detections <= room
    rule = (float(iou_threshold), max_detections, room, keep_ties, legacy)
    if wants_triton(boxes) or torch.compiler.is_compiling():
        return _top_op(boxes, scores, labels, *rule)
    return top_nms_torch(boxes, scores, labels, *rule)


def top_nms_torch(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_detections: int,
    room: int,
    keep_ties: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of `top_nms`: defines the result, runs anywhere; waits on a GPU."""
    flat = scores.flatten()
    number = (flat >= 0).nonzero().flatten()
    box = number // scores.shape[1]
    own = number % scores.shape[1] if labels is None else labels[box]
    keep = greedy_nms(boxes[box], flat[number], own, iou_threshold, legacy=legacy)
    kept = number[keep[top_by_score(flat[number[keep]], max_detections, keep_ties)]]
    rows = torch.nn.functional.pad(kept[:room], (0, max(0, room - len(kept))))
    return rows, torch.full((), len(kept), dtype=torch.int64, device=boxes.device)


@torch.library.custom_op("onestage::top_nms", mutates_args=())
def _top_op(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_detections: int,
    room: int,
    keep_ties: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    rule = (iou_threshold, max_detections, room, keep_ties, legacy)
    if wants_triton(boxes):
        from onestage.ops.triton.nms import top_nms_triton

        return top_nms_triton(boxes, scores, labels, *rule)
    return top_nms_torch(boxes, scores, labels, *rule)


@_top_op.register_fake
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_detections: int,
    room: int,
    keep_ties: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    return boxes.new_empty(room, dtype=torch.int64), boxes.new_empty((), dtype=torch.int64)
