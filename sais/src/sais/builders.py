"""Builders in torchvision's manner: `sais_resnet50_fpn(weights="best.safetensors")`."""

from __future__ import annotations

from typing import Any, cast

from onestage.builders import named_model
from sais.config import VARIANTS
from sais.method import METHOD
from sais.model import SAIS


def sais_resnet50_fpn(**arguments: Any) -> SAIS:
    """SAIS-768 on ResNet-50, in eval mode; arguments as `get_model`."""
    return get_model("r50_768", **arguments)


def sais_resnet101_fpn(**arguments: Any) -> SAIS:
    """SAIS-768 on ResNet-101; arguments as `get_model`."""
    return get_model("r101_768", **arguments)


def sais_resnext101_64x4d_fpn(**arguments: Any) -> SAIS:
    """SAIS-768 on ResNeXt-101 64x4d; arguments as `get_model`."""
    return get_model("x101_768", **arguments)


def list_models() -> list[str]:
    """Names that `get_model` takes: the rows of the paper's tables and two small configurations."""
    return list(VARIANTS)


def get_model(name: str, **arguments: Any) -> SAIS:
    """The model of one named configuration, in eval mode.

    Args:
        name: One of `list_models()`.
        arguments: `weights` (a file that `train` wrote), `weights_backbone` (torchvision's enum name, downloads, or
            a local path), `num_classes`, `trainable_backbone_layers` (0 to 5, counted from the last), and any field
            of `SAISConfig`.

    Raises:
        UsageError: unknown name.
    """
    return cast(SAIS, named_model(METHOD, name, **arguments))
