"""Training steps of every package: time and peak memory of forward, losses, backward and optimiser.

    python benchmarks/training_steps.py --models sipmask:r50 --precisions bf16

Images are generated, of the recipe's first training size, with 15 objects each of COCO's sizes; parameters are random
and do not move (learning rate 0). No peer: a step is our own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from measuring import FAILURES, call_timer, peak_megabytes, spread
from training_memory import INSTANCES, batch

from onestage.engine.guard import autocast
from onestage.engine.schedule import make_optimizer
from onestage.tables.record import write_record

MODELS = ("sipmask:r50", "meinst:r50", "sais:r50_768", "rdsnet:r50", "sprnet:r50_800")


def main() -> int:
    flags = read_flags()
    torch.set_num_threads(flags.threads)
    device = torch.device(flags.device)
    results: list[dict[str, Any]] = []
    path = None
    for name in flags.models:
        for precision in flags.precisions:
            try:
                result = measure(name, precision, flags, device)
                took, peak = result["milliseconds"]["median"], result["peak_mb"]
                said = f" {took:9.1f} ms a step of {flags.images} images   peak {peak:8.0f} MB"
            except FAILURES as error:
                result = {"model": name, "precision": precision, "failed": f"{type(error).__name__}: {error}"}
                said = f"failed: {error}"
            results.append(result)
            print(f"{name:16} {precision} {said}", flush=True)
            path = record(results, flags, device)  # a run that is ended leaves what it has
    if path:
        print(f"wrote {path}")
    return 1 if any("failed" in result for result in results) else 0


def record(results: list[dict[str, Any]], flags: argparse.Namespace, device: torch.device) -> Path | None:
    if not flags.output:
        return None
    config = {key: getattr(flags, key) for key in ("models", "precisions", "images", "steps", "threads")}
    body = {
        "protocol": {"warm_up": 2, "instances_per_image": INSTANCES, "weights": "random", "unit": "MB of 2**20"},
        "results": results,
    }
    return write_record(Path(flags.output), f"training-{device.type}", config, body)


def measure(name: str, precision: str, flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time and memory of the steps of `package:variant`."""
    package, variant = name.split(":")
    method = import_module(f"{package}.method").METHOD
    torch.manual_seed(0)
    config: Any = method.variants[variant]
    model: Any = method.build(config).to(device).train()
    images, targets = batch(config, flags.images)
    images, targets = [image.to(device) for image in images], [target.to(device) for target in targets]
    optimizer = make_optimizer(model, replace(config.schedule, lr=0.0))  # random weights must not diverge

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            losses = model(images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        assert torch.isfinite(total), f"{name}: losses are {losses}"
        total.backward()
        optimizer.step()

    for _ in range(2):
        step()
    timed = call_timer(device, flags.threads)
    return {
        "model": name,
        "precision": precision,
        "images": flags.images,
        "image_size": list(config.input.train_sizes[0]),
        "milliseconds": spread([timed(step) for _ in range(flags.steps)]),
        "peak_mb": peak_megabytes(step, device),
    }


def read_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="PACKAGE:VARIANT", help="(%(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--images", type=int, default=2, help="of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, after 2 (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "speed"), help="'' writes nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
