"""From scored boxes to the best detections: greedy NMS per class, matrix ("fast") NMS, cuts to the best.

Candidates come as N boxes with K class scores each, and one box may survive under several classes; or as pairs of box
and class. How many survive depends on values. On the CPU results have as many rows; with `room` they have that many
rows and a count, so that a GPU is not waited for until all is done (`settled`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onestage.boxes import iou_matrix, paired_iou
from onestage.ops import host
from onestage.ops.nms import greedy_nms, top_by_score, top_nms
from onestage.structures import Detections

TIES = 8  # rows for detections that score as the last of the best


@dataclass(frozen=True)
class Kept:
    """Survivors, best first.

    Args:
        index: [M] int64 into the candidates.
        labels: [M] int64, 0..K-1.
        scores: [M] float.
        count: [] int64, how many survive where only the device knows; the other rows are 0. More than M: there was no
            room for all. None: all M.
    """

    index: Tensor
    labels: Tensor
    scores: Tensor
    count: Tensor | None = None

    def of(self, index: Tensor) -> Kept:
        """The same with `index` into what the candidates [N] int64 were chosen from."""
        return replace(self, index=self.take(index))

    def take(self, values: Tensor) -> Tensor:
        """The rows of the survivors: [N, ...] to [M, ...], 0 where there is none."""
        return _fill(values[self.index], self.count)

    def those(self, fit: Tensor) -> tuple[Kept, Tensor]:
        """The survivors that `fit` [M] bool names, and where each was, [M'] int64."""
        if self.count is None:
            place = fit.nonzero().flatten()
            return Kept(self.index[place], self.labels[place], self.scores[place]), place
        rows = torch.arange(len(fit), device=fit.device)
        fit = fit & (rows < self.count)
        place = fit.logical_not().byte().sort(stable=True).indices  # those that fit, then anything
        # Without room for all it is not known how many fit: the count stays one that says so.
        count = torch.where(self.count > len(fit), self.count, fit.sum())
        index, labels, scores = (_fill(part[place], count) for part in (self.index, self.labels, self.scores))
        return Kept(index, labels, scores, count), place


def settled(
    decode: Callable[[int, int | None], tuple[Detections, Tensor | None]],
    num_images: int,
    device: torch.device,
    room: int,
) -> list[Detections]:
    """Detections of B images; the host waits for a GPU once, at the end.

    Args:
        decode: (image, room) to its detections and their count, as `Kept` has it; room None: as many as there are.
        num_images: B.
        device: Where the network's outputs are.
        room: Rows of an image. Where they turn out too few for all equals of the last detection, the image is decoded
            again with twice as many.
    """
    if not host.keeps_fixed_shapes(device):
        return [decode(i, None)[0] for i in range(num_images)]
    padded = [decode(i, room) for i in range(num_images)]
    (counts,) = host.to_host(torch.stack([count for _, count in padded if count is not None]))
    detections = []
    for i, ((found, _), number) in enumerate(zip(padded, counts.tolist(), strict=True)):
        rows = room
        while number > rows:
            rows *= 2
            found, count = decode(i, rows)
            assert count is not None
            number = int(host.to_host(count)[0])
        detections.append(found[:number])
    return detections


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
    room: int | None = None,
) -> Kept:
    """Greedy NMS of each class.

    Args:
        boxes: [N, 4] xyxy, any frame.
        scores: [N, K] class scores in [0, 1]; -1 for what is no candidate.
        iou_threshold: A box is removed if its IoU with a better kept one of its class is larger.
        score_threshold: Candidates need a class score larger than this, before `factors`.
        max_detections: How many are kept over all classes.
        factors: [N] that multiply the scores after the threshold (centre-ness), or None.
        legacy: Widths are x2 - x1 + 1.
        keep_ties: Also keeps those that score as the last one kept.
        room: Rows of the result, see `Kept.count`; None: as many as are kept, and a GPU is waited for.
    """
    if room is not None:
        ranks = scores if factors is None else scores * factors[:, None]
        candidates = torch.where(scores > score_threshold, ranks, -1.0)
        number, count = top_nms(
            boxes,
            candidates,
            None,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            room=room,
            keep_ties=keep_ties,
            legacy=legacy,
        )
        return _kept(number, candidates, count)
    index, labels = (scores > score_threshold).nonzero(as_tuple=True)
    pair_scores = scores[index, labels]
    if factors is not None:
        pair_scores = pair_scores * factors[index]
    keep = greedy_nms(boxes[index], pair_scores, labels, iou_threshold, legacy=legacy)
    keep = keep[top_by_score(pair_scores[keep], max_detections, keep_ties)]
    return Kept(index[keep], labels[keep], pair_scores[keep])


