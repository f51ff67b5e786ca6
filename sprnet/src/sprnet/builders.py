"""Builders in torchvision's manner: `sprnet_resnet50_fpn(weights="best.safetensors")`."""

from __future__ import annotations

from typing import Any, cast

from onestage.builders import named_model
from sprnet.config import VARIANTS
from sprnet.method import METHOD
from sprnet.model import SPRNet


def sprnet_resnet50_fpn(**arguments: Any) -> SPRNet:
    """SPRNet with the gated pyramid on ResNet-50 at 800 px, in eval mode; arguments as `get_model`."""
    return get_model("r50_800", **arguments)


def sprnet_resnet101_fpn(**arguments: Any) -> SPRNet:
    """SPRNet with the gated pyramid on ResNet-101 at 800 px; arguments as `get_model`."""
    return get_model("r101_800", **arguments)


def list_models() -> list[str]:
    """Names that `get_model` takes: the rows of the paper's tables and two small configurations."""
    return list(VARIANTS)


def get_model(name: str, **arguments: Any) -> SPRNet:
    """The model of one named configuration, in eval mode.

    Args:
        name: One of `list_models()`.
        arguments: `weights` (a file that `train` wrote), `weights_backbone` (torchvision's enum name, downloads, or
            a local path), `num_classes`, `trainable_backbone_layers` (0 to 5, counted from the last), and any field
            of `SPRNetConfig`.

    Raises:
        UsageError: unknown name.
    """
    return cast(SPRNet, named_model(METHOD, name, **arguments))
