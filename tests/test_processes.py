"""Every package in two processes: gradients and AP are those of one process that sees all images."""

from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from onestage.data.synth import ShapesDataset
from onestage.engine import distributed
from onestage.engine.evaluate import evaluate

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
# Nothing is drawn, and normalisers are those of all processes; batch norm's own statistics would be each process's.
WHOLE = {"masks_per_image": 10**6, "noisy_logits": False, "reduce_normalisers": True}
# Case: package, variant, changes; besides the small variants what those do not have.
SMALL = {package: (package, "", {}) for package in PAPERS}
MORE = {
    "sipmask-rescored": ("sipmask", "demo", {"rescore": True}),
    "rdsnet-real-time": ("rdsnet", "s", {"num_classes": 3}),
    "rdsnet-combined": ("rdsnet", "yolact", {"num_classes": 3}),
}
CASES = {**SMALL, **MORE}
# Of the largest gradient of a tensor; below a tenth, gradients are sums of larger ones that cancel.
TOLERANCE, FLOOR = 1e-5, 0.1


def build(case):
    package, variant, changes = CASES[case]
    method = import_module(f"{package}.method").METHOD
    demo = method.variants[method.demo_variant]
    config = method.variants[variant or method.demo_variant]
    switches = {name: value for name, value in WHOLE.items() if name in {field.name for field in fields(config)}}
    trunk = replace(demo.backbone, norm="frozen_stats")
    torch.manual_seed(0)
    return method.build(replace(config, **switches, **changes, backbone=trunk, input=demo.input)).train()


def batch(number, empty=()):
    """Two of four images, or all of them for None; those in `empty` have no objects."""
    shapes = ShapesDataset(4, size=128)
    images, targets = [], []
    for index in range(4) if number is None else range(2 * number, 2 * number + 2):
        image, target = shapes[index]
        images.append(image)
        targets.append(target[torch.zeros(0, dtype=torch.int64)] if index in empty else target)
    return images, targets


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(network, images, targets):
    losses = network(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()


def learn_from_half(case, empty, folder):
    distributed.start("cpu")
    model = build(case)
    backward(DistributedDataParallel(model), *batch(distributed.rank(), empty))
    torch.save(gradients(model), folder / f"{distributed.rank()}.pt")
    distributed.stop()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("case", "empty"),
    [*(pytest.param(case, (), id=f"{case}-objects everywhere") for case in SMALL),
     *(pytest.param(case, (2, 3), id=f"{case}-a process without objects") for case in CASES)],
)  # fmt: skip
def test_gradients_of_two_processes_are_those_of_one_with_both_batches(case, empty, fork, tmp_path):
    assert fork(learn_from_half, case, empty, tmp_path, processes=2) == [0, 0]
    model = build(case)
    backward(model, *batch(None, empty))
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            allowed = TOLERANCE * max(FLOOR, gradient.abs().max().item())
            assert (found[name] - gradient).abs().max().item() <= allowed, name


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("package", PAPERS)
def test_images_without_objects_alone_reach_every_parameter_in_both_processes(package, fork, tmp_path):
    assert fork(learn_from_half, package, range(4), tmp_path, processes=2) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, gradient in first.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, second[name]), name


def evaluate_half(package):
    method = import_module(f"{package}.method").METHOD
    config = method.variants[method.demo_variant]
    # An untrained network is sure of nothing.
    inference = replace(config.inference, score_threshold=0.0, max_detections=10)
    torch.manual_seed(0)
    model, images = method.build(replace(config, inference=inference)), ShapesDataset(5, split="val", size=128)
    distributed.start("cpu")
    metrics, results = evaluate(model, images, progress=False)
    distributed.stop()
    assert len({result["image_id"] for result in results}) == len(images)
    assert (metrics, results) == evaluate(model, images, progress=False)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("package", PAPERS)
def test_an_evaluation_shared_by_two_processes_has_the_numbers_of_one(package, fork):
    assert fork(evaluate_half, package, processes=2) == [0, 0]
