"""Configuration that every method shares: frozen dataclasses, no torch at import.

A method's own config nests these: `backbone`, `input`, `schedule`. Variants are made with
`dataclasses.replace`; a run stores `asdict(config)` and weights carry it; `config_from_dict` reads it back.
"""

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from onestage.errors import UsageError

Config = TypeVar("Config")

Precision = Literal["fp32", "bf16", "fp16"]  # what the network computes in; losses and masks are fp32 always
BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # torchvision's, RGB, 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)
CAFFE_MEAN = (102.9801, 115.9465, 122.7717)  # MSRA/caffe weights, BGR, 0..255; their std is 1


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which trunk, and what of it learns."""

    name: BackboneName = "resnet50"
    stride_in_1x1: bool = False  # True: caffe/MSRA weights; False: torchvision's, stride in the 3x3
    norm: Literal["frozen", "frozen_stats", "train"] = "frozen"  # BN: nothing / affine only / everything learns
    frozen_stages: int = 2  # how many of (stem, layer1, .., layer4) get no gradient; 0 = none
    deformable_stages: tuple[int, ...] = ()  # layers whose 3x3 convs are deformable, from {1, 2, 3, 4}
    deformable_interval: int = 1  # every n-th block of such a layer, starting with block 0
    modulated: bool = False  # True: DCNv2's modulation mask


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """From an image file's pixels to the network's input. Sizes in pixels."""

    resize: Literal["keep_ratio", "fixed"] = "keep_ratio"
    test_size: tuple[int, int] = (800, 1333)  # keep_ratio: (short side, longest long side); fixed: (height, width)
    train_sizes: tuple[tuple[int, int], ...] = ((800, 1333),)  # one is drawn per image
    train_draw: Literal["choice", "range"] = "choice"  # range: each number uniform between the first and last entry
    frame_scale: Literal["rule", "sizes"] = "rule"  # boxes move by the resize rule's factor, or by new size / old size
    antialias: bool = False  # False: OpenCV's and mmcv's bilinear; True: Pillow's
    pad_multiple: int = 32  # right and bottom, zeros after normalisation
    channel_order: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # in channel order, 0..255
    std: tuple[float, float, float] = IMAGENET_STD
    # Training only. ssd: photometric, expand, IoU crop, flip; yolact: the same, its crop held to no IoU.
    augmentation: Literal["none", "flip", "ssd", "yolact"] = "flip"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Optimiser and learning-rate schedule. One step = one optimiser update over `batch_size` images."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw
    eps: float = 1e-8  # adam, adamw
    weight_decay: float = 1e-4
    batch_size: int = 16  # images per step over all processes and accumulation
    length: int = 12
    unit: Literal["epochs", "steps"] = "epochs"  # of length and milestones
    policy: Literal["step", "onecycle", "cosine", "constant", "plateau"] = "step"
    milestones: tuple[int, ...] = (8, 11)  # lr x gamma after each
    gamma: float = 0.1
    warmup: Literal["none", "constant", "linear"] = "none"
    warmup_steps: int = 500
    warmup_factor: float = 1 / 3  # lr factor at step 0 (constant: until warmup_steps)
    bias_lr_factor: float = 1.0  # biases of non-norm layers
    bias_decay: bool = True  # False: no weight decay on biases of non-norm layers
    norm_decay: bool = True  # False: no weight decay on norm weights and biases
    bias_rule_also: tuple[str, ...] = ()  # norm parameters by full name that follow the bias rule all the same
    clip_norm: float | None = None  # global L2 norm of all gradients
    ema: float | None = None  # decay of the exponential moving average of weights
    min_size: int = 0  # training drops images with a shorter side below this, px
    drop_empty: bool = False  # training drops images without annotations


def resized(config: InputConfig, size: int) -> InputConfig:
    """The input with its shorter side at `size` px, in tests and training; the longer side keeps its proportion.

    Raises:
        UsageError: below 32 px.
    """
    if size < 32:
        raise UsageError(
            f"--size is {size}; at least 32 is needed", "give the shorter side in pixels, as in --size 256"
        )
    short, long = config.test_size
    pair = (size, round(long * size / short))
    return replace(config, test_size=pair, train_sizes=(pair,), train_draw="choice")


def of_length(schedule: ScheduleConfig, length: int, unit: Literal["epochs", "steps"]) -> ScheduleConfig:
    """The schedule at another length; milestones move along.

    Raises:
        UsageError: less than one step or epoch.
    """
    if length < 1:
        raise UsageError(f"the length of training is {length}", "train for at least one step or epoch")
    milestones = tuple(round(m * length / schedule.length) for m in schedule.milestones)
    return replace(schedule, length=length, unit=unit, milestones=milestones)


def rescaled(schedule: ScheduleConfig, batch_size: int) -> ScheduleConfig:
    """The same recipe at another total batch.

    SGD's learning rate scales linearly, Adam's with the square root; lengths in steps keep the number of images seen.
    """
    ratio = batch_size / schedule.batch_size

    def steps(number: int) -> int:
        return max(1, round(number / ratio))

    in_steps = schedule.unit == "steps"
    return replace(
        schedule,
        batch_size=batch_size,
        lr=schedule.lr * (ratio if schedule.optimizer == "sgd" else math.sqrt(ratio)),
        length=steps(schedule.length) if in_steps else schedule.length,
        milestones=tuple(map(steps, schedule.milestones)) if in_steps else schedule.milestones,
        warmup_steps=steps(schedule.warmup_steps),
    )


def for_trunk(config: Config, weights_backbone: str | None) -> Config:
    """A method's config as its trunk's start needs it.

    A trunk of random numbers learns whole. One that starts from torchvision's weights, which are named and not a file,
    wants torchvision's stride and colours.

    Args:
        config: Has `backbone` and `input`.
        weights_backbone: As `--weights-backbone`; None starts from random numbers.
    """
    values: Any = config
    if weights_backbone is None:
        return replace(values, backbone=replace(values.backbone, norm="train", frozen_stages=0))
    if Path(weights_backbone).is_file():
        return config
    colours = replace(values.input, channel_order="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return replace(values, backbone=replace(values.backbone, stride_in_1x1=False), input=colours)


def with_field(config: Any, dotted: str, value: Any) -> Any:
    """`config` with one field, named as in `inference.max_detections`, replaced."""
    name, _, rest = dotted.partition(".")
    return replace(config, **{name: with_field(getattr(config, name), rest, value) if rest else value})


def config_from_dict(config_type: type[Config], values: Mapping[str, Any], where: str = "config") -> Config:
    """A frozen config from `asdict` of one, or from its JSON, where tuples have become lists.

    Args:
        config_type: The dataclass to build; nested dataclasses are built the same way.
        values: Field names to values. A field that is absent keeps its default.
        where: What the values are called in an error: a file, or a key in it.

    Raises:
        UsageError: an unknown key, or a value that does not fit its field.
    """
    hints = get_type_hints(config_type)
    names = [f.name for f in fields(config_type)]  # type: ignore[arg-type]
    require_known(values, names, f"{where}: unknown key")
    return config_type(**{key: _fit(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def require_known(given: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raises UsageError unless every given name is one of `names`; `what` stands before the one that is not."""
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise UsageError(
                f"{what} {name!r}" + (f"; nearest: {near[0]!r}" if near else ""), f"use one of: {', '.join(names)}"
            )


def _fit(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return config_from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_fit(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            return tuple(_fit(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _fit(inner, value, where)
    if origin is Literal and value in arguments:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    expected = " | ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise UsageError(f"{where} is {value!r}; expected {expected}", "correct the value or leave the key out")
