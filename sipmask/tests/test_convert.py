from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.config import BackboneConfig
from onestage.errors import WeightsError
from sipmask.config import R50, R50_FC, R50_RT_6X, R50_RT_10X, R101_PLUS_6X, R101_PLUS_10X, VIDEO, SipMaskConfig
from sipmask.convert import config_of, convert_state_dict
from sipmask.model import SipMask, SipMaskHead

SMALL_TRUNK = BackboneConfig(name="resnet50", stride_in_1x1=True)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (R50, 5_755_162, 42),
        (replace(R50_RT_6X), 3_393_050 - 512, 27 - 2),  # the released files hold an unused GN of 2 x 256
        (R50_FC, 5_757_210, 50),
        (R101_PLUS_10X, 3_505_930, 44),
        (VIDEO, 6_056_690, 44),
    ],
)
def test_head_has_the_released_number_of_parameters(config, parameters, tensors):
    with torch.device("meta"):
        state = SipMaskHead(config).state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters


@pytest.mark.parametrize(
    "config",
    [R50, R50_RT_6X, R50_RT_10X, R50_FC, R101_PLUS_6X, R101_PLUS_10X, VIDEO],
    ids=["gn", "rt", "rt_gn", "fc", "plus", "plus_gn", "video"],
)
def test_an_official_file_comes_in_whole(config):
    config = replace(config, num_classes=4)
    model = SipMask(config)
    official = _official(model, config)
    assert config_of(official) == config
    converted, notes = convert_state_dict({f"module.{key}": value for key, value in official.items()}, config)
    model.load_state_dict(converted, strict=False)
    ours = model.state_dict()
    missing = {key for key in ours if key not in converted}
    assert all(key.endswith("num_batches_tracked") for key in missing)
    for key, value in converted.items():
        assert_close(value, ours[key])
    assert bool(notes) == (config.norm == "none")


