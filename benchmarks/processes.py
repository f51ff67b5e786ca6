"""Two processes against one, for every package: the gradients of a step, and the AP of an evaluation.

Gradients: each process learns from two of four generated images; they have to be those of one process that learns from
all four, and are compared tensor by tensor. Normalisers are those of all processes, nothing is drawn, and batch norms
keep their statistics: by default the papers' normalisers count what one GPU sees. AP: each process evaluates its share
of five images; metrics and results have to be those of one process. gloo, CPU, one thread a process.

    python benchmarks/processes.py

writes a record to results/processes/ and leaves with 1 if anything differs by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from onestage.data.synth import ShapesDataset
from onestage.engine import distributed
from onestage.engine.evaluate import evaluate
from onestage.tables.record import write_record

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
# Nothing is drawn, and normalisers are those of all processes; batch norm's own statistics would be each process's.
WHOLE = {"masks_per_image": 10**6, "noisy_logits": False, "reduce_normalisers": True}
# Case: package, variant, changes; besides the small variants what those do not have.
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {package: (package, "", {}) for package in PAPERS}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sipmask-rescored": ("sipmask", "demo", {"rescore": True}),
    "rdsnet-real-time": ("rdsnet", "s", {"num_classes": 3}),
    "rdsnet-combined": ("rdsnet", "yolact", {"num_classes": 3}),
}
CASES = {**SMALL, **MORE}
# Of the largest gradient of a tensor; below a tenth, gradients are sums of larger ones that cancel.
TOLERANCE, FLOOR = 1e-5, 0.1
PATIENCE = 600  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for case, empty in [*((case, ()) for case in SMALL), *((case, (2, 3)) for case in CASES)]:
        with tempfile.TemporaryDirectory() as folder:
            in_two_processes(learn_from_half, case, empty, Path(folder))
            largest, where = difference(case, empty, Path(folder))
        found.append({"case": case, "without_objects": list(empty), "largest": largest, "tensor": where})
        print(f"{case}, images without objects {list(empty)}: {largest:.2g} ({where})", flush=True)
    for package in PAPERS:
        in_two_processes(evaluate_half, package)
        print(f"{package}: AP and results of two processes are those of one", flush=True)
    held = max(row["largest"] for row in found) <= TOLERANCE
    config = {"processes": 2, "tolerance": TOLERANCE, "floor": FLOOR, "cases": sorted(CASES)}
    results = {"gradients": found, "held": held, "evaluations_equal": PAPERS}
    print(f"record: {write_record(options.results, 'processes', config, {'kind': 'faults', 'results': [results]})}")
    sys.exit(not held)


def in_two_processes(function: Callable[..., Any], *args: Any) -> None:
    """Calls a function in two forked processes with torchrun's environment; leaves with 1 if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(2):
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": "2"}
        started.append(multiprocessing.get_context("fork").Process(target=function, args=args))
        started[-1].start()
    for process in started:
        process.join(PATIENCE)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    if any(process.exitcode != 0 for process in started):
        sys.exit(f"{function.__name__}{args}: exit codes {[process.exitcode for process in started]}")


def build(case: str) -> Any:
    """The model of a case, the same in every process."""
    package, variant, changes = CASES[case]
    method = import_module(f"{package}.method").METHOD
    demo = method.variants[method.demo_variant]
    config = method.variants[variant or method.demo_variant]
    switches = {name: value for name, value in WHOLE.items() if name in {field.name for field in fields(config)}}
    trunk = replace(demo.backbone, norm="frozen_stats")
    torch.manual_seed(0)
    return method.build(replace(config, **switches, **changes, backbone=trunk, input=demo.input)).train()


def batch(number: int | None, empty: tuple[int, ...] = ()) -> tuple[list[Tensor], list[Any]]:
    """Two of four images, or all of them for None; those in `empty` have no objects."""
    shapes = ShapesDataset(4, size=128)
    images, targets = [], []
    for index in range(4) if number is None else range(2 * number, 2 * number + 2):
        image, target = shapes[index]
        images.append(image)
        targets.append(target[torch.zeros(0, dtype=torch.int64)] if index in empty else target)
    return images, targets


def learn_from_half(case: str, empty: tuple[int, ...], folder: Path) -> None:
    """What each of two processes does; its gradients go to `folder / "<rank>.safetensors"`."""
    distributed.start("cpu")
    model = build(case)
    _backward(DistributedDataParallel(model), *batch(distributed.rank(), empty))
    safetensors.torch.save_file(_gradients(model), folder / f"{distributed.rank()}.safetensors")
    distributed.stop()


def gradients_of_both(folder: Path) -> list[dict[str, Tensor]]:
    """What the two processes wrote."""
    return [safetensors.torch.load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def difference(case: str, empty: tuple[int, ...], folder: Path) -> tuple[float, str]:
    """The largest difference between the processes' gradients and one process's with all four images, and its tensor.

    In parts of the tensor's largest gradient, which is taken as FLOOR at least.
    """
    model = build(case)
    _backward(model, *batch(None, empty))
    expected = _gradients(model)
    largest, where = 0.0, ""
    for found in gradients_of_both(folder):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            share = (found[name] - gradient).abs().max().item() / max(FLOOR, gradient.abs().max().item())
            largest, where = max((largest, where), (share, name))
    return largest, where


def evaluate_half(package: str) -> None:
    """What each of two processes does; then it evaluates all images alone and compares."""
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


def _gradients(model: Any) -> dict[str, Tensor]:
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in learning.items() if parameter.grad is None]
    assert not without, f"no gradient: {without}"
    return {name: parameter.grad.contiguous() for name, parameter in learning.items()}


def _backward(network: Any, images: list[Tensor], targets: list[Any]) -> None:
    losses = network(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()


if __name__ == "__main__":
    main()
