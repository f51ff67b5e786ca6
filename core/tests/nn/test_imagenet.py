"""ImageNet weights in every layout: all tensors used or named."""

import pickle

import pytest
import torch
import torchvision
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from onestage.config import BackboneConfig
from onestage.errors import MachineError, WeightsError
from onestage.nn.imagenet import load_imagenet, rename_imagenet
from onestage.nn.resnet import build_backbone

CONFIG = BackboneConfig(name="resnet50")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    state = torchvision.models.resnet50().state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    return state


def test_torchvision_file_loads_and_names_what_it_leaves_out(tmp_path, weights):
    torch.save(weights, tmp_path / "resnet50.pth")
    trunk = build_backbone(CONFIG)
    assert load_imagenet(trunk, tmp_path / "resnet50.pth") == ["left out fc.bias, fc.weight"]
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_mmdetection_caffe_file_with_conv_biases_computes_the_same(tmp_path, weights):
    state = {name: tensor for name, tensor in weights.items() if "num_batches" not in name and "fc" not in name}
    bias = torch.randn(64)
    state["conv1.bias"] = bias
    state["layer2.0.downsample.0.bias"] = torch.randn(512)
    torch.save({"state_dict": state}, tmp_path / "resnet50_caffe.pth")
    trunk = build_backbone(CONFIG).eval()
    notes = load_imagenet(trunk, tmp_path / "resnet50_caffe.pth")
    assert notes == ["folded conv1.bias, layer2.0.downsample.0.bias into the norms"]
    x = torch.randn(1, 3, 32, 32)
    conv = torch.nn.functional.conv2d(x, state["conv1.weight"], bias, stride=2, padding=3)
    shift = state["bn1.running_mean"].reshape(-1, 1, 1)
    expected = (conv - shift) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(trunk.bn1(trunk.conv1(x)), expected, rtol=0, atol=1e-5)


def test_detectron_pickle_loads_its_norms_as_scale_and_shift(tmp_path, weights):
    blobs = {_caffe2_name(name): tensor.numpy() for name, tensor in weights.items() if _caffe2_name(name)}
    blobs["conv1_w_momentum"] = blobs["conv1_w"]
    with (tmp_path / "R-50.pkl").open("wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)
    trunk = build_backbone(CONFIG).eval()
    notes = load_imagenet(trunk, tmp_path / "R-50.pkl")
    assert notes == [
        "left out conv1_w_momentum, fc1000_b, fc1000_w",
        "norms have no statistics in the file: they are a scale and a shift",
    ]
    assert torch.equal(trunk.layer4[2].conv3.weight, weights["layer4.2.conv3.weight"])
    assert torch.equal(trunk.layer1[0].downsample[1].bias, weights["layer1.0.downsample.1.bias"])
    x = torch.randn(1, 64, 4, 4)
    norm = trunk.layer1[0].bn1
    expected = x * norm.weight.reshape(-1, 1, 1) + norm.bias.reshape(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("res_conv1_bn_s", "bn1.weight"),
        ("res4_22_branch2b_w", "layer3.22.conv2.weight"),
        ("res5_0_branch1_bn_riv", "layer4.0.downsample.1.running_var"),
        ("stem.conv1.norm.running_mean", "bn1.running_mean"),
        ("backbone.bottom_up.res2.1.conv3.norm.bias", "layer1.1.bn3.bias"),
        ("res3.0.shortcut.weight", "layer2.0.downsample.0.weight"),
        ("layer2.0.bn1.weight", "layer2.0.bn1.weight"),
        ("something.else", "something.else"),
    ],
)
def test_names_of_every_layout(name, ours):
    renamed, notes = rename_imagenet({name: torch.ones(1)})
    assert (list(renamed), notes) == ([ours], [])


def test_offset_convs_keep_their_initialisation(tmp_path, weights):
    torch.save(weights, tmp_path / "resnet50.pth")
    trunk = build_backbone(BackboneConfig(deformable_stages=(4,), deformable_interval=3))
    notes = load_imagenet(trunk, tmp_path / "resnet50.pth")
    assert notes[1] == "kept the initialisation of layer4.0.conv2.conv_offset.weight, layer4.0.conv2.conv_offset.bias"
    assert torch.equal(trunk.layer4[0].conv2.weight, weights["layer4.0.conv2.weight"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("layer3.2.conv2.weight"), "lack layer3.2.conv2.weight"),
        (lambda state: state.update({"neck.weight": torch.ones(1)}), "have unknown neck.weight"),
        (lambda state: state.update({"conv1.weight": torch.ones(1)}), "have other shapes of conv1.weight"),
    ],
)
def test_a_tensor_too_few_too_many_or_misshapen_is_refused(tmp_path, weights, change, text):
    state = dict(weights)
    change(state)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(WeightsError) as caught:
        load_imagenet(build_backbone(CONFIG), tmp_path / "file.pth")
    assert text in caught.value.what


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(WeightsError) as caught:
        load_imagenet(build_backbone(BackboneConfig(name="resnet18")), "IMAGENET22K")
    assert "it has IMAGENET1K_V1" in caught.value.what


def test_a_member_of_torchvisions_enum_names_the_weights_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESTAGE_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, cached)
    for member in (ResNet18_Weights.IMAGENET1K_V1, "ResNet18_Weights.IMAGENET1K_V1"):
        trunk = build_backbone(BackboneConfig(name="resnet18"))
        load_imagenet(trunk, member)
        assert torch.equal(trunk.conv1.weight, state["conv1.weight"])
    with pytest.raises(WeightsError, match="torchvision has no such weights of resnet18"):
        load_imagenet(trunk, ResNet50_Weights.IMAGENET1K_V1)


def test_offline_refuses_to_download_but_takes_the_cached_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESTAGE_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trunk = build_backbone(BackboneConfig(name="resnet18"))
    with pytest.raises(MachineError) as caught:
        load_imagenet(trunk, "IMAGENET1K_V1")
    assert "ONESTAGE_OFFLINE=1" in caught.value.what
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, cached)
    load_imagenet(trunk, "IMAGENET1K_V1")
    assert torch.equal(trunk.conv1.weight, state["conv1.weight"])


def _caffe2_name(name):
    if name.startswith("fc."):
        return "fc1000_w" if name == "fc.weight" else "fc1000_b"
    *path, field = name.split(".")
    letter = {"weight": "w", "bias": "b"}.get(field)
    if letter is None:
        return None
    is_norm = "bn" in path[-1] or path[-2:] == ["downsample", "1"]
    letter = {"w": "bn_s", "b": "bn_b"}[letter] if is_norm else letter
    if len(path) == 1:
        return f"res_conv1_{letter}" if is_norm else f"conv1_{letter}"
    branch = "branch1" if path[2] == "downsample" else "branch2" + "abc"[int(path[2][-1]) - 1]
    return f"res{int(path[0][-1]) + 1}_{path[1]}_{branch}_{letter}"
