"""Box sides moved to where a mask's rows and columns begin and end (RDSNet, Wang et al. 2020, Sec. 3.3).

A side is a position on one axis, and all it needs of a mask is that axis' *profile*: the largest value of every column
(for left and right) or row (for top and bottom). A small kernel turns the profile into a likelihood for each position,
a Gaussian around the predicted side is the prior, and the most probable position is the new side. Boxes in this file
are *inclusive*: xyxy, image pixels, x2 and y2 the last pixel inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.masks import Masks
from onestage.ops.assemble import Size, assemble_masks_torch
from onestage.ops.dispatch import wants_triton
from onestage.ops.packed import pack_windows, word_capacity

PRIOR_CUT = 0.0044  # the prior is 0 where it is not larger: beyond 3.294 deviations
LEAST_DEVIATION = 1.0  # pixels


@dataclass(frozen=True)
class Profiles:
    """Largest mask probability of every column and row of N masks.

    Args:
        columns: [N, W] float in [0, 1], 0 outside the mask's window.
        rows: [N, H] likewise.
    """

    columns: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.columns)

    @staticmethod
    def of(soft: Tensor) -> Profiles:
        """From dense probabilities [N, H, W]."""
        return Profiles(soft.amax(1), soft.amax(2))


def assemble_with_profiles(
    basis: Tensor,
    coefficients: Tensor,
    windows: Tensor,
    *,
    upsample: int = 1,
    threshold: float = 0.5,
    valid_size: Size | None = None,
    output_size: Size,
    align_corners: bool = False,
) -> tuple[Masks, Profiles]:
    """Masks as `assemble_masks` makes them in order "logits", and their profiles from the same pass.

    Neither costs a dense [N, H, W]: maxima are taken of logits inside the windows, and the sigmoid of N (H + W) maxima
    is the maximum of the sigmoids. Logits have to be numbers: a NaN becomes the maximum on the CPU and not in kernels.

    Args:
        basis, coefficients, windows, upsample, threshold, valid_size, output_size, align_corners: As in
            `assemble_masks`.

    Returns:
        N masks of `output_size` and their profiles.
    """
    how: dict[str, Any] = {
        "upsample": upsample,
        "threshold": threshold,
        "valid_size": valid_size,
        "output_size": output_size,
        "align_corners": align_corners,
    }
    if torch.compiler.is_compiling():
        image_windows, words, profiles = _profiles_op(basis, coefficients, windows, **how)
        return Masks(output_size, image_windows, words), _split(profiles, len(windows), output_size)
    if wants_triton(basis):
        return _in_parts(basis, coefficients, windows, output_size, how)
    with torch.autocast(basis.device.type, enabled=False):
        return assemble_with_profiles_torch(basis, coefficients, windows, **how)


def _in_parts(
    basis: Tensor, coefficients: Tensor, windows: Tensor, output_size: Size, how: dict[str, Any]
) -> tuple[Masks, Profiles]:
    """What the op gives, in as many parts as `Masks.in_parts` needs; profiles are small and stay where they are."""
    parts: list[Profiles] = []

    def make(some: slice) -> Masks:
        if some.start == 0:
            parts.clear()
        image_windows, words, profiles = _profiles_op(basis, coefficients[some], windows[some], **how)
        parts.append(_split(profiles, len(image_windows), output_size))
        return Masks(output_size, image_windows, words)

    masks = Masks.in_parts(make, len(windows), basis.device)
    if len(parts) == 1:
        return masks, parts[0]
    return masks, Profiles(torch.cat([part.columns for part in parts]), torch.cat([part.rows for part in parts]))


@torch.library.custom_op(
    "onestage::assemble_with_profiles",
    mutates_args=(),
    schema="(Tensor basis, Tensor coefficients, Tensor windows, *, int upsample, float threshold, int[]? valid_size, "
    "int[] output_size, bool align_corners) -> (Tensor, Tensor, Tensor)",
)
def _profiles_op(basis: Tensor, coefficients: Tensor, windows: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Windows and words as of `assemble_masks`, and both profiles in one vector [N * (W + H)], the columns' first."""
    how = {name: tuple(value) if isinstance(value, list) else value for name, value in how.items()}
    if wants_triton(basis):
        from onestage.ops.triton.edges import assemble_with_profiles_triton

        return assemble_with_profiles_triton(basis, coefficients, windows, **how)
    with torch.autocast(basis.device.type, enabled=False):
        masks, profiles = assemble_with_profiles_torch(basis, coefficients, windows, **how)
    words = pack_windows(masks.windows, masks.pixels, word_capacity(len(masks), masks.size))
    return masks.windows, words, torch.cat((profiles.columns.flatten(), profiles.rows.flatten()))


