"""What detectors without anchors share (FCOS, Tian et al. 2019): locations, assignment, centre-ness, box decoding.

Locations of all levels are one flat list, level by level, row by row. P: locations of all levels, G: ground truths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onestage import boxes as box_ops
from onestage.nn.nms import Kept
from onestage.structures import Target

STRIDES = (8, 16, 32, 64, 128)  # P3..P7

# Of the largest of the four distances, pixels, both ends inclusive, P3..P7.
LEVEL_RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))

# (candidates [P, G] bool, ltrb [P, G, 4], area [G]) -> [P] int64 ground truth; what it says without candidates is
# ignored.
Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


def locations(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int] = STRIDES, device: torch.device | None = None
) -> Tensor:
    """The places that cells stand for.

    Args:
        sizes: (h, w) of each level.
        strides: Input pixels per cell of each level.
        device: Where the result lives.

    Returns:
        [P, 2] float32 (x, y), input pixels: cell (i, j) lies at (j * s + s // 2, i * s + s // 2).
    """
    points = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y = torch.arange(height, dtype=torch.float32, device=device) * stride + stride // 2
        x = torch.arange(width, dtype=torch.float32, device=device) * stride + stride // 2
        # Broadcast, not repeated: ONNX's exporter gets repeat_interleave wrong where sizes are open.
        points.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=2).flatten(0, 1))
    return torch.cat(points)


def per_location(
    sizes: Sequence[tuple[int, int]],
    values: Sequence[float] | Sequence[tuple[float, float]],
    device: torch.device | None = None,
) -> Tensor:
    """One value of each level (a stride, a range, an index) for each of its locations: [P] or [P, n] float32."""
    levels: list[Tensor] = []
    value: Any
    for (height, width), value in zip(sizes, values, strict=True):
        # Filled on the device: nothing is copied from the host.
        numbers = value if isinstance(value, tuple) else (value,)
        columns = [torch.full((height * width,), float(number), device=device) for number in numbers]
        levels.append(torch.stack(columns, dim=1) if isinstance(value, tuple) else columns[0])
    return torch.cat(levels)


@dataclass(frozen=True)
class Assignment:
    """Which ground truth each of the P locations of B images answers for.

    Args:
        labels: [B, P] int64, class 0..K-1, -1 for background.
        index: [B, P] int64, position of the answered instance in its image's target, -1 for background.
        ltrb: [B, P, 4] float32, distances from location to the instance's sides, pixels; 0 where background.
        strides: [P] float32, pixels per cell of each location's level.
    """

    labels: Tensor
    index: Tensor
    ltrb: Tensor
    strides: Tensor


def assign_batch(
    points: Tensor,
    sizes: Sequence[tuple[int, int]],
    targets: Sequence[Target],
    *,
    ranges: Sequence[tuple[float, float]] = LEVEL_RANGES,
    radius: float | None = 1.5,
    legacy: bool = False,
    choose: Choose | None = None,
) -> Assignment:
    """`assign` for every image of a batch, with classes.

    Args:
        points: [P, 2] (x, y), input pixels.
        sizes: (h, w) of each level, strides `STRIDES`.
        targets: One per image, boxes in input pixels.
        ranges: Smallest and largest distance each level answers for, pixels, inclusive.
        radius, legacy, choose: As in `assign`.
    """
    strides = per_location(sizes, STRIDES, points.device)
    limits = per_location(sizes, ranges, points.device)
    labels, index, ltrb = [], [], []
    for target in targets:
        matched, distances = assign(points, strides, limits, target.boxes, radius=radius, legacy=legacy, choose=choose)
        background = torch.cat((target.labels, target.labels.new_tensor([-1])))  # index -1 reads the last
        labels.append(background[matched])
        index.append(matched)
        ltrb.append(distances)
    return Assignment(torch.stack(labels), torch.stack(index), torch.stack(ltrb), strides)


def assign(
    points: Tensor,
    strides: Tensor,
    ranges: Tensor,
    boxes: Tensor,
    *,
    radius: float | None = 1.5,
    legacy: bool = False,
    choose: Choose | None = None,
) -> tuple[Tensor, Tensor]:
    """Which ground truth each location answers for.

    A location is a candidate for a box if it lies strictly inside it (and inside its centre region) and the largest
    of its four distances to the sides is in the location's range. Of several, the smallest box wins.

    Args:
        points: [P, 2] (x, y), input pixels.
        strides: [P] input pixels per cell of the location's level.
        ranges: [P, 2] smallest and largest distance the location's level answers for, pixels, inclusive.
        boxes: [G, 4] xyxy, input pixels; G = 0 is legal.
        radius: Half side of the square centre region in strides; None: the whole box.
        legacy: Areas are (w + 1)(h + 1).
        choose: Decides between candidates; `smallest_area` if None.

    Returns:
        index: [P] int64, 0..G-1, -1 for background.
        ltrb: [P, 4] distances to the left, top, right, bottom side of the assigned box, pixels; 0 for background.
    """
    if len(boxes) == 0:
        return points.new_full((len(points),), -1, dtype=torch.int64), points.new_zeros(len(points), 4)
    ltrb = torch.cat((points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]), dim=2)  # [P, G, 4]
    farthest = ltrb.amax(dim=2)
    candidates = (farthest >= ranges[:, :1]) & (farthest <= ranges[:, 1:])
    candidates &= ltrb.amin(dim=2) > 0
    if radius is not None:
        candidates &= _in_center(points, strides, boxes, radius)
    winner = (choose or smallest_area)(candidates, ltrb, box_ops.area(boxes, legacy))
    assigned = candidates.any(dim=1)
    index = torch.where(assigned, winner, -1)
    own = ltrb[torch.arange(len(points), device=points.device), winner]
    return index, torch.where(assigned[:, None], own, 0.0)


def smallest_area(candidates: Tensor, ltrb: Tensor, area: Tensor) -> Tensor:
    """Of each location's candidates the one of smallest area, of equals the first: [P] int64."""
    return torch.where(candidates, area[None], torch.inf).argmin(dim=1)


def centerness_target(ltrb: Tensor) -> Tensor:
    """How central a location is in its box: 1 in the middle, towards 0 at the sides.

    Args:
        ltrb: [..., 4] distances > 0, any unit.

    Returns:
        [...] sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)); 0 for locations outside.
    """
    low = torch.minimum(ltrb[..., :2], ltrb[..., 2:]).clamp(min=0)
    high = torch.maximum(ltrb[..., :2], ltrb[..., 2:])
    ratio = torch.where(low > 0, low / high, 0.0)
    return ratio.prod(dim=-1).sqrt()


def decode_ltrb(points: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes from locations [..., 2] (x, y) and distances [..., 4] of the same unit: [..., 4] xyxy, not clipped."""
    return torch.cat((points - ltrb[..., :2], points + ltrb[..., 2:]), dim=-1)


def top_per_level(scores: Sequence[Tensor], k: int) -> Tensor:
    """The best k entries of each level.

    Args:
        scores: One [n_l] tensor per level.
        k: Levels of at most k entries are kept whole, in their order; of others the best, best first, equals in their
            order.

    Returns:
        [M] int64 index into the concatenated levels, level by level.
    """
    kept, start = [], 0
    for level in scores:
        index = _top_in_order(level, k) if len(level) > k else torch.arange(len(level), device=level.device)
        kept.append(index + start)
        start += len(level)
    return torch.cat(kept)


def top_pairs_per_level(values: Tensor, counts: Sequence[int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best k pairs of location and class of each level; all if it has no more. Nothing waits on a GPU.

    Args:
        values: [P, K] float32 or half, finite or -inf.
        counts: Locations (or anchors) of each level, P in sum.
        k: How many.

    Returns:
        index [M] int64 location, labels [M] int64 and values [M]: level by level, best first, equals in their order.
    """
    chosen, start, columns = [], 0, values.shape[1]
    for level in values.split(list(counts)):
        chosen.append(_top_in_order(level.flatten(), k) + start * columns)
        start += len(level)
    number = torch.cat(chosen)
    return number // columns, number % columns, values.flatten()[number]


def best_pairs(
    logits: Tensor,
    centerness: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float,
    per_level: int,
    threshold_with_centerness: bool = False,
    fixed: bool = False,
) -> Kept:
    """Candidates as (location, class) pairs, ranked by class score x centre-ness, scored by its square root.

    Args:
        logits: [P, K] class logits.
        centerness: [P] logits.
        sizes: (h, w) of each level.
        score_threshold: Candidates need a larger class score.
        per_level: How many pairs of a level are kept.
        threshold_with_centerness: The threshold is on the product instead.
        fixed: The number of pairs does not depend on values; those that are no candidates score -1.

    Returns:
        M pairs, `index` their location, scores float in [0, 1]; level by level, best first, equals in their order.
    """
    scores, factors = logits.float().sigmoid(), centerness.float().sigmoid()
    judged = scores * factors[:, None] if threshold_with_centerness else scores
    counts = [height * width for height, width in sizes]
    if fixed:
        products = torch.where(judged > score_threshold, scores * factors[:, None], -1.0)
        index, labels, best = top_pairs_per_level(products, counts, per_level)
        return Kept(index, labels, torch.where(best < 0, best, best.sqrt()))
    index, labels = (judged > score_threshold).nonzero(as_tuple=True)
    products = scores[index, labels] * factors[index]
    # Locations ascend, level by level: one look at where levels begin instead of one for each level.
    starts = torch.tensor(counts[:-1], device=index.device).cumsum(0)
    chosen, start = [], 0
    for level in products.tensor_split(torch.searchsorted(index, starts).tolist()):
        if len(level) > per_level:  # only what is not below the last of the best has to be put in order
            near = (level >= level.topk(per_level).values[-1]).nonzero().flatten()
            chosen.append(near[_top_in_order(level[near], per_level)] + start)
        else:
            chosen.append(_top_in_order(level, per_level) + start)
        start += len(level)
    best = torch.cat(chosen)
    return Kept(index[best], labels[best], products[best].sqrt())


def _top_in_order(values: Tensor, k: int) -> Tensor:
    """[k] int64 places of the best of `values` [n], best first, equals in their order; all n if there are fewer."""
    # A float's bits order like whole numbers once those of negative ones are turned round; the place settles the rest.
    bits = (values.float() + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    place = torch.arange(len(values), device=values.device)
    keys = (bits << 32) + (0xFFFFFFFF - place)
    return 0xFFFFFFFF - (keys.topk(min(k, len(values))).values & 0xFFFFFFFF)


def _in_center(points: Tensor, strides: Tensor, boxes: Tensor, radius: float) -> Tensor:
    """[P, G] bool: strictly within `radius` strides of the box centre, on both axes."""
    center = ((boxes[:, :2] + boxes[:, 2:]) / 2)[None]
    reach = (radius * strides)[:, None, None]
    # Corners first, as the released codes do: rounding then agrees where a location lies on the region's border.
    low, high = center - reach, center + reach  # [P, G, 2]
    return ((points[:, None] > low) & (points[:, None] < high)).all(dim=2)
