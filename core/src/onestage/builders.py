"""Building a method's model the way torchvision builds its detectors: weights by path, trunks by enum name or path."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torchvision.models import WeightsEnum

from onestage.config import config_from_dict, require_known
from onestage.engine.checkpoint import load_into, load_weights
from onestage.errors import UsageError, WeightsError
from onestage.method import Method
from onestage.nn.imagenet import load_imagenet
from onestage.nn.resnet import ResNet


def build_model(
    method: Method,
    config: Any,
    *,
    weights: str | Path | None = None,
    weights_backbone: str | Path | WeightsEnum | None = None,
    num_classes: int | None = None,
    trainable_backbone_layers: int | None = None,
    head: Literal["match", "reinit"] = "match",
    progress: bool = True,
    **overrides: Any,
) -> nn.Module:
    """A model of `method` in eval mode. Nothing is downloaded unless `weights_backbone` names a torchvision enum.

    Args:
        method: The paper's package.
        config: Its configuration; with `weights` the stored one counts instead.
        weights: A file of ours; its config rebuilds the model.
        weights_backbone: ImageNet trunk: one of torchvision's weights, by a name such as IMAGENET1K_V1 or as
            `ResNet50_Weights.IMAGENET1K_V1`, or a local file. Not together with `weights`.
        num_classes: K foreground classes.
        trainable_backbone_layers: 0 to 5, counted from the last as torchvision does; 5 trains all.
        head: "reinit" lets weights of other classes in and starts the layers that do not fit anew.
        progress: Show a bar on stderr while downloading.
        overrides: Further fields of the config.

    Raises:
        UsageError: arguments that exclude each other, or one that is unknown.
        WeightsError: weights that do not fit.
    """
    if weights is not None and weights_backbone is not None:
        raise UsageError("weights and weights_backbone are both given", "weights hold the trunk too: drop one")
    names = [*(build_model.__kwdefaults__ or ()), *(entry.name for entry in fields(config))]
    require_known(overrides, names, "unknown argument")
    require_known([head], ("match", "reinit"), "unknown head")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"num_classes is {num_classes}", "give the number of foreground classes, at least 1")
    state = info = None
    if weights is not None:
        state, info = load_weights(weights, package=method.name)
        config = config_from_dict(method.config_type, info.config)
        if num_classes not in (None, config.num_classes) and head == "match":
            raise WeightsError(
                f"weights '{weights}' know {config.num_classes} categories, num_classes is {num_classes}",
                'pass head="reinit" to keep the trunk and start a new head, or leave num_classes away',
            )
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    if trainable_backbone_layers is not None:
        if not 0 <= trainable_backbone_layers <= 5:
            raise UsageError(f"trainable_backbone_layers is {trainable_backbone_layers}", "use 0 to 5")
        overrides["backbone"] = replace(
            overrides.get("backbone", config.backbone), frozen_stages=5 - trainable_backbone_layers
        )
    model = method.build(replace(config, **overrides))
    if state is not None and info is not None:
        load_into(model, state, info, head=head)
    elif weights_backbone is not None:
        trunk = model.backbone
        assert isinstance(trunk, ResNet)
        load_imagenet(trunk, weights_backbone, progress=progress)
    return model.eval()


def named_model(method: Method, name: str, **arguments: Any) -> nn.Module:
    """The model of one named configuration of `method`; arguments as for `build_model`.

    Raises:
        UsageError: unknown name.
    """
    if name not in method.variants:
        raise UsageError(f"no model '{name}'", f"one of {', '.join(method.variants)}")
    return build_model(method, method.variants[name], **arguments)
