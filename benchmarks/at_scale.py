"""Runs the code of docs/at_scale.md on Ray and compares its results with those of one process.

Generated images, a small model of random parameters that returns whatever scores best. `nox -s ray` installs Ray and
starts this. Leaves with 1 if a result differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from onestage.data.synth import NAMES, make_shapes
from onestage.engine.checkpoint import WeightsInfo, save_weights

PAGE = Path(__file__).parents[1] / "docs" / "at_scale.md"
CLASSES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--package", default="sipmask", help="whose small model")
    options = parser.parse_args()
    import ray

    page = recipe()
    with tempfile.TemporaryDirectory() as folder:
        images = make_shapes(Path(folder) / "shapes", images=(0, options.images), classes=CLASSES) / "val"
        (images / "broken.jpg").write_bytes(b"no image")
        weights = random_weights(options.package, Path(folder) / "weights.safetensors")
        torch.set_num_threads(1)  # as in a worker, so that sums are the same bit for bit
        one = page.Find(weights, 0.0)
        expected = [one(image) for image in page.images_in(images)]
        ray.init(
            num_cpus=options.workers + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        start = time.perf_counter()
        found = page.find_with_ray(images, weights, workers=options.workers, score_threshold=0.0).take_all()
        seconds = time.perf_counter() - start
        ray.shutdown()
    problem = compare(expected, found)
    instances = sum(len(json.loads(image["results"])) for image in found)
    print(
        f"Ray {version('ray')}, torch {version('torch')}, Python {sys.version.split()[0]}: {len(found)} images, "
        f"{instances} instances, {options.workers} workers, {seconds:.1f} s: {problem or 'equal to one process'}"
    )
    sys.exit(problem is not None)


def recipe() -> ModuleType:
    """The Python of docs/at_scale.md as a module; without Ray, all but what needs it."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    module = ModuleType("recipe")
    for block in blocks:
        if "import ray" in block and "ray" not in sys.modules:
            continue
        exec(compile(block, str(PAGE), "exec"), vars(module))
    return module


def random_weights(package: str, path: Path) -> Path:
    """Weights of a package's small model as it is before training."""
    method = import_module(f"{package}.method").METHOD
    config = replace(method.variants[method.small_variant], num_classes=CLASSES)
    torch.manual_seed(0)
    info = WeightsInfo(
        package=package,
        variant=method.small_variant,
        config=asdict(config),
        categories=tuple(enumerate(NAMES[:CLASSES], start=1)),
        source="random parameters",
    )
    save_weights(path, method.build(config).state_dict(), info)
    return path


def compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> str | None:
    """What is not the same; None where everything is. Order does not count."""
    ours = {image["image_id"]: image for image in found}
    if len(ours) != len(found) or ours.keys() != {image["image_id"] for image in expected}:
        return f"{len(expected)} images went in, {len(found)} came out"
    wrong = [image["path"] for image in expected if ours[image["image_id"]] != image]
    if wrong:
        return f"{len(wrong)} of {len(expected)} images differ, the first is {wrong[0]}"
    if not any(json.loads(image["results"]) for image in expected):
        return "nothing was found, so nothing was compared"
    return None if sum(bool(image["error"]) for image in expected) == 1 else "the broken image has no error"


if __name__ == "__main__":
    main()
