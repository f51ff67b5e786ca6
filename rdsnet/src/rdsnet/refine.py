"""MBRM, the mask-based boundary refinement module (Sec. 3.3): ten numbers, and the stage that trains them.

The arithmetic is `onestage.ops.edges`; boxes are inclusive. The detector is trained first and stays as it is: MBRM
learns from the profiles of its masks, which are collected once and are small. The authors released neither this stage
nor its loss; what is not in the paper is said in docs/methods/rdsnet.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onestage import boxes as box_ops
from onestage.data.loader import make_loader
from onestage.errors import UsageError
from onestage.nn import retinanet
from onestage.ops.assemble import crop_window
from onestage.ops.edges import Profiles, refine_boxes, side_posteriors
from onestage.structures import Detections
from onestage.transforms import prepare_batch
from rdsnet.config import RDSNetConfig, RefineConfig
from rdsnet.decode import complete, correlate, input_profiles, public_boxes, select
from rdsnet.targets import assign_targets, mask_instances

if TYPE_CHECKING:
    from rdsnet.model import RDSNet

# As released, for s = 4: a left side wants dark one pixel before it and bright one pixel behind.
RELEASED_WEIGHT = (-0.2968, -0.2892, -0.2635, -3.2545, -0.1874, 2.5041, 0.0196, 0.0651, 0.0917)
RELEASED_BIAS = -1.9536

INITIAL_STD = 0.01


class MBRM(nn.Module):
    """One kernel of 2 s + 1 taps and a bias for all four sides of all boxes.

    Its parameters take no part in the training of the detector and so have no gradient.

    Args:
        config: Kernel size and width of the prior.
    """

    def __init__(self, config: RefineConfig):
        super().__init__()
        self.gamma = config.gamma
        self.weight = nn.Parameter(torch.empty(1, 1, 2 * config.reach + 1), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, profiles: Profiles, boxes: Tensor) -> Tensor:
        """Refined boxes [N, 4] inclusive xyxy, pixels of the profiles' image."""
        return refine_boxes(profiles, boxes, self.weight.flatten(), self.bias, self.gamma)


@dataclass(frozen=True)
class Samples:
    """What the sides of one image's instances are learned from.

    Args:
        profiles: Of N masks, input pixels.
        boxes: [N, 4] inclusive xyxy as regressed, input pixels.
        truth: [N, 4] inclusive xyxy of the ground truth.
    """

    profiles: Profiles
    boxes: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """Samples of images of one size as one."""
        profiles = Profiles(
            torch.cat([part.profiles.columns for part in parts]), torch.cat([part.profiles.rows for part in parts])
        )
        return Samples(profiles, torch.cat([part.boxes for part in parts]), torch.cat([part.truth for part in parts]))


@dataclass(frozen=True)
class FitOptions:
    """How MBRM is trained: the released detector's optimiser, 1000 steps as in the paper."""

    steps: int = 1000
    lr: float = 0.005  # constant
    momentum: float = 0.9
    batch_size: int = 8  # images
    images: int = 300  # training images whose profiles are collected; tens of thousands of sides for 2 s + 2 numbers
    seed: int = 0


def train_refinement(model: RDSNet, train_set: Any, options: FitOptions | None = None) -> RDSNetConfig:
    """Trains MBRM of a trained detector in place; returns the model's new config.

    Raises:
        UsageError: as `fit`.
    """
    options = options or FitOptions()
    samples = list(collect(model, train_set, options))
    weight, bias = fit(samples, model.config.refine, options)
    install(model, model.config.refine, weight, bias)
    return model.config


def install(model: RDSNet, config: RefineConfig, weight: Tensor, bias: Tensor) -> None:
    """Puts a trained kernel [2 s + 1] and bias [1] into a model, whose boxes are refined from now on."""
    mbrm = MBRM(config)
    mbrm.weight.copy_(weight.view(1, 1, -1))
    mbrm.bias.copy_(bias)
    model.mbrm = mbrm.to(model.mbrm.bias.device)
    inference = replace(model.config.inference, refine="mbrm")
    model.config = replace(model.config, refine=config, inference=inference)


@torch.no_grad()
def collect(model: RDSNet, train_set: Any, options: FitOptions) -> Iterator[Samples]:
    """Profiles of the positives that train masks, image by image, on the CPU; the detector predicts, augmented.

    Masks are cropped as at inference, around the predicted boxes, and at input resolution.
    """
    was_training = model.training
    model.eval()
    device = model.mbrm.bias.device
    loader = make_loader(train_set, model.config.input, batch_size=options.batch_size, training=True, seed=options.seed)
    torch.manual_seed(options.seed)
    left = options.images
    while left > 0:
        for images, targets in loader:
            moved = [target.to(device) for target in targets]
            for sample in _of_batch(model, [image.to(device) for image in images], moved)[:left]:
                if len(sample):
                    yield sample
            left -= len(images)
            if left <= 0:
                break
        if len(train_set) < options.images:  # each image once is enough
            break
    model.train(was_training)


