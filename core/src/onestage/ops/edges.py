"""Box sides moved to where a mask's rows and columns begin and end (RDSNet, Wang et al. 2020, Sec. 3.3).

A side is a position on one axis, and all it needs of a mask is that axis' *profile*: the largest value of every column
(for left and right) or row (for top and bottom). A small kernel turns the profile into a likelihood for each position,
a Gaussian around the predicted side is the prior, and the most probable position is the new side. Boxes in this file
are *inclusive*: xyxy, image pixels, x2 and y2 the last pixel inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.masks import Masks
from onestage.ops.assemble import Size, assemble_masks_torch
from onestage.ops.dispatch import refuse_forced_kernel

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
    is the maximum of the sigmoids.

    Args:
        basis, coefficients, windows, upsample, threshold, valid_size, output_size, align_corners: As in
            `assemble_masks`.

    Returns:
        N masks of `output_size` and their profiles.
    """
    refuse_forced_kernel("edges")
    with torch.autocast(basis.device.type, enabled=False):
        return assemble_with_profiles_torch(
            basis,
            coefficients,
            windows,
            upsample=upsample,
            threshold=threshold,
            valid_size=valid_size,
            output_size=output_size,
            align_corners=align_corners,
        )


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
    refined = boxes.clone()
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