def pair_nms(
    boxes: Tensor,
    pairs: Kept,
    *,
    iou_threshold: float,
    max_detections: int,
    legacy: bool = False,
    keep_ties: bool = False,
    room: int | None = None,
) -> Kept:
    """Greedy NMS of each class where candidates are pairs of box and class.

    Args:
        boxes: [N, 4] xyxy, any frame, of the pairs.
        pairs: N pairs; a score below 0 is no candidate.
        iou_threshold, max_detections, legacy, keep_ties, room: As in `class_wise_nms`.

    Returns:
        Survivors with the `index` of their pairs, and where they were among these comes from `take`.
    """
    if room is None:
        keep = greedy_nms(boxes, pairs.scores, pairs.labels, iou_threshold, legacy=legacy)
        keep = keep[top_by_score(pairs.scores[keep], max_detections, keep_ties)]
        return Kept(keep, pairs.labels[keep], pairs.scores[keep])
    number, count = top_nms(
        boxes,
        pairs.scores[:, None],
        pairs.labels,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        room=room,
        keep_ties=keep_ties,
        legacy=legacy,
    )
    return Kept(number, _fill(pairs.labels[number], count), _fill(pairs.scores[number], count), count)


def fast_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
    top_k: int = 200,
    room: int | None = None,
) -> Kept:
    """Matrix NMS of each class (Bolya et al. 2019): a box falls to any better one, removed or not.

    Low scores are dropped before the IoUs are computed; since only better boxes remove, this changes nothing.

    Args:
        boxes: [N, 4] xyxy, any frame, exclusive.
        scores: [N, K] final scores in [0, 1].
        iou_threshold: A box is removed if its IoU with a better one of its class is larger.
        score_threshold: Survivors need a larger score.
        max_detections: How many are kept over all classes.
        top_k: Candidates per class.
        room: As in `class_wise_nms`, `max_detections` or more.
    """
    if room is not None:
        return _fast_nms_in_rows(boxes, scores, iou_threshold, score_threshold, max_detections, top_k, room)
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


def _fast_survivors(boxes: Tensor, labels: Tensor, iou_threshold: float, top_k: int) -> Tensor:
    """Positions of the candidates [n, 4], given best first, that no better one of their label overlaps: ascending."""
    by_class = labels.sort(stable=True).indices
    kept = [by_class[:0]]
    for candidates in by_class.split(labels.unique(return_counts=True)[1].tolist()):
        best = candidates[:top_k]
        overlap = iou_matrix(boxes[best], boxes[best]).triu_(diagonal=1)
        kept.append(best[~(overlap > iou_threshold).any(dim=0)])
    return torch.cat(kept).sort().values


def _fast_nms_in_rows(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
    top_k: int,
    room: int,
) -> Kept:
    """`fast_nms` with a matrix for each class, of its `top_k` best boxes, be they candidates or not."""
    candidates = torch.where(scores > score_threshold, scores, -1.0)
    ordered, order = (part[:top_k].T for part in candidates.sort(dim=0, descending=True, stable=True))  # [K, top_k]
    own = boxes[order]
    overlap = paired_iou(own[:, :, None], own[:, None]).triu(diagonal=1)  # [K, better, worse]
    stays = (ordered >= 0) & ~(overlap > iou_threshold).any(dim=1)
    number = order * scores.shape[1] + torch.arange(scores.shape[1], device=order.device)[:, None]
    number, place = number.flatten().sort()  # equals of several classes in their order
    best, rank = torch.where(stays, ordered, -1.0).flatten()[place].sort(descending=True, stable=True)
    number = torch.nn.functional.pad(number[rank[:room]], (0, max(0, room - len(rank))))
    return _kept(number, candidates, (best >= 0).sum().clamp(max=max_detections))


def _kept(number: Tensor, scores: Tensor, count: Tensor) -> Kept:
    """Survivors from their numbers [M] in the flattened `scores` [N, K]."""
    columns = scores.shape[1]
    index, labels = _fill(number // columns, count), _fill(number % columns, count)
    return Kept(index, labels, _fill(scores.flatten()[number], count), count)


def _fill(rows: Tensor, count: Tensor | None) -> Tensor:
    """`rows` [M, ...] with 0 from row `count` on."""
    if count is None:
        return rows
    there = torch.arange(len(rows), device=rows.device) < count
    return torch.where(there.view(-1, *[1] * (rows.ndim - 1)), rows, 0)
