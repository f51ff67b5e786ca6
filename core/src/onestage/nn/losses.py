"""Loss terms that several detectors share. Weights and normalisers are the caller's: every recipe has its own."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from onestage.boxes import paired_iou


def sigmoid_focal(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017) summed over all places and classes.

    Args:
        logits: [P, K] one sigmoid per class.
        labels: [P] int64, 0..K-1, anything negative is background.
        alpha: Weight of positives, 1 - alpha that of negatives.
        gamma: Exponent that plays down what is already right.

    Returns:
        [] float32; 0 and connected to `logits` for P = 0.
    """
    num_classes = logits.shape[1]
    # One class more takes the background and is cut off again.
    onehot = F.one_hot(torch.where(labels < 0, num_classes, labels), num_classes + 1)[:, :-1]
    return sigmoid_focal_loss(logits.float(), onehot.float(), alpha=alpha, gamma=gamma, reduction="sum")


def zero_of(*outputs: Tensor) -> Tensor:
    """[] float32 0, connected to the outputs: a batch without positives gives their parameters a gradient, too.

    The sums are float32: those of float16 outputs overflow, and 0 times infinity is no number.
    """
    return torch.stack([0 * output.sum(dtype=torch.float32) for output in outputs]).sum()


def iou_loss(boxes: Tensor, targets: Tensor, legacy: bool = False) -> Tensor:
    """-ln(IoU) of each pair (Yu et al. 2016), at most -ln(1e-6).

    Args:
        boxes: [P, 4] xyxy, any frame.
        targets: [P, 4] xyxy, same frame.
        legacy: Widths are x2 - x1 + 1.

    Returns:
        [P] float32 in [0, 13.82].
    """
    return -paired_iou(boxes, targets, legacy).clamp(min=1e-6).log()


def giou_loss_ltrb(ltrb: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU (Rezatofighi et al. 2019) of boxes around the same location, with FCOS' smoothed IoU.

    IoU = (I + 1) / (U + 1); the enclosing term has no + 1.

    Args:
        ltrb: [P, 4] predicted distances to the four sides, >= 0.
        targets: [P, 4] true distances, same unit.

    Returns:
        [P] float32 in [0, 2].
    """
    ltrb, targets = ltrb.float(), targets.float()
    iou, union = _smoothed_iou(ltrb, targets)
    enclosing = _ltrb_area(torch.maximum(ltrb, targets)) + 1e-7
    return 1 - iou + (enclosing - union) / enclosing


def iou_loss_ltrb(ltrb: Tensor, targets: Tensor, linear: bool = False) -> Tensor:
    """-ln(IoU), or 1 - IoU, of boxes around the same location, with FCOS' smoothed IoU.

    Args:
        ltrb: [P, 4] predicted distances to the four sides, >= 0.
        targets: [P, 4] true distances, same unit.
        linear: 1 - IoU.

    Returns:
        [P] float32, >= 0.
    """
    iou, _ = _smoothed_iou(ltrb.float(), targets.float())
    return 1 - iou if linear else -iou.log()


def _smoothed_iou(ltrb: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(I + 1) / (U + 1) and U, each [P]."""
    inter = _ltrb_area(torch.minimum(ltrb, targets))
    union = _ltrb_area(ltrb) + _ltrb_area(targets) - inter
    return (inter + 1) / (union + 1), union


def _ltrb_area(ltrb: Tensor) -> Tensor:
    left, top, right, bottom = ltrb.unbind(-1)
    return (left + right) * (top + bottom)
