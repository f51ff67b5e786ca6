"""Official SipMask checkpoints to ours: images (two layouts), SipMask++ and videos, every tensor accounted for.

`python -m sipmask.convert --from FILE --to FILE` is the command.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from onestage.config import BackboneName
from onestage.engine.official import KeyRules, convert_keys, plain
from onestage.errors import WeightsError, some
from sipmask.config import (
    R50,
    R50_FC,
    R50_RT_6X,
    R50_RT_10X,
    R101_PLUS_6X,
    R101_PLUS_10X,
    VIDEO,
    SipMaskConfig,
)

if TYPE_CHECKING:
    from torch import Tensor

_TRUNK_MM: KeyRules = (
    (r"backbone\.(layer\d\.\d+)\.conv2_offset\.(weight|bias)", r"backbone.\1.conv2.conv_offset.\2"),  # older files
    (r"(backbone\..+)", r"\1"),
    (r"neck\.lateral_convs\.([0-2])\.conv\.(weight|bias)", r"fpn.lateral.\1.\2"),
    (r"neck\.fpn_convs\.([0-2])\.conv\.(weight|bias)", r"fpn.output.\1.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(weight|bias)", r"fpn.extra.0.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(weight|bias)", r"fpn.extra.1.\1"),
)
_TRUNK_FC: KeyRules = (
    *((rf"backbone\.fpn\.fpn_inner{i + 2}\.(weight|bias)", rf"fpn.lateral.{i}.\1") for i in range(3)),
    *((rf"backbone\.fpn\.fpn_layer{i + 2}\.(weight|bias)", rf"fpn.output.{i}.\1") for i in range(3)),
    (r"backbone\.fpn\.top_blocks\.p6\.(weight|bias)", r"fpn.extra.0.\1"),
    (r"backbone\.fpn\.top_blocks\.p7\.(weight|bias)", r"fpn.extra.1.\1"),
    (r"backbone\.body\.stem\.(.+)", r"backbone.\1"),
    (r"backbone\.body\.(layer.+)", r"backbone.\1"),
)
_HEAD_SHARED: KeyRules = (
    (r"feat_align\.conv_offset\.weight", r"alignment.offset.weight"),
    (r"feat_align\.conv_adaption\.(weight|bias)", r"alignment.conv.\1"),
    (r"feat_align\.norm\.(weight|bias)", r"alignment.norm.\1"),
    (r"sip_cof\.(weight|bias)", r"coefficients.\1"),
    (r"sip_mask_lat0\.(weight|bias)", r"basis.reduce.\1"),
    (r"sip_mask_lat\.(weight|bias)", r"basis.out.\1"),
    (r"scales\.([0-4])\.scale", r"scales.\1.scale"),
)
_HEAD_MM: KeyRules = (
    (r"cls_convs\.(\d+)\.conv\.(weight|bias)", r"cls_tower.\1.0.\2"),
    (r"cls_convs\.(\d+)\.gn\.(weight|bias)", r"cls_tower.\1.1.\2"),
    (r"reg_convs\.(\d+)\.conv\.(weight|bias)", r"box_tower.\1.0.\2"),
    (r"reg_convs\.(\d+)\.gn\.(weight|bias)", r"box_tower.\1.1.\2"),
    (r"fcos_cls\.(weight|bias)", r"logits.\1"),
    (r"fcos_reg\.(weight|bias)", r"distances.\1"),
    (r"fcos_centerness\.(weight|bias)", r"centerness.\1"),
    (r"convs_scoring\.(\d)\.conv\.(weight|bias)", r"scoring.convs.\1.\2"),
    (r"mask_scoring\.(weight|bias)", r"scoring.out.\1"),
    (r"track_convs\.(\d+)\.conv\.(weight|bias)", r"tracking.tower.\1.0.\2"),
    (r"track_convs\.(\d+)\.gn\.(weight|bias)", r"tracking.tower.\1.1.\2"),
    (r"(?:sipmask|fovea)_track\.(weight|bias)", r"tracking.mix.\1"),  # the first released file has the latter
    *_HEAD_SHARED,
)
_HEAD_FC: KeyRules = (
    *(
        (rf"{theirs}_tower\.{3 * i + norm}\.(weight|bias)", rf"{ours}_tower.{i}.{norm}.\1")
        for theirs, ours in (("cls", "cls"), ("bbox", "box"))
        for i in range(4)
        for norm in (0, 1)
    ),
    (r"cls_logits\.(weight|bias)", r"logits.\1"),
    (r"bbox_pred\.(weight|bias)", r"distances.\1"),
    (r"centerness\.(weight|bias)", r"centerness.\1"),
    *_HEAD_SHARED,
)


def convert_state_dict(state: dict[str, Tensor], config: SipMaskConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one.

    Args:
        state: The checkpoint's tensors by name, with or without `module.` in front.
        config: The configuration the tensors are for (`config_of`).

    Returns:
        The state dict of `SipMask(config)` and one note per group of tensors left out on purpose.

    Raises:
        WeightsError: a tensor is left over, missing or of another shape.
    """
    import torch

    from sipmask.model import SipMask

    with torch.device("meta"):
        wanted = SipMask(config).state_dict()
    return _convert(plain(state), model_keys(config), wanted, config)