def test_a_leftover_tensor_is_refused():
    config = replace(R50_RT_6X, num_classes=4)
    official = _official(SipMask(config), config)
    official["bbox_head.surprise.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"no place for bbox_head\.surprise\.weight"):
        convert_state_dict(official, config)


def test_a_missing_tensor_is_refused():
    config = replace(R50_RT_6X, num_classes=4)
    official = _official(SipMask(config), config)
    del official["neck.fpn_convs.4.conv.bias"]
    with pytest.raises(WeightsError, match=r"nothing for fpn\.extra\.1\.bias"):
        convert_state_dict(official, config)


def test_another_shape_is_refused():
    config = replace(R50_RT_6X, num_classes=4)
    official = _official(SipMask(config), config)
    with pytest.raises(WeightsError, match=r"another shape: head\.logits\.weight"):
        convert_state_dict(official, replace(config, num_classes=5))


def test_a_video_file_with_deeper_towers_and_the_older_name_comes_in_whole():
    config = replace(VIDEO, num_classes=4, tower_depth=4, track_depth=4)
    model = SipMask(config)
    official = {key.replace("sipmask_track", "fovea_track"): value for key, value in _official(model, config).items()}
    assert {"bbox_head.track_convs.3.gn.bias", "bbox_head.fovea_track.weight"} <= official.keys()
    assert config_of(official) == config
    converted, _ = convert_state_dict(official, config)
    assert torch.equal(converted["head.tracking.mix.weight"], model.head.tracking.mix.weight)


def test_a_video_file_without_its_tracking_branch_is_refused():
    config = replace(VIDEO, num_classes=4)
    official = {key: value for key, value in _official(SipMask(config), config).items() if "track" not in key}
    with pytest.raises(WeightsError, match=r"nothing for head\.tracking\."):
        convert_state_dict(official, config)


def test_offsets_of_the_trunk_may_have_their_older_name():
    config = replace(R101_PLUS_6X, num_classes=4)
    official = _official(SipMask(config), config)
    offsets = [key for key in official if key.endswith("conv_offset.bias") and key.startswith("backbone.")]
    assert len(offsets) == 11  # of layer2 blocks 0 and 3, of layer3 0 to 21, of layer4 0
    older = {key.replace("conv2.conv_offset", "conv2_offset"): value for key, value in official.items()}
    assert config_of(older) == config
    assert convert_state_dict(older, config)[0].keys() == convert_state_dict(official, config)[0].keys()


def test_something_else_is_refused():
    with pytest.raises(WeightsError, match="not a SipMask checkpoint"):
        config_of({"conv1.weight": torch.zeros(1)})


def _official(model: SipMask, config: SipMaskConfig) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the released code, written out by hand for this test."""
    state = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "backbone":
            name = _fc_trunk(rest) if config.profile == "fc" else key
        elif part == "fpn":
            kind, level, leaf = rest.split(".")
            name = _NECK["fc" if config.profile == "fc" else "mm"][kind][int(level)] + "." + leaf
        else:
            name = _fc_head(rest) if config.profile == "fc" else _mm_head(rest)
        if name.endswith("num_batches_tracked") and config.profile == "fc":
            continue
        state[name] = value.reshape(1) if config.profile == "fc" and value.ndim == 0 else value
    if config.norm == "none":
        state["bbox_head.feat_align.norm.weight"] = torch.ones(config.width)
        state["bbox_head.feat_align.norm.bias"] = torch.zeros(config.width)
    return state


_NECK = {
    "mm": {
        "lateral": [f"neck.lateral_convs.{i}.conv" for i in range(3)],
        "output": [f"neck.fpn_convs.{i}.conv" for i in range(3)],
        "extra": ["neck.fpn_convs.3.conv", "neck.fpn_convs.4.conv"],
    },
    "fc": {
        "lateral": [f"backbone.fpn.fpn_inner{i}" for i in (2, 3, 4)],
        "output": [f"backbone.fpn.fpn_layer{i}" for i in (2, 3, 4)],
        "extra": ["backbone.fpn.top_blocks.p6", "backbone.fpn.top_blocks.p7"],
    },
}
_SHARED = {
    "alignment.offset": "feat_align.conv_offset",
    "alignment.conv": "feat_align.conv_adaption",
    "alignment.norm": "feat_align.norm",
    "coefficients": "sip_cof",
    "basis.reduce": "sip_mask_lat0",
    "basis.out": "sip_mask_lat",
}
_MM = _SHARED | {
    "logits": "fcos_cls",
    "distances": "fcos_reg",
    "centerness": "fcos_centerness",
    "scoring.out": "mask_scoring",
    "tracking.mix": "sipmask_track",
    **{f"scoring.convs.{i}": f"convs_scoring.{i}.conv" for i in range(6)},
}
_FC = _SHARED | {"logits": "cls_logits", "distances": "bbox_pred", "centerness": "centerness"}


def _fc_trunk(rest: str) -> str:
    return f"backbone.body.{rest}" if rest.startswith("layer") else f"backbone.body.stem.{rest}"


def _mm_head(rest: str) -> str:
    layer, _, leaf = rest.rpartition(".")
    if "tower" in layer:
        tower, number, part = layer.removeprefix("tracking.").split(".")
        branch = {"cls_tower": "cls_convs", "box_tower": "reg_convs", "tower": "track_convs"}[tower]
        return f"bbox_head.{branch}.{number}.{'gn' if part == '1' else 'conv'}.{leaf}"
    return f"bbox_head.{_MM.get(layer, layer)}.{leaf}"


def _fc_head(rest: str) -> str:
    layer, _, leaf = rest.rpartition(".")
    if "_tower" in layer:
        tower, number, part = layer.split(".")
        branch = {"cls_tower": "cls_tower", "box_tower": "bbox_tower"}[tower]
        return f"rpn.head.{branch}.{3 * int(number) + int(part)}.{leaf}"
    return f"rpn.head.{_FC.get(layer, layer)}.{leaf}"
