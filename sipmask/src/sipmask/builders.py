"""Builders in torchvision's manner: `sipmask_resnet50_fpn(weights="best.safetensors")`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from onestage.builders import named_model
from sipmask.config import R50, R101, VARIANTS
from sipmask.method import METHOD
from sipmask.model import SipMask


def sipmask_resnet50_fpn(
    *,
    weights: str | Path | None = None,
    weights_backbone: str | Path | None = None,
    num_classes: int | None = None,
    trainable_backbone_layers: int | None = None,
    **overrides: Any,
) -> SipMask:
    """SipMask on ResNet-50, high accuracy (800 x 1333), in eval mode.

    Args:
        weights: A file that `train` or `convert` wrote.
        weights_backbone: ImageNet trunk by torchvision's enum name (downloads) or by local path.
        num_classes: K foreground classes; labels are 0..K-1.
        trainable_backbone_layers: 0 to 5, counted from the last.
        overrides: Any field of `SipMaskConfig`.
    """
    return get_model(
        "r50",
        weights=weights,
        weights_backbone=weights_backbone,
        num_classes=num_classes,
        trainable_backbone_layers=trainable_backbone_layers,
        **overrides,
    )


def sipmask_resnet101_fpn(**arguments: Any) -> SipMask:
    """SipMask on ResNet-101; arguments as `sipmask_resnet50_fpn`."""
    return sipmask_resnet50_fpn(**({"backbone": replace(R50.backbone, name=R101.name)} | arguments))


def list_models() -> list[str]:
    """Names that `get_model` takes: the configurations of the paper and of the released code."""
    return list(VARIANTS)


def get_model(name: str, **arguments: Any) -> SipMask:
    """The model of one named configuration; arguments as `sipmask_resnet50_fpn`.

    Raises:
        UsageError: unknown name.
    """
    model = named_model(METHOD, name, **arguments)
    assert isinstance(model, SipMask)
    return model