def convert_head(state: dict[str, Tensor], config: SipMaskConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The same for the head alone: official keys without prefix to those of `SipMaskHead(config)`."""
    import torch

    from sipmask.model import SipMaskHead

    with torch.device("meta"):
        wanted = SipMaskHead(config).state_dict()
    return _convert(state, head_keys(config), wanted, config)


def head_keys(config: SipMaskConfig) -> KeyRules:
    """Patterns from official head keys, without prefix, to ours."""
    return _HEAD_FC if config.profile == "fc" else _HEAD_MM


def model_keys(config: SipMaskConfig) -> KeyRules:
    """Patterns from official keys of a whole model to ours."""
    trunk, prefix = (_TRUNK_FC, "rpn.head") if config.profile == "fc" else (_TRUNK_MM, "bbox_head")
    head = tuple((rf"{re.escape(prefix)}\.{theirs}", f"head.{ours}") for theirs, ours in head_keys(config))
    return (*trunk, *head)


def config_of(state: dict[str, Tensor]) -> SipMaskConfig:
    """The configuration that fits an official checkpoint: code base, norm, depths, trunk, classes, what it is for.

    Raises:
        WeightsError: neither layout.
    """
    state = plain(state)
    if "rpn.head.cls_logits.weight" in state:
        config = replace(R50_FC, num_classes=len(state["rpn.head.cls_logits.weight"]))
        prefix = "backbone.body.layer3."
    elif "bbox_head.fcos_cls.weight" in state:
        config = replace(_mm_config(state), num_classes=len(state["bbox_head.fcos_cls.weight"]))
        prefix = "backbone.layer3."
    else:
        raise WeightsError(
            f"not a SipMask checkpoint: its first keys are {some(sorted(state), 3)}",
            "pass a file of the authors' models (keys bbox_head.fcos_cls.weight or rpn.head.cls_logits.weight)",
        )
    blocks = 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))
    name: BackboneName = "resnet101" if blocks == 23 else "resnet50"
    if any("offset" in key for key in state if key.startswith("backbone.")):
        return replace(config, backbone=replace(R101_PLUS_6X.backbone, name=name))
    return replace(config, backbone=replace(config.backbone, name=name))


def _mm_config(state: dict[str, Tensor]) -> SipMaskConfig:
    depth, track_depth = (_depth(state, tower) for tower in ("reg_convs", "track_convs"))
    if track_depth > 0:  # one released file has deeper towers than its code
        return replace(VIDEO, tower_depth=depth, track_depth=track_depth)
    if "bbox_head.mask_scoring.weight" in state:
        config = R101_PLUS_10X if "bbox_head.reg_convs.0.gn.weight" in state else R101_PLUS_6X
        return replace(config, tower_depth=depth, backbone=R50.backbone)
    if "bbox_head.reg_convs.0.gn.weight" not in state:
        return replace(R50_RT_6X, tower_depth=depth)
    return replace(R50_RT_10X if depth == 2 else R50, tower_depth=depth)


def _depth(state: dict[str, Tensor], tower: str) -> int:
    return len([key for key in state if re.fullmatch(rf"bbox_head\.{tower}\.\d+\.conv\.weight", key)])


def _convert(
    state: dict[str, Tensor], rules: KeyRules, wanted: dict[str, Tensor], config: SipMaskConfig
) -> tuple[dict[str, Tensor], list[str]]:
    # The released real-time files hold a GN behind the alignment that nothing reads.
    return convert_keys(state, rules, wanted, lambda key: config.norm == "none" and "feat_align.norm." in key)


if __name__ == "__main__":
    from sipmask.__main__ import run_verb

    run_verb("convert")
