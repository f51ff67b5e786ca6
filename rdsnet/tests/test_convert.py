"""Official layouts in, our layout out, nothing lost on the way; built from our own models, key by key."""

from dataclasses import replace

import pytest
import torch

from onestage.errors import WeightsError
from rdsnet.config import R50, R101, YOLACT
from rdsnet.convert import config_of, convert_state_dict
from rdsnet.method import build
from rdsnet.refine import RELEASED_BIAS, RELEASED_WEIGHT


def official(config):
    """A state dict in the layout of the authors of either code, with a number of its own in every tensor."""
    with torch.device("meta"):
        ours = build(config).state_dict()
    names = _rdsnet if config.detector == "retinanet" else _yolact
    state = {}
    for number, (key, value) in enumerate(ours.items()):
        theirs = names(key)
        if theirs is not None:
            state[theirs] = torch.full(value.shape, float(number)).to(value.dtype)
    return state


def _rdsnet(key):
    part, _, rest = key.partition(".")
    leaf = key.rpartition(".")[2]
    if part == "backbone":
        return key
    if part == "mbrm":
        return None
    if part == "fpn":
        kind, number, _ = rest.split(".")
        name = "lateral_convs" if kind == "lateral" else "fpn_convs"
        return f"neck.{name}.{int(number) + 3 * (kind == 'extra')}.conv.{leaf}"
    if "tower" in rest:
        tower, number, unit, _ = rest.split(".")
        name = {"cls_tower": "cls", "box_tower": "reg", "tower": "rep"}[tower]
        return f"bbox_head.{name}_convs.{number}.{'conv' if unit == '0' else 'gn'}.{leaf}"
    layers = {"head.logits": "cls", "head.deltas": "reg", "object_vectors.out": "rep"}
    if key.rpartition(".")[0] in layers:
        return f"bbox_head.retina_{layers[key.rpartition('.')[0]]}.{leaf}"
    if rest.startswith("out"):
        return f"mask_head.conv_reps.{leaf}"
    places = {"lateral.0.0": "lateral_convs.0.0", "lateral.1.0": "lateral_convs.1.0", "fused": "final_convs.0.0"}
    places |= {"lateral.2.0": "lateral_convs.2.0", "lateral.2.1": "lateral_convs.2.2"}
    unit = rest.removesuffix(f".{leaf}")
    return f"mask_head.{places[unit[:-2]]}.{'conv' if unit[-1] == '0' else 'gn'}.{leaf}"


def _yolact(key):
    leaf = key.rpartition(".")[2]
    if key.startswith("backbone.layer"):
        return f"backbone.layers.{int(key[14]) - 1}{key[15:]}"
    if key.startswith("backbone."):
        return key
    if key.startswith("fpn."):
        _, kind, number, _ = key.split(".")
        if kind == "extra":
            return f"fpn.downsample_layers.{number}.{leaf}"
        return f"fpn.{'lat_layers' if kind == 'lateral' else 'pred_layers'}.{2 - int(number)}.{leaf}"
    protonet = {"before.0.0": 0, "before.1.0": 2, "before.2.0": 4, "after.0": 8, "out": 10}
    if key.startswith("pixel_vectors."):
        return f"proto_net.{protonet[key.removeprefix('pixel_vectors.').removesuffix(f'.{leaf}')]}.{leaf}"
    if key.startswith("head.shared"):
        return f"prediction_layers.0.upfeature.0.{leaf}"
    layers = {"head.deltas": "bbox_layer", "head.logits": "conf_layer", "head.vectors": "mask_layer"}
    layer = layers.get(key.rpartition(".")[0])
    return f"prediction_layers.0.{layer}.{leaf}" if layer else f"semantic_seg_conv.{leaf}"


@pytest.mark.parametrize("config", [R50, R101, YOLACT], ids=["r50", "r101", "yolact"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_tensor_finds_its_place(config, prefix):
    config = replace(config, num_classes=5)
    state = official(config)
    state = {prefix + key: value for key, value in state.items()}
    found = config_of(state)
    assert replace(found, inference=config.inference) == config
    converted, notes = convert_state_dict(state, found)
    with torch.device("meta"):
        ours = build(found).state_dict()
    assert converted.keys() == ours.keys()
    for number, (key, value) in enumerate(ours.items()):
        assert converted[key].shape == value.shape
        if not key.startswith("mbrm."):
            assert (converted[key] == number).all(), key
    assert len(notes) == (config.detector == "retinanet")


def test_rdsnet_gets_the_released_refinement():
    state = official(R50)
    config = config_of(state)
    assert config.inference.refine == "mbrm"
    converted, (note,) = convert_state_dict(state, config)
    assert "MBRM" in note
    assert converted["mbrm.weight"].flatten().tolist() == pytest.approx(RELEASED_WEIGHT)
    assert converted["mbrm.bias"].item() == pytest.approx(RELEASED_BIAS)


def test_a_file_with_its_own_refinement_keeps_it():
    state = official(R50) | {"mbrm.weight": torch.ones(1, 1, 5), "mbrm.bias": torch.zeros(1)}
    config = config_of(state)
    assert config.refine.reach == 2
    converted, notes = convert_state_dict(state, config)
    assert converted["mbrm.weight"].sum() == 5
    assert notes == []


def test_what_old_yolact_files_hold_twice_is_named_and_dropped():
    state = official(YOLACT)
    extra = {"backbone.layer.0.0.conv1.weight": torch.zeros(1), "fpn.downsample_layers.2.bias": torch.zeros(1)}
    _, (note,) = convert_state_dict(state | extra, YOLACT)
    assert "fpn.downsample_layers.2.bias" in note


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_file_that_does_not_fit_is_refused(change):
    state = official(R50)
    if change == "missing":
        del state["mask_head.conv_reps.bias"]
    elif change == "unknown":
        state["bbox_head.retina_extra.weight"] = torch.zeros(1)
    else:
        state["bbox_head.retina_cls.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError):
        convert_state_dict(state, R50)


def test_a_foreign_file_is_named():
    with pytest.raises(WeightsError, match=r"neither an RDSNet nor a YOLACT"):
        config_of({"something": torch.zeros(1)})
