"""Official RDSNet and YOLACT checkpoints to ours, every tensor accounted for.

`python -m rdsnet.convert --from FILE --to FILE` is the command. RDSNet's files hold no MBRM: its ten numbers, baked
into the released code, are put in.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from onestage.engine.official import KeyRules, convert_keys, plain
from onestage.errors import WeightsError, some
from rdsnet.config import R50, R101_TRUNK, YOLACT, RDSNetConfig

if TYPE_CHECKING:
    from torch import Tensor

_TRUNK: KeyRules = ((r"backbone\.((conv1|bn1|layer[1-4])\..+)", r"backbone.\1"),)
_FPN: KeyRules = (
    *((rf"neck\.lateral_convs\.{i}\.conv\.(weight|bias)", rf"fpn.lateral.{i}.\1") for i in range(3)),
    *((rf"neck\.fpn_convs\.{i}\.conv\.(weight|bias)", rf"fpn.output.{i}.\1") for i in range(3)),
    *((rf"neck\.fpn_convs\.{i + 3}\.conv\.(weight|bias)", rf"fpn.extra.{i}.\1") for i in range(2)),
)
_TOWERS = (("cls", "head.cls_tower"), ("reg", "head.box_tower"), ("rep", "object_vectors.tower"))
_OBJECTS: KeyRules = (
    *(
        rule
        for theirs, ours in _TOWERS
        for rule in (
            (rf"bbox_head\.{theirs}_convs\.(\d+)\.conv\.(weight|bias)", rf"{ours}.\1.0.\2"),
            (rf"bbox_head\.{theirs}_convs\.(\d+)\.gn\.(weight|bias)", rf"{ours}.\1.1.\2"),
        )
    ),
    (r"bbox_head\.retina_cls\.(weight|bias)", r"head.logits.\1"),
    (r"bbox_head\.retina_reg\.(weight|bias)", r"head.deltas.\1"),
    (r"bbox_head\.retina_rep\.(weight|bias)", r"object_vectors.out.\1"),
)
_UNITS = (
    ("lateral_convs.0.0", "lateral.0.0"),
    ("lateral_convs.1.0", "lateral.1.0"),
    ("lateral_convs.2.0", "lateral.2.0"),
    ("lateral_convs.2.2", "lateral.2.1"),
    ("final_convs.0.0", "fused"),
)
_PIXELS: KeyRules = (
    *(
        (rf"mask_head\.{re.escape(theirs)}\.{part}\.(weight|bias)", rf"pixel_vectors.{ours}.{number}.\1")
        for theirs, ours in _UNITS
        for number, part in enumerate(("conv", "gn"))
    ),
    (r"mask_head\.conv_reps\.(weight|bias)", r"pixel_vectors.out.\1"),
    (r"mbrm\.(weight|bias)", r"mbrm.\1"),
)
RDSNET_KEYS = (*_TRUNK, *_FPN, *_OBJECTS, *_PIXELS)

_PROTONET = (("0", "before.0.0"), ("2", "before.1.0"), ("4", "before.2.0"), ("8", "after.0"), ("10", "out"))
YOLACT_KEYS: KeyRules = (
    (r"backbone\.((?:conv1|bn1)\..+)", r"backbone.\1"),
    *((rf"backbone\.layers\.{i}\.(.+)", rf"backbone.layer{i + 1}.\1") for i in range(4)),
    *((rf"fpn\.lat_layers\.{i}\.(weight|bias)", rf"fpn.lateral.{2 - i}.\1") for i in range(3)),  # stored coarse first
    *((rf"fpn\.pred_layers\.{i}\.(weight|bias)", rf"fpn.output.{2 - i}.\1") for i in range(3)),
    *((rf"fpn\.downsample_layers\.{i}\.(weight|bias)", rf"fpn.extra.{i}.\1") for i in range(2)),
    *((rf"proto_net\.{theirs}\.(weight|bias)", rf"pixel_vectors.{ours}.\1") for theirs, ours in _PROTONET),
    (r"prediction_layers\.0\.upfeature\.0\.(weight|bias)", r"head.shared.0.0.\1"),
    (r"prediction_layers\.0\.bbox_layer\.(weight|bias)", r"head.deltas.\1"),
    (r"prediction_layers\.0\.conf_layer\.(weight|bias)", r"head.logits.\1"),
    (r"prediction_layers\.0\.mask_layer\.(weight|bias)", r"head.vectors.\1"),
    (r"semantic_seg_conv\.(weight|bias)", r"semantic.\1"),
)


def convert_state_dict(state: dict[str, Tensor], config: RDSNetConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one.

    Args:
        state: The checkpoint's tensors by name, with or without `module.` in front.
        config: The configuration the tensors are for (`config_of`).

    Returns:
        The state dict of that configuration's model and one note per group of tensors left out or put in.

    Raises:
        WeightsError: a tensor is left over, missing or of another shape.
    """
    import torch

    from rdsnet.method import build

    state, added = plain(state), []
    if config.detector == "retinanet" and "mbrm.weight" not in state:
        from rdsnet.refine import RELEASED_BIAS, RELEASED_WEIGHT

        state["mbrm.weight"] = torch.tensor(RELEASED_WEIGHT).view(1, 1, -1)
        state["mbrm.bias"] = torch.tensor([RELEASED_BIAS])
        added.append("MBRM put in as released; the file has none")
    with torch.device("meta"):
        wanted = build(config).state_dict()
    keys = RDSNET_KEYS if config.detector == "retinanet" else YOLACT_KEYS
    converted, notes = convert_keys(state, keys, wanted, _unused)
    return converted, [*added, *notes]


