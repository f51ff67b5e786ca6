"""Official MEInst checkpoints to ours: every tensor accounted for.

`python -m meinst.convert --from FILE --to FILE` is the command.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from meinst.config import R50, X101, MEInstConfig
from onestage.engine.official import KeyRules, convert_keys, plain
from onestage.errors import WeightsError, some

if TYPE_CHECKING:
    from torch import Tensor

_HEAD = "proposal_generator.MEInst_head."
_COMPONENTS = "proposal_generator.mask_encoding.components"
_WIDTH = "backbone.bottom_up.res2.0.conv2.weight"
_TRUNK: KeyRules = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", r"backbone.conv1.weight"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(\w+)", r"backbone.bn1.\1"),
    *(
        (rf"backbone\.bottom_up\.res{layer + 1}\.(\d+)\.{theirs}", rf"backbone.layer{layer}.\1.{ours}")
        for layer in range(1, 5)
        for theirs, ours in (
            (r"conv([123])\.weight", r"conv\2.weight"),
            (r"conv([123])\.norm\.(\w+)", r"bn\2.\3"),
            (r"shortcut\.weight", r"downsample.0.weight"),
            (r"shortcut\.norm\.(\w+)", r"downsample.1.\2"),
        )
    ),
    *((rf"backbone\.fpn_lateral{i + 3}\.(weight|bias)", rf"fpn.lateral.{i}.\1") for i in range(3)),
    *((rf"backbone\.fpn_output{i + 3}\.(weight|bias)", rf"fpn.output.{i}.\1") for i in range(3)),
    (r"backbone\.top_block\.p6\.(weight|bias)", r"fpn.extra.0.\1"),
    (r"backbone\.top_block\.p7\.(weight|bias)", r"fpn.extra.1.\1"),
    (r"proposal_generator\.mask_encoding\.components", r"codec.components"),
    (r"proposal_generator\.mask_encoding\.explained_variances", r"codec.variance"),
    (r"proposal_generator\.mask_encoding\.means", r"codec.mean"),
)
_LAYERS: KeyRules = (
    (r"cls_logits\.(weight|bias)", r"logits.\1"),
    (r"bbox_pred\.(weight|bias)", r"distances.\1"),
    (r"ctrness\.(weight|bias)", r"centerness.\1"),
    (r"mask_pred\.(weight|bias)", r"codes.\1"),
    *(
        (rf"mask_pred\.conv_{theirs}{i + 1}\.conv\.(weight|bias)", rf"codes.{ours}.{i}.\1")
        for theirs, ours in (("l", "left"), ("r", "right"))
        for i in range(2)
    ),
    (r"scales\.([0-4])\.scale", r"scales.\1.scale"),
)
_TOWERS = (("share", "shared"), ("cls", "cls"), ("bbox", "box"), ("mask", "mask"))


def convert_state_dict(state: dict[str, Tensor], config: MEInstConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one.

    Args:
        state: The checkpoint's tensors by name, with or without `module.` in front.
        config: The configuration the tensors are for (`config_of`).

    Returns:
        The state dict of `MEInst(config)` and one note per group of tensors left out on purpose.

    Raises:
        WeightsError: a tensor is left over, missing or of another shape.
    """
    import torch

    from meinst.model import MEInst

    with torch.device("meta"):
        wanted = MEInst(config).state_dict()
    return convert_keys(plain(state), model_keys(config), wanted, lambda key: key in ("pixel_mean", "pixel_std"))


def convert_head(state: dict[str, Tensor], config: MEInstConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The same for the head alone: official keys without prefix to those of `MEInstHead(config)`."""
    import torch

    from meinst.model import MEInstHead

    with torch.device("meta"):
        wanted = MEInstHead(config).state_dict()
    return convert_keys(state, head_keys(config), wanted)


def model_keys(config: MEInstConfig) -> KeyRules:
    """Patterns from official keys of a whole model to ours."""
    return (*_TRUNK, *((re.escape(_HEAD) + theirs, f"head.{ours}") for theirs, ours in head_keys(config)))


def head_keys(config: MEInstConfig) -> KeyRules:
    """Patterns from official head keys, without prefix, to ours."""
    unit = 3 if config.norm == "gn" else 2  # conv, norm, ReLU
    towers = tuple(
        (rf"{theirs}_tower\.{unit * i + part}\.{leaf}", rf"{ours}_tower.{i}.{part}.{our_leaf}")
        for theirs, ours in _TOWERS
        for i in range(max(config.tower_depth, config.shared_depth))
        for part in (0, 1)
        for leaf, our_leaf in (
            (r"(weight|bias)", r"\1"),
            (r"conv\.(weight|bias)", r"\1"),  # of a deformable layer
            (r"offset\.(weight|bias)", r"conv_offset.\1"),
        )
    )
    return (*towers, *_LAYERS)


def config_of(state: dict[str, Tensor]) -> MEInstConfig:
    """The configuration that fits an official checkpoint: trunk, towers, prediction layer, code, classes.

    Raises:
        WeightsError: not MEInst's layout.
    """
    state = plain(state)
    missing = [key for key in (f"{_HEAD}cls_logits.weight", _COMPONENTS, _WIDTH) if key not in state]
    if missing:
        raise WeightsError(
            f"not an MEInst checkpoint: no {missing[0]}; its first keys are {some(sorted(state), 3)}",
            "pass a whole file of the authors' models, encoding included",
        )
    components = state[_COMPONENTS]
    head = {key.removeprefix(_HEAD): value for key, value in state.items() if key.startswith(_HEAD)}
    trunk = X101 if state[_WIDTH].shape[1] == 8 else R50
    config = replace(with_head(trunk, head), mask_size=round(components.shape[1] ** 0.5))
    blocks = [int(m[1]) for m in (re.match(r"backbone\.bottom_up\.res4\.(\d+)\.", key) for key in state) if m]
    if max(blocks, default=0) == 22 and config.backbone.name == "resnet50":
        config = replace(config, backbone=replace(config.backbone, name="resnet101"))
    return config


def with_head(config: MEInstConfig, head: dict[str, Tensor]) -> MEInstConfig:
    """`config` with the head that official tensors, without prefix, belong to."""
    norm = any(re.fullmatch(r"cls_tower\.\d+\.weight", key) and value.ndim == 1 for key, value in head.items())
    unit = 3 if norm else 2

    def convs(pattern: str) -> set[int]:
        return {int(m[1]) // unit for m in (re.fullmatch(pattern, key) for key in head if head[key].ndim == 4) if m}

    depth = len(convs(r"cls_tower\.(\d+)\.(?:conv\.)?weight"))
    offsets = convs(r"cls_tower\.(\d+)\.offset\.weight")
    offset_channels = {len(value) for key, value in head.items() if key.endswith("offset.bias")}
    large = head.get("mask_pred.conv_l1.conv.weight")
    return replace(
        config,
        num_classes=len(head["cls_logits.weight"]),
        width=head["cls_logits.weight"].shape[1],
        tower_depth=depth,
        shared_depth=len(convs(r"share_tower\.(\d+)\.(?:conv\.)?weight")),
        norm="gn" if norm else "none",
        scales="scales.0.scale" in head,
        deformable="none" if not offsets else "all" if len(offsets) == depth > 1 else "last",
        modulated=offset_channels == {27},
        large_kernel=0 if large is None else large.shape[2],
        code_length=len(head["mask_pred.weight"] if large is None else large),
    )


if __name__ == "__main__":
    from meinst.__main__ import run_verb

    run_verb("convert")
