"""The kernel of greedy NMS: one program walks over the candidates, best first, and stops when enough are kept.

A candidate is compared with what is kept and with better ones of its block, so there is no matrix of all candidates,
and no limit to their number. Blocks of 32 go against 32 kept boxes at a time. Inside a block the greedy answer is the
one fixed point of "stays, if nothing better that stays removes it": what does not change any more is it, after as many
rounds as the longest chain of removals has links. In float64, as torchvision's on the CPU, and rounded as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onestage.boxes import from_legacy
from onestage.ops.triton.check import KernelCase
from onestage.ops.triton.plan import on_its_gpu

BLOCK = 32  # candidates, and kept boxes, that are compared at a time
NUM_WARPS = 8
FUSE = False  # products and sums round one by one, as on the CPU: an IoU may lie exactly at the threshold


@on_its_gpu
def top_nms_triton(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_detections: int,
    room: int,
    keep_ties: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Kernel of `top_nms`, with the arguments and the result of its twin; ties without room may count as one."""
    device = boxes.device
    number = torch.zeros(room, dtype=torch.int64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    if scores.numel() == 0:
        return number, count
    exact = boxes.double()
    flat = scores.flatten().float()
    # NaN is no candidate, but would be the first of them.
    ordered, order = torch.where(flat >= 0, flat, -1.0).sort(descending=True, stable=True)
    _walk_kernel[(1,)](
        (from_legacy(exact) if legacy else exact).contiguous(),
        None if labels is None else labels.contiguous(),
        ordered,
        order,
        torch.full((1,), iou_threshold, dtype=torch.float64, device=device),  # an argument would be rounded to float32
        torch.empty(room, 4, dtype=torch.float64, device=device),
        torch.empty(room, dtype=torch.int64, device=device),
        number,
        count,
        scores.numel(),
        scores.shape[1],
        max_detections,
        room,
        keep_ties,
        BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=FUSE,
    )
    return number, count


@triton.jit(do_not_specialize=["total"])
def _walk_kernel(
    boxes_ptr,  # [N, 4] float64, exclusive
    labels_ptr,  # [N] int64 or None
    ordered_ptr,  # [N * K] float32 scores, descending
    order_ptr,  # [N * K] int64, whose they are
    threshold_ptr,  # [1] float64
    kept_ptr,  # [room, 4] float64, the boxes kept so far
    kept_labels_ptr,  # [room] int64
    number_ptr,  # [room] int64
    count_ptr,  # [] int64
    total,
    columns,
    most,
    room,
    KEEP_TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    threshold = tl.load(threshold_ptr)
    lane = tl.arange(0, BLOCK)
    kept = tl.zeros((), tl.int32)
    last = tl.full((), -1.0, tl.float32)  # score of the last one that is kept whatever scores like it
    first = tl.zeros((), tl.int32)
    following = tl.load(ordered_ptr)
    going = (following >= 0) & (most > 0)
    while going:
        place = first + lane
        score = tl.load(ordered_ptr + place, mask=place < total, other=-1.0)
        candidate = score >= 0
        number = tl.load(order_ptr + place, mask=candidate, other=0)
        box = number // columns
        if labels_ptr is not None:
            label = tl.load(labels_ptr + box, mask=candidate, other=0)
        else:
            label = number % columns
        x1, y1, x2, y2 = _load_boxes(boxes_ptr, box, candidate)
        alive = candidate.to(tl.int32)
        start = tl.zeros((), tl.int32)
        while start < kept:
            before = start + lane
            there = before < kept
            a1, b1, a2, b2 = _load_boxes(kept_ptr, before, there)
            rival = tl.load(kept_labels_ptr + before, mask=there, other=-1)
            over = _overlap(x1, y1, x2, y2, label, a1, b1, a2, b2, rival, threshold)
            alive = tl.where(tl.max(over.to(tl.int32), 1) > 0, 0, alive)
            start += BLOCK
        over = _overlap(x1, y1, x2, y2, label, x1, y1, x2, y2, label, threshold)
        removes = (over & (lane[:, None] > lane[None, :])).to(tl.int32)  # [falls, removes]
        stays = alive
        changed = tl.full((), 1, tl.int32)
        while changed > 0:
            falls = tl.max(removes * stays[None, :], 1)
            now = tl.where(falls > 0, 0, alive)
            changed = tl.max((now != stays).to(tl.int32), 0)
            stays = now
        rank = kept + tl.cumsum(stays, 0) - stays
        last = tl.maximum(last, tl.max(tl.where((stays > 0) & (rank == most - 1), score, -1.0), 0))
        counts = rank < most
        if KEEP_TIES:
            counts |= score == last
        taken = (stays > 0) & counts
        stored = taken & (rank < room)
        tl.store(number_ptr + rank, number, mask=stored)
        tl.store(kept_labels_ptr + rank, label, mask=stored)
        tl.store(kept_ptr + rank * 4, x1, mask=stored)
        tl.store(kept_ptr + rank * 4 + 1, y1, mask=stored)
        tl.store(kept_ptr + rank * 4 + 2, x2, mask=stored)
        tl.store(kept_ptr + rank * 4 + 3, y2, mask=stored)
        tl.debug_barrier()  # other threads read what these have written
        kept += tl.sum(taken.to(tl.int32), 0)
        first += BLOCK
        following = tl.load(ordered_ptr + first, mask=first < total, other=-1.0)
        going = (following >= 0) & (kept < most)
        if KEEP_TIES:
            going |= (following >= 0) & (following == last) & (kept <= room)
    tl.store(count_ptr, kept.to(tl.int64))


@triton.jit
def _load_boxes(boxes_ptr, index, there):
    """The sides of boxes by number, 0 where `there` says so."""
    boxes_ptr += index * 4
    x1 = tl.load(boxes_ptr, mask=there, other=0.0)
    y1 = tl.load(boxes_ptr + 1, mask=there, other=0.0)
    x2 = tl.load(boxes_ptr + 2, mask=there, other=0.0)
    y2 = tl.load(boxes_ptr + 3, mask=there, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _overlap(x1, y1, x2, y2, label, a1, b1, a2, b2, rival, threshold):
    """[n, m] bool, whether boxes [n] and [m] are of one label and their IoU is above the threshold."""
    width = tl.minimum(x2[:, None], a2[None, :]) - tl.maximum(x1[:, None], a1[None, :])
    height = tl.minimum(y2[:, None], b2[None, :]) - tl.maximum(y1[:, None], b1[None, :])
    inter = tl.where((width > 0) & (height > 0), width * height, 0.0)
    union = ((x2 - x1) * (y2 - y1))[:, None] + ((a2 - a1) * (b2 - b1))[None, :] - inter
    # As torchvision divides; boxes inside out can have a union of 0, and 1 / 0 is larger than any threshold.
    over = (union == 0) | (inter / tl.where(union == 0, 1.0, union) > threshold)
    return (inter > 0) & over & (label[:, None] == rival[None, :])


def compile_cases() -> list[KernelCase]:
    """What the compile check compiles."""
    given = dict.fromkeys(("boxes_ptr", "threshold_ptr", "kept_ptr"), "*fp64")
    given |= dict.fromkeys(("labels_ptr", "order_ptr", "kept_labels_ptr", "number_ptr", "count_ptr"), "*i64")
    given |= {"ordered_ptr": "*fp32"} | dict.fromkeys(("total", "columns", "most", "room"), "i32")
    cases = []
    for name, labels, keep_ties in (("classes", None, False), ("labels, ties", "*i64", True)):
        arguments = given | {"labels_ptr": labels, "KEEP_TIES": keep_ties, "BLOCK": BLOCK}
        arguments = {key: arguments[key] for key in _walk_kernel.arg_names}
        cases.append(KernelCase(name, _walk_kernel, arguments, NUM_WARPS, fp_fusion=FUSE))
    return cases
