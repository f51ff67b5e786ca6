"""Removing duplicate detections: greedy NMS per class, matrix ("fast") NMS, and cuts to the best.

Candidates come as N boxes with K class scores each; one box may survive under several classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import ops

from onestage.boxes import from_legacy, iou_matrix


@dataclass(frozen=True)
class Kept:
    """Survivors, best first.

    Args:
        index: [M] int64 into the candidates.
        labels: [M] int64, 0..K-1.
        scores: [M] float.
    """

    index: Tensor
    labels: Tensor
    scores: Tensor


def class_wise_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
    factors: Tensor | None = None,
    legacy: bool = False,
    keep_ties: bool = False,
) -> Kept:
    """Greedy NMS of each class.

    Args:
        boxes: [N, 4] xyxy, any frame.
        scores: [N, K] class scores in [0, 1].
        iou_threshold: A box is removed if its IoU with a better kept one of its class is larger.
        score_threshold: Candidates need a class score larger than this, before `factors`.
        max_detections: How many are kept over all classes.
        factors: [N] that multiply the scores after the threshold (centre-ness), or None.
        legacy: Widths are x2 - x1 + 1.
        keep_ties: Also keeps those that score as the last one kept.
    """
    index, labels = (scores > score_threshold).nonzero(as_tuple=True)
    pair_scores = scores[index, labels]
    if factors is not None:
        pair_scores = pair_scores * factors[index]
    keep = greedy_nms(boxes[index], pair_scores, labels, iou_threshold, legacy=legacy)
    keep = keep[top_by_score(pair_scores[keep], max_detections, keep_ties)]
    return Kept(index[keep], labels[keep], pair_scores[keep])


def greedy_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, *, legacy: bool = False
) -> Tensor:
    """Greedy NMS within labels.

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


def fast_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
    top_k: int = 200,
) -> Kept:
    """Matrix NMS of each class (Bolya et al. 2019): a box falls to any better one, removed or not.

    Low scores are dropped before the IoUs are computed; since only better boxes remove, this changes nothing.

    Args:
        boxes: [N, 4] xyxy, any frame, exclusive.
        scores: [N, K] final scores.
        iou_threshold: A box is removed if its IoU with a better one of its class is larger.
        score_threshold: Survivors need a larger score.
        max_detections: How many are kept over all classes.
        top_k: Candidates per class.
    """
    index, labels = (scores > score_threshold).nonzero(as_tuple=True)
    pair_scores, order = scores[index, labels].sort(descending=True, stable=True)
    index, labels = index[order], labels[order]
    # The fate of a candidate depends on better ones only: as soon as enough of the best survive, the rest is moot.
    budget = 8 * max_detections
    kept = _fast_survivors(boxes[index[:budget]], labels[:budget], iou_threshold, top_k)
    while len(kept) < max_detections and budget < len(index):
        budget *= 4
        kept = _fast_survivors(boxes[index[:budget]], labels[:budget], iou_threshold, top_k)
    kept = kept[:max_detections]
    return Kept(index[kept], labels[kept], pair_scores[kept])


def top_by_score(scores: Tensor, k: int, keep_ties: bool = False) -> Tensor:
    """Index of the k best of `scores` [N], best first, equals in their order; all if there are at most k.

    Args:
        scores: [N].
        k: How many.
        keep_ties: Also keeps those that score as the k-th.
    """
    ordered, order = scores.sort(descending=True, stable=True)
    if keep_ties and 0 < k < len(scores):
        return order[ordered >= ordered[k - 1]]
    return order[:k]


def _fast_survivors(boxes: Tensor, labels: Tensor, iou_threshold: float, top_k: int) -> Tensor:
    """Positions of the candidates [n, 4], given best first, that no better one of their label overlaps: ascending."""
    by_class = labels.sort(stable=True).indices
    kept = [by_class[:0]]
    for candidates in by_class.split(labels.unique(return_counts=True)[1].tolist()):
        best = candidates[:top_k]
        overlap = iou_matrix(boxes[best], boxes[best]).triu_(diagonal=1)
        kept.append(best[~(overlap > iou_threshold).any(dim=0)])
    return torch.cat(kept).sort().values