def config_of(state: dict[str, Tensor]) -> RDSNetConfig:
    """The configuration that fits an official checkpoint: which of the two, trunk, classes, widths.

    Raises:
        WeightsError: neither RDSNet's layout nor YOLACT's.
    """
    state = plain(state)
    if "bbox_head.retina_rep.weight" in state:
        rep = state["bbox_head.retina_rep.weight"]
        mbrm = state.get("mbrm.weight")
        config = replace(
            R50,
            num_classes=len(state["bbox_head.retina_cls.weight"]) // 9,
            width=rep.shape[1],
            vector_length=len(rep) // 18,
            tower_depth=sum(re.fullmatch(r"bbox_head\.cls_convs\.\d+\.conv\.weight", key) is not None for key in state),
            inference=replace(R50.inference, refine="mbrm"),
            refine=R50.refine if mbrm is None else replace(R50.refine, reach=mbrm.shape[2] // 2),
        )
        return replace(config, backbone=R101_TRUNK) if "backbone.layer3.22.conv1.weight" in state else config
    if "prediction_layers.0.conf_layer.weight" in state:
        head = state["prediction_layers.0.mask_layer.weight"]
        config = replace(
            YOLACT,
            num_classes=len(state["prediction_layers.0.conf_layer.weight"]) // 3 - 1,
            width=head.shape[1],
            vector_length=len(head) // 3,
        )
        if "backbone.layers.2.22.conv1.weight" not in state:
            config = replace(config, backbone=replace(config.backbone, name="resnet50"))
        return config
    raise WeightsError(
        f"neither an RDSNet nor a YOLACT checkpoint: its first keys are {some(sorted(state), 3)}",
        "pass a file of the authors (keys bbox_head.retina_rep.weight, or prediction_layers.0.conf_layer.weight)",
    )


def _unused(key: str) -> bool:
    # Old YOLACT files hold their trunk twice, and a third conv below the pyramid that nothing reads.
    return key.startswith(("backbone.layer.", "fpn.downsample_layers.2.")) or bool(
        re.match(r"backbone\.layer\d*\.", key)
    )


if __name__ == "__main__":
    from rdsnet.__main__ import run_verb

    run_verb("convert")
