import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from meinst.config import R50, R50_DCN, R50_LK, X101_DCN, MEInstConfig
from meinst.convert import config_of, convert_state_dict
from meinst.model import MEInst
from onestage.config import BackboneConfig
from onestage.errors import WeightsError

PAIRS = {"left": "l", "right": "r"}
LAYERS = {"logits": "cls_logits", "distances": "bbox_pred", "centerness": "ctrness", "codes": "mask_pred"}
CODEC = {"components": "components", "variance": "explained_variances", "mean": "means"}


@pytest.mark.parametrize(("config", "numbers", "tensors"), [(R50, 34_899_042, 345), (R50_DCN, 35_022_744, 348)])
def test_a_model_has_the_released_number_of_parameters(config, numbers, tensors):
    with torch.device("meta"):
        state = MEInst(config).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == numbers


VARIANTS = {
    "plain": R50,
    "dcn": R50_DCN,
    "dcnv2_all": replace(R50, deformable="all", modulated=True),
    "lk": R50_LK,
    "no_norm_no_scales": replace(R50, norm="none", scales=False, shared_depth=1),
    "r101": replace(R50, backbone=BackboneConfig(name="resnet101", stride_in_1x1=True)),
    "x101": X101_DCN,
    "n20": replace(R50, code_length=20, mask_size=14),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_official_file_comes_in_whole(name):
    config = replace(VARIANTS[name], num_classes=4, width=32)
    with torch.device("meta"):
        model = MEInst(config)
    ours = {
        key: torch.full(value.shape, float(i), dtype=torch.float32)
        for i, (key, value) in enumerate(model.state_dict().items())
        if not key.endswith("num_batches_tracked")
    }
    official = {_official(key, config): value for key, value in ours.items()}
    assert len(official) == len(ours)
    assert config_of(official) == config
    official = {f"module.{key}": value for key, value in official.items()} | {"module.pixel_mean": torch.zeros(3)}
    converted, notes = convert_state_dict(official, config)
    assert converted.keys() == ours.keys()
    for key, value in converted.items():
        assert_close(value, ours[key])
    assert notes == ["left out, unused by the released model: pixel_mean"]


def test_something_else_is_refused():
    with pytest.raises(WeightsError, match="not an MEInst checkpoint"):
        config_of({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("part", ["mask_encoding.", "MEInst_head.cls_logits.", "bottom_up.res2.0.conv2."])
def test_a_file_without_a_part_says_which(part):
    config = replace(R50, num_classes=4, width=32)
    with torch.device("meta"):
        state = {_official(key, config): value for key, value in MEInst(config).state_dict().items()}
    state = {key: value for key, value in state.items() if part not in key}
    with pytest.raises(WeightsError, match=rf"not an MEInst checkpoint: no \S*{re.escape(part)}"):
        config_of(state)


def test_another_code_length_is_refused():
    config = replace(R50, num_classes=4, width=32)
    with torch.device("meta"):
        state = {_official(key, config): value for key, value in MEInst(config).state_dict().items()}
    with pytest.raises(WeightsError, match=r"another shape: (codec|head)\."):
        convert_state_dict(state, replace(config, code_length=40))


def _official(key: str, config: MEInstConfig) -> str:
    """The name of one of our tensors in the released code, written out by hand for this test."""
    part, _, rest = key.partition(".")
    layer, _, leaf = rest.rpartition(".")
    if part == "backbone":
        return f"backbone.{_trunk(layer, leaf)}"
    if part == "fpn":
        kind, number = layer.split(".")
        if kind == "extra":
            return f"backbone.top_block.p{int(number) + 6}.{leaf}"
        return f"backbone.fpn_{kind}{int(number) + 3}.{leaf}"
    if part == "codec":
        return f"proposal_generator.mask_encoding.{CODEC[leaf]}"
    return f"proposal_generator.MEInst_head.{_head(layer, leaf, config)}"


def _trunk(layer: str, leaf: str) -> str:
    stem = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    if layer in stem:
        return f"bottom_up.{stem[layer]}.{leaf}"
    stage, block, name, *rest = layer.split(".")
    if name == "downsample":
        name = "shortcut" if rest == ["0"] else "shortcut.norm"
    elif name.startswith("bn"):
        name = f"conv{name[2]}.norm"
    return f"bottom_up.res{int(stage[5:]) + 1}.{block}.{name}.{leaf}"


def _head(layer: str, leaf: str, config: MEInstConfig) -> str:
    if "_tower" in layer:
        tower, unit, part, *rest = layer.split(".")
        tower = {"cls_tower": "cls", "box_tower": "bbox", "mask_tower": "mask", "shared_tower": "share"}[tower]
        index = int(unit) * (3 if config.norm == "gn" else 2) + int(part)
        depth = config.shared_depth if tower == "share" else config.tower_depth
        deformable = config.deformable == "all" or (config.deformable == "last" and int(unit) == depth - 1)
        inner = ".offset" if rest else ".conv" if deformable and part == "0" else ""
        return f"{tower}_tower.{index}{inner}.{leaf}"
    name, *rest = layer.split(".")
    if rest and name == "codes":
        return f"mask_pred.conv_{PAIRS[rest[0]]}{int(rest[1]) + 1}.conv.{leaf}"
    return ".".join([LAYERS.get(name, name), *rest, leaf])
