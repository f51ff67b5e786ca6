"""Trunks: torchvision's numbers, and what the configuration changes."""

import re

import pytest
import torch
import torchvision
from torch import nn

from onestage.config import BackboneConfig
from onestage.nn.deform import SelfOffsetConv2d
from onestage.nn.fpn import FPN
from onestage.nn.imagenet import rename_imagenet
from onestage.nn.resnet import build_backbone

OPEN = BackboneConfig(name="resnet18", norm="train", frozen_stages=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_trunk_equals_torchvision_in_training_and_folded_at_inference(name):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    trunk = build_backbone(BackboneConfig(name=name))
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    trunk.load_state_dict(state)
    trunk.eval()
    reference.eval()
    pixels = torch.randn(1, 3, 64, 96)
    expected = _torchvision_features(reference, pixels)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for ours, theirs in zip(trunk(pixels), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        ("resnet18", 11_176_512, (64, 128, 256, 512)),
        ("resnet50", 23_508_032, (256, 512, 1024, 2048)),
        ("resnet101", 42_500_160, (256, 512, 1024, 2048)),
        ("resnext101_32x8d", 86_742_336, (256, 512, 1024, 2048)),
        ("resnext101_64x4d", 81_406_272, (256, 512, 1024, 2048)),
    ],
)
def test_parameters_and_channels(name, parameters, channels):
    with torch.device("meta"):
        trunk = build_backbone(BackboneConfig(name=name))
    assert sum(p.numel() for p in trunk.parameters()) == parameters
    assert trunk.channels == channels


def test_output_strides_are_4_to_32_and_odd_sizes_round_up():
    features = build_backbone(OPEN)(torch.randn(1, 3, 65, 96))
    assert [tuple(x.shape[2:]) for x in features] == [(17, 24), (9, 12), (5, 6), (3, 3)]


def test_stride_moves_to_the_first_1x1():
    layer = build_backbone(BackboneConfig(stride_in_1x1=True)).layer3[0]
    assert (layer.conv1.stride, layer.conv2.stride, layer.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))
    layer = build_backbone(BackboneConfig()).layer3[0]
    assert (layer.conv1.stride, layer.conv2.stride) == ((1, 1), (2, 2))


