"""Builders in torchvision's manner: `meinst_resnet50_fpn(weights="best.safetensors")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meinst.codec import Encoding, MaskCodec
from meinst.config import R101_TRUNK, VARIANTS
from meinst.method import METHOD
from meinst.model import MEInst
from onestage.builders import named_model
from onestage.errors import UsageError


def meinst_resnet50_fpn(
    *,
    weights: str | Path | None = None,
    encoding: str | Path | None = None,
    weights_backbone: str | Path | None = None,
    num_classes: int | None = None,
    trainable_backbone_layers: int | None = None,
    **overrides: Any,
) -> MEInst:
    """MEInst on ResNet-50 without deformable convs (800 x 1333), in eval mode.

    Args:
        weights: A file that `train` or `convert` wrote; holds its encoding.
        encoding: What `fit_encoding` wrote, or an official .npz, for a model that will be trained.
        weights_backbone: ImageNet trunk by torchvision's enum name (downloads) or by local path.
        num_classes: K foreground classes; labels are 0..K-1.
        trainable_backbone_layers: 0 to 5, counted from the last.
        overrides: Any field of `MEInstConfig`.
    """
    return get_model(
        "r50",
        weights=weights,
        encoding=encoding,
        weights_backbone=weights_backbone,
        num_classes=num_classes,
        trainable_backbone_layers=trainable_backbone_layers,
        **overrides,
    )


def meinst_resnet101_fpn(**arguments: Any) -> MEInst:
    """MEInst on ResNet-101; arguments as `meinst_resnet50_fpn`."""
    return meinst_resnet50_fpn(**({"backbone": R101_TRUNK} | arguments))


def list_models() -> list[str]:
    """Names that `get_model` takes: the configurations of the paper and of the released code."""
    return list(VARIANTS)


def get_model(name: str, *, encoding: str | Path | None = None, **arguments: Any) -> MEInst:
    """The model of one named configuration; arguments as `meinst_resnet50_fpn`.

    Raises:
        UsageError: unknown name, or an encoding for a model that has none.
        WeightsError: weights or an encoding that do not fit.
    """
    model = named_model(METHOD, name, **arguments)
    assert isinstance(model, MEInst)
    if encoding is not None:
        if not isinstance(model.codec, MaskCodec):
            raise UsageError(f"encoding '{encoding}' for a model without an encoding", "leave encoding away")
        model.codec.load(Encoding.read(encoding))
    return model