@_profiles_op.register_fake
def _(
    basis: Tensor, coefficients: Tensor, windows: Tensor, *, output_size: Size, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    count = windows.shape[0]
    words = windows.new_empty(word_capacity(count, output_size), dtype=torch.int32)
    profiles = windows.new_empty(count * sum(output_size), dtype=torch.float32)
    return windows.new_empty(count, 4, dtype=torch.int64), words, profiles


def _split(profiles: Tensor, count: int, size: Size) -> Profiles:
    height, width = size
    columns, rows = profiles.split((count * width, count * height))
    return Profiles(columns.view(count, width), rows.view(count, height))


@torch.no_grad()
def assemble_with_profiles_torch(
    basis: Tensor, coefficients: Tensor, windows: Tensor, *, output_size: Size, **how: object
) -> tuple[Masks, Profiles]:
    """Plain-torch twin of `assemble_with_profiles`: defines the result, runs anywhere."""
    columns, rows = (
        torch.full((len(windows), extent), -torch.inf, device=basis.device) for extent in reversed(output_size)
    )
    masks = assemble_masks_torch(
        basis,
        coefficients,
        windows,
        order="logits",
        output_size=output_size,
        maxima=(columns, rows),
        **how,  # type: ignore[arg-type]
    )
    return masks, Profiles(columns.sigmoid_(), rows.sigmoid_())


@torch.no_grad()
def refine_boxes(profiles: Profiles, boxes: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """Every side at its most probable position (Eq. 6).

    Args:
        profiles: Of N masks.
        boxes: [N, 4] inclusive xyxy, pixels of the profiles' image.
        weight: [2 s + 1], the kernel for left and top sides; right and bottom ones see it mirrored.
        bias: [] or [1], of the same logit for all sides.
        gamma: Standard deviation of the prior, in box sides; 0 leaves boxes as they are.

    Returns:
        [N, 4] inclusive xyxy: whole pixels; a side whose prior has no position in the image stays.
    """
    if gamma == 0 or len(boxes) == 0:
        return boxes.clone()
    if wants_triton(boxes) or torch.compiler.is_compiling():
        inputs = (value.float() for value in (profiles.columns, profiles.rows, boxes, weight, bias))
        return _refine_op(*inputs, gamma).to(boxes.dtype)
    with torch.autocast(boxes.device.type, enabled=False):
        return refine_boxes_torch(profiles, boxes, weight, bias, gamma)


@torch.library.custom_op(
    "onestage::refine_boxes",
    mutates_args=(),
    schema="(Tensor columns, Tensor rows, Tensor boxes, Tensor weight, Tensor bias, float gamma) -> Tensor",
)
def _refine_op(columns: Tensor, rows: Tensor, boxes: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """`refine_boxes` on plain tensors, float32."""
    if wants_triton(boxes):
        from onestage.ops.triton.edges import refine_boxes_triton

        return refine_boxes_triton(columns, rows, boxes, weight, bias, gamma, LEAST_DEVIATION, PRIOR_CUT)
    with torch.autocast(boxes.device.type, enabled=False):
        return refine_boxes_torch(Profiles(columns, rows), boxes, weight, bias, gamma)


@_refine_op.register_fake
def _(columns: Tensor, rows: Tensor, boxes: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    return boxes.new_empty(boxes.shape)


@torch.no_grad()
def refine_boxes_torch(profiles: Profiles, boxes: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """Plain-torch twin of `refine_boxes`: defines the result, runs anywhere."""
    refined = boxes.clone(memory_format=torch.contiguous_format)
    for axis, profile in enumerate((profiles.columns, profiles.rows)):
        sides = side_posteriors(profile, boxes[:, axis], boxes[:, axis + 2], weight, bias, gamma)
        for side, posterior in zip((axis, axis + 2), sides, strict=True):
            best, position = posterior.max(1)
            refined[:, side] = torch.where(best > 0, position.to(boxes.dtype), boxes[:, side])
    return refined


def side_posteriors(
    profile: Tensor, low: Tensor, high: Tensor, weight: Tensor, bias: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """How probable each position is for the two sides of boxes along one axis; differentiable in the kernel.

    Args:
        profile: [N, E] in [0, 1], largest probability at every position of the axis.
        low: [N] predicted left (or top) sides, pixels.
        high: [N] predicted right (or bottom) sides, the last pixel inside.
        weight: [2 s + 1].
        bias: [] or [1].
        gamma: Standard deviation of the prior, in lengths `high - low`.

    Returns:
        [N, E] for `low` and for `high`, each row with sum 1, or all 0 where the prior has no position on the axis.
    """
    kernel = weight.view(1, 1, -1)
    reach = kernel.shape[2] // 2
    deviation = (gamma * (high - low)).clamp(min=LEAST_DEVIATION)
    position = torch.arange(profile.shape[1], dtype=profile.dtype, device=profile.device)
    posteriors = []
    for side, kernel_of_side in ((low, kernel), (high, kernel.flip(2))):
        logits = F.conv1d(profile[:, None], kernel_of_side, bias.view(1), padding=reach)[:, 0]
        prior = torch.exp(-((position - side[:, None]) ** 2) / (2 * deviation[:, None] ** 2))
        joint = logits.sigmoid() * prior.masked_fill(prior <= PRIOR_CUT, 0.0)
        total = joint.sum(1, keepdim=True)
        posteriors.append(joint / torch.where(total > 0, total, 1.0))
    return posteriors[0], posteriors[1]


@torch.no_grad()
def enclosing_boxes(profiles: Profiles, boxes: Tensor, threshold: float) -> Tensor:
    """The smallest boxes around what is above a threshold: sides read off the masks, no prior.

    Args:
        profiles: Of N masks.
        boxes: [N, 4], taken over where a mask is empty.
        threshold: Probability.

    Returns:
        [N, 4] inclusive xyxy, whole pixels.
    """
    enclosing = boxes.clone()
    for axis, profile in enumerate((profiles.columns, profiles.rows)):
        filled = profile > threshold
        some = filled.any(1)
        first = filled.byte().argmax(1)
        last = profile.shape[1] - 1 - filled.flip(1).byte().argmax(1)
        enclosing[:, axis] = torch.where(some, first.to(boxes.dtype), boxes[:, axis])
        enclosing[:, axis + 2] = torch.where(some, last.to(boxes.dtype), boxes[:, axis + 2])
    return enclosing
