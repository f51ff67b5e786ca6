"""Builders in torchvision's manner: `rdsnet_resnet50_fpn(weights="best.safetensors")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from onestage.builders import named_model
from rdsnet.config import VARIANTS
from rdsnet.method import METHOD

if TYPE_CHECKING:
    from rdsnet.model import RDSNet
    from rdsnet.small import RDSNetSmall


def rdsnet_resnet50_fpn(**arguments: Any) -> RDSNet:
    """RDSNet on ResNet-50 at 800 x 1333, in eval mode; arguments as `get_model`."""
    return cast("RDSNet", get_model("r50", **arguments))


def rdsnet_resnet101_fpn(**arguments: Any) -> RDSNet:
    """RDSNet on ResNet-101 at 800 x 1333, in eval mode; arguments as `get_model`."""
    return cast("RDSNet", get_model("r101", **arguments))


def rdsnet_s_resnet101_fpn(**arguments: Any) -> RDSNetSmall:
    """RDSNet_s, the real-time model at 550 x 550, in eval mode; arguments as `get_model`."""
    return cast("RDSNetSmall", get_model("s", **arguments))


def yolact_resnet101_fpn(**arguments: Any) -> RDSNetSmall:
    """YOLACT at 550 x 550, RDSNet_s' baseline, in eval mode; arguments as `get_model`."""
    return cast("RDSNetSmall", get_model("yolact", **arguments))


def list_models() -> list[str]:
    """Names that `get_model` takes: rows of the paper's tables, and small configurations."""
    return list(VARIANTS)


def get_model(name: str, **arguments: Any) -> RDSNet | RDSNetSmall:
    """The model of one named configuration, in eval mode.

    Args:
        name: One of `list_models()`.
        arguments: `weights` (a file that `train`, `train_mbrm` or `convert` wrote), `weights_backbone` (torchvision's
            enum name, downloads, or a local path), `num_classes`, `trainable_backbone_layers` (0 to 5, counted from
            the last), and any field of `RDSNetConfig`.

    Raises:
        UsageError: unknown name.
    """
    return cast("RDSNet | RDSNetSmall", named_model(METHOD, name, **arguments))
