"""On a GPU every package's detection waits once, at the end; without a GPU, fake tensors show what would wait.

A fake tensor has a device and a shape and no values: a size that depends on values cannot be made of it, and what
copies it is seen.
"""

import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onestage.nn import retinanet
from onestage.nn.fcos import per_location
from onestage.ops import host, runs
from onestage.transforms import _per_channel

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
# Beside the smallest of each package, what decodes in another way.
VARIANTS = [(package, "small") for package in PAPERS] + [
    ("sipmask", "r50_fc"),
    ("sipmask", "r50_rt_6x"),
    ("sipmask", "r101_plus_6x"),
    ("sipmask", "video_small"),
    ("meinst", "no_encoding"),
    ("rdsnet", "r50_mbrm"),
    ("rdsnet", "yolact"),
    ("rdsnet", "s"),
    ("sprnet", "c33x4"),
]
NUMBER = 3  # detections that a fake count says there are
IMAGE = torch.randint(256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Copies(TorchDispatchMode):
    """Collects copies from one device to another for which the host waits."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.name() in ("aten::_to_copy", "aten::copy_"):
            # `copy_` writes its first argument and reads its second.
            source, target = (args[1], args[0]) if func.name() == "aten::copy_" else (args[0], result)
            if source.device != target.device and not kwargs.get("non_blocking"):
                self.seen.append(f"{func.name()} from {source.device} to {target.device}")
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake tensors, and what was waited for: the numbers of elements of each wait."""
    waits = []

    def to_host(*tensors):
        waits.append([tensor.numel() for tensor in tensors])
        return tuple(np.full(tensor.shape, NUMBER) for tensor in tensors)

    monkeypatch.setattr(host, "to_host", to_host)
    kept = (_per_channel, retinanet._cell_anchors_on, import_module("rdsnet.small")._anchors_on)
    for cached in kept:
        cached.cache_clear()
    with FakeTensorMode():
        yield waits
    for cached in kept:
        cached.cache_clear()


def model_of(package, variant, device):
    method = import_module(f"{package}.method").METHOD
    torch.manual_seed(0)
    with torch.device(device):  # a fake model cannot be moved
        return method.build(method.variants[variant]).eval()


@torch.no_grad()
@pytest.mark.parametrize(("package", "variant"), VARIANTS, ids=map("-".join, VARIANTS))
def test_a_gpu_is_waited_for_once_at_the_end_of_a_batch(package, variant, fake_gpu, monkeypatch):
    monkeypatch.delenv("ONESTAGE_KERNELS", raising=False)
    model = model_of(package, variant, "cuda")
    images = [torch.empty(3, 90, 120, dtype=torch.uint8, device="cuda") for _ in range(2)]
    model.detect(images)  # constants are copied once
    fake_gpu.clear()
    with Copies() as copies:
        found = model.detect(images)
    assert copies.seen == []
    assert fake_gpu == [[2]]
    for detections in found:
        assert len(detections.boxes) == len(detections.masks) == NUMBER
        assert detections.boxes.device.type == "cuda"


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("package", PAPERS)
def test_a_gpu_says_itself_that_it_is_waited_for_once(package):
    model, image = model_of(package, "small", "cuda"), IMAGE.cuda()
    model.detect([image])  # kernels are compiled, tables made
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model.detect([image])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # That the mode itself is a prototype is warned of too, once.
    assert sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught) <= 1


def test_run_lengths_are_waited_for_once(fake_gpu, monkeypatch):
    monkeypatch.delenv("ONESTAGE_KERNELS", raising=False)
    windows = torch.empty(NUMBER, 4, dtype=torch.int64, device="cuda")
    words = torch.empty(NUMBER * 60, dtype=torch.int32, device="cuda")
    with Copies() as copies:
        split = runs.split_changes(windows, words, (60, 30))
    assert len(split) == NUMBER
    assert copies.seen == []
    assert fake_gpu == [[NUMBER * runs.USUAL_CHANGES, NUMBER]]


def test_fake_tensors_show_what_would_wait(fake_gpu):
    values = torch.rand(5, 4, device="cuda")
    with pytest.raises(DynamicOutputShapeException):
        values[values[:, 0] > 0.5]
    with pytest.raises(DynamicOutputShapeException):
        values.masked_select(values > 0.5)  # as torchvision's NMS ends
    with pytest.raises(DataDependentOutputException):
        values.sum().item()
    with Copies() as copies:
        torch.tensor([1.0, 2.0], device="cuda")
        values.cpu()
        per_location([(2, 3), (1, 1)], (8, 16), values.device)
    assert copies.seen == ["aten::_to_copy from cpu to cuda:0", "aten::_to_copy from cuda:0 to cpu"]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.011, 0.99])  # the last: nothing is found
@pytest.mark.parametrize(("package", "variant"), VARIANTS[: len(PAPERS)], ids=PAPERS)
def test_fixed_shapes_change_no_detection(package, variant, threshold, monkeypatch):
    model = model_of(package, variant, "cpu")
    # Boxes of some strides, and scores apart from each other.
    for name, layer in model.head.named_modules():
        if name == "distances":
            torch.nn.init.constant_(layer.bias, 3.0)
        elif name == "logits":
            torch.nn.init.normal_(layer.weight, std=0.05)
    rules = replace(model.config.inference, score_threshold=threshold, candidates_per_level=40, max_detections=15)
    model.config = replace(model.config, inference=rules)
    (expected,) = model.detect([IMAGE])
    assert (len(expected) > 0) == (threshold < 0.9)
    monkeypatch.setattr(host, "keeps_fixed_shapes", lambda device: True)
    (found,) = model.detect([IMAGE])
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if package == "sprnet":  # other batches of a matrix product
        different = (found.masks.to_bool() != expected.masks.to_bool()).sum()
        assert different <= 1e-4 * IMAGE[0].numel() * len(found)
    else:
        assert torch.equal(found.masks.to_bool(), expected.masks.to_bool())