def _of_batch(model: RDSNet, images: list[Tensor], targets: list[Any]) -> list[Samples]:
    batch = model.training_batch(images, targets)
    raw = model.raw_outputs(batch.pixels)
    assert batch.targets is not None
    assert raw.pixel_vectors is not None
    assigned = assign_targets(batch.targets, batch.frames, raw, model.config)
    samples = []
    for i, frame in enumerate(batch.frames):
        index = mask_instances(assigned, i, model.config)
        correlation = correlate(raw.pixel_vectors[i], model.vectors_at(raw, i, index), frame, model.config)
        boxes = retinanet.decode(raw.anchors[index], raw.deltas[i, index].float(), legacy=True)
        boxes = box_ops.clip(boxes, frame.input_size, legacy=True)
        profiles = input_profiles(correlation, boxes, model.config)
        truth = assigned.boxes[i][assigned.anchors.index[i, index]]
        samples.append(Samples(Profiles(profiles.columns.cpu(), profiles.rows.cpu()), boxes.cpu(), truth.cpu()))
    return samples


def fit(samples: Sequence[Samples], config: RefineConfig, options: FitOptions) -> tuple[Tensor, Tensor]:
    """A kernel [2 s + 1] and a bias [1] from collected profiles.

    Args:
        samples: One per image.
        config: s and gamma; with gamma 0 nothing can be learned and the initial numbers come back.
        options: Steps, learning rate, batch, seed.

    Raises:
        UsageError: no samples to learn from.
    """
    if not samples and config.gamma > 0:
        raise UsageError(
            "MBRM has nothing to learn from: no instance of the training images is large enough to train masks",
            "use images with larger instances; gamma 0 leaves boxes as they are and needs none",
        )
    generator = torch.Generator().manual_seed(options.seed)
    weight = (INITIAL_STD * torch.randn(2 * config.reach + 1, generator=generator)).requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD((weight, bias), lr=options.lr, momentum=options.momentum)
    for _ in range(options.steps if config.gamma > 0 else 0):
        chosen = torch.randint(len(samples), (min(options.batch_size, len(samples)),), generator=generator).tolist()
        loss = coordinate_loss([samples[i] for i in chosen], weight, bias, config.gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def coordinate_loss(samples: Sequence[Samples], weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """-ln of the probability of the true position, a mean over the sides whose prior reaches it.

    Args:
        samples: One per image, sizes may differ.
        weight: [2 s + 1].
        bias: [1].
        gamma: Of the prior.

    Returns:
        []; 0 and connected to the kernel if no prior reaches its truth.
    """
    by_size: dict[tuple[int, int], list[Samples]] = {}
    for sample in samples:
        size = (sample.profiles.rows.shape[1], sample.profiles.columns.shape[1])
        by_size.setdefault(size, []).append(sample)
    probabilities = torch.cat([_of_truth(Samples.cat(group), weight, bias, gamma) for group in by_size.values()])
    reached = probabilities > 0
    logs = torch.where(reached, probabilities, 1.0).log()
    return -logs.sum() / reached.sum().clamp(min=1)


def _of_truth(samples: Samples, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """[N, 4] probability of the true left, top, right, bottom position."""
    sides: dict[int, Tensor] = {}
    for axis, profile in enumerate((samples.profiles.columns, samples.profiles.rows)):
        both = side_posteriors(profile, samples.boxes[:, axis], samples.boxes[:, axis + 2], weight, bias, gamma)
        for side, posterior in zip((axis, axis + 2), both, strict=True):
            position = samples.truth[:, side].round().long().clamp(0, profile.shape[1] - 1)
            sides[side] = posterior.gather(1, position[:, None])[:, 0]
    return torch.stack([sides[side] for side in range(4)], 1)


@dataclass(frozen=True)
class Observed:
    """One image's detections and what their boxes can be refined from.

    Args:
        found: As regressed, with masks.
        boxes: [N, 4] the same boxes, inclusive, not clipped.
        profiles: Of the masks, image pixels.
    """

    found: Detections
    boxes: Tensor
    profiles: Profiles

    def refined(self, boxes: Tensor) -> Detections:
        """The detections with boxes [N, 4] inclusive xyxy in the place of theirs."""
        public = public_boxes(boxes, self.found.image_size)
        return replace(self.found, boxes=public, unrefined_boxes=self.found.boxes)


@torch.no_grad()
def observe(model: RDSNet, images: list[Tensor]) -> list[Observed]:
    """Detections of images with the profiles of their masks: every way of refining boxes can be tried on them.

    Args:
        model: In eval mode.
        images: [3, H, W] each, as the model takes them.
    """
    config = replace(model.config, inference=replace(model.config.inference, refine="none"))
    batch = prepare_batch(images, None, config.input, training=False)
    raw = model.raw_outputs(batch.pixels)
    assert raw.pixel_vectors is not None
    observed = []
    for i, frame in enumerate(batch.frames):
        kept, boxes = select(raw, i, frame, config)
        correlation = correlate(raw.pixel_vectors[i], model.vectors_at(raw, i, kept.index), frame, config)
        found = complete(kept, boxes, None, frame, None, config, "none")
        windows = crop_window(boxes, frame.image_size, "expand", padding=config.inference.crop_padding)
        masks, profiles = correlation.masks_with_profiles(windows, frame.image_size, config.inference.mask_threshold)
        observed.append(Observed(replace(found, masks=masks), boxes, profiles))
    return observed