def test_frozen_norms_do_not_move_and_do_not_learn():
    trunk = build_backbone(BackboneConfig(name="resnet18", norm="frozen", frozen_stages=2)).train()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    sum(x.sum() for x in trunk(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    learning = {name for name, p in trunk.named_parameters() if p.grad is not None}
    expected = {
        name
        for name, _ in trunk.named_parameters()
        if name.startswith(("layer2", "layer3", "layer4")) and "bn" not in name and "downsample.1" not in name
    }
    assert learning == expected


def test_frozen_statistics_leave_the_affine_to_learn():
    trunk = build_backbone(BackboneConfig(name="resnet18", norm="frozen_stats", frozen_stages=2)).train()
    assert not trunk.layer2[0].bn1.training
    assert trunk.layer2[0].bn1.weight.requires_grad
    assert not trunk.layer1[0].bn1.weight.requires_grad


def test_trained_norms_follow_train_and_eval():
    trunk = build_backbone(OPEN).train()
    before = trunk.bn1.running_mean.clone()
    trunk(torch.randn(2, 3, 64, 64))
    assert not torch.equal(trunk.bn1.running_mean, before)
    assert not trunk.eval().bn1.training
    assert all(p.requires_grad for p in trunk.parameters())


def test_norms_of_frozen_stages_rest_even_if_the_others_train():
    trunk = build_backbone(BackboneConfig(name="resnet18", norm="train", frozen_stages=1)).train()
    assert not trunk.bn1.training
    assert trunk.layer1[0].bn1.training


def test_every_third_block_of_the_chosen_layers_is_deformable():
    config = BackboneConfig(name="resnet101", stride_in_1x1=True, deformable_stages=(2, 3, 4), deformable_interval=3)
    with torch.device("meta"):
        trunk = build_backbone(config)
    found = [name for name, module in trunk.named_modules() if isinstance(module, SelfOffsetConv2d)]
    blocks = [(2, 0), (2, 3)] + [(3, i) for i in range(0, 23, 3)] + [(4, 0)]
    assert found == [f"layer{layer}.{block}.conv2" for layer, block in blocks]
    names = {name: tuple(p.shape) for name, p in trunk.named_parameters() if name.startswith("layer2.3.conv2")}
    assert names == {
        "layer2.3.conv2.weight": (128, 128, 3, 3),
        "layer2.3.conv2.conv_offset.weight": (18, 128, 3, 3),
        "layer2.3.conv2.conv_offset.bias": (18,),
    }


def test_fresh_deformable_trunk_equals_the_plain_one():
    torch.manual_seed(0)
    plain = build_backbone(OPEN)
    deformable = build_backbone(
        BackboneConfig(name="resnet18", norm="train", frozen_stages=0, deformable_stages=(3, 4))
    )
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(".conv_offset." in name for name in missing)
    assert len(missing) == 8
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(deformable.eval()(pixels), plain.eval()(pixels), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.golden
def test_trunk_and_pyramid_equal_the_released_code(golden):
    """A narrow ResNet-50 with the stride in the 1x1, under detectron2's names."""
    data = golden("meinst_model_r50")
    state = {key.removeprefix("sd/"): value for key, value in data.items() if key.startswith("sd/backbone.")}
    trunk_state, notes = rename_imagenet({key: value for key, value in state.items() if ".bottom_up." in key})
    assert notes == []
    trunk = build_backbone(BackboneConfig(stride_in_1x1=True)).eval()
    _shrink(trunk, trunk_state)
    trunk.load_state_dict(trunk_state)
    fpn_state = {_pyramid_name(key): value for key, value in state.items() if ".bottom_up." not in key}
    fpn = FPN([fpn_state[f"lateral.{i}.weight"].shape[1] for i in range(3)], 64)
    fpn.load_state_dict(fpn_state)
    height, width = data["padded_hw"].tolist()
    batch = torch.zeros(len(data["image_sizes"]), 3, height, width)
    mean, std = (data[key].reshape(3, 1, 1) for key in ("pixel_mean", "pixel_std"))
    for i, (h, w) in enumerate(data["image_sizes"].tolist()):
        batch[i, :, :h, :w] = (data[f"img{i}/bgr_uint8"].float() - mean) / std
    with torch.no_grad():
        features = trunk(batch)[1:]
        levels = fpn(features)
    names = ("res3", "res4", "res5", "p3", "p4", "p5", "p6", "p7")
    for name, ours in zip(names, [*features, *levels], strict=True):
        torch.testing.assert_close(ours, data[f"feat/{name}"], rtol=0, atol=1e-3)


def _torchvision_features(model, pixels):
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(pixels))))
        features = []
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
            features.append(x)
    return features


def _shrink(trunk, state):
    """Gives every conv and norm of the trunk the widths that `state` has."""
    for name, module in list(trunk.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            continue
        parent, _, field = name.rpartition(".")
        shape = state[f"{name}.weight"].shape
        if isinstance(module, nn.Conv2d):
            small = nn.Conv2d(shape[1], shape[0], module.kernel_size, module.stride, module.padding, bias=False)
        else:
            small = nn.BatchNorm2d(shape[0])
        setattr(trunk.get_submodule(parent), field, small.eval())


def _pyramid_name(name):
    if match := re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)\.(\w+)", name):
        return f"{match[1]}.{int(match[2]) - 3}.{match[3]}"
    level, field = re.fullmatch(r"backbone\.top_block\.p(\d)\.(\w+)", name).groups()
    return f"extra.{int(level) - 6}.{field}"
