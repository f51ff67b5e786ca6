"""`export`: the network for other runtimes, run there and compared with the model it came from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestage.cli.app import config_record
from onestage.cli.flags import Call
from onestage.cli.runs import open_run
from onestage.config import config_from_dict, with_field
from onestage.data.coco import read_image
from onestage.data.synth import ShapesDataset
from onestage.engine.checkpoint import DECODE, WeightsInfo, load_into, load_weights
from onestage.engine.distributed import pick_device
from onestage.engine.export import (
    CARD,
    NETWORKS,
    Difference,
    Format,
    Tolerance,
    compare,
    load_exported,
    need_onnx,
)
from onestage.engine.export import export as write_export
from onestage.errors import CheckFailed, UsageError
from onestage.method import Method

logger = logging.getLogger("onestage")

ENOUGH = 10  # detections to compare; the threshold comes down until there are so many
STEP, NUM_STEPS = 0.8, 40


def run(method: Method, call: Call) -> dict[str, Any]:
    """Exports, compares, and returns the record."""
    flags = call.flags
    formats: tuple[Format, ...] = ("onnx", "torch") if flags.format == "both" else (flags.format,)
    if flags.precision != "fp32":
        raise UsageError(f"--precision {flags.precision} is not exported", "export fp32 and let the runtime convert it")
    if "onnx" in formats:
        need_onnx(method.name)
    model, info = _model(method, call)
    config = model.config
    device = pick_device("cpu" if flags.device == "auto" else flags.device)
    if flags.image:
        batches = [[read_image(Path(path)) for path in (flags.image if flags.dynamic else flags.image[:1])]]
    else:
        batches = generated(config.input, flags.seed, dynamic=flags.dynamic)
    if flags.dry_run:
        return {"dry_run": True}
    with open_run(
        method.name, "export", config_record(method, call), output=flags.output, overwrite=flags.overwrite
    ) as run_folder:
        folder = run_folder.folder
        card = write_export(
            model,
            info,
            folder,
            formats=formats,
            dynamic=flags.dynamic,
            opset=flags.opset,
            deformable=flags.deformable,
        )
        names = [*(NETWORKS[form] for form in formats), DECODE, CARD]
        record = {
            "weights": info.source if flags.weights is None else str(flags.weights),
            "variant": info.variant,
            "dynamic": flags.dynamic,
            "input": card["input"]["shape"],
            "opset": card["opset"],
            "deformable": flags.deformable,
            "seconds": card["seconds"],
            "bytes": {name: (folder / name).stat().st_size for name in names},
        }
        for name in names:
            logger.info("%-20s %12s bytes", name, f"{record['bytes'][name]:,}")
        if not flags.check:
            return record | {"differences": None, "run": str(folder)}
        tolerance = Tolerance(*flags.tolerance)
        model.to(device)
        images = [[image.to(device) for image in batch] for batch in batches]
        threshold = _threshold(model, images[0])
        differences: dict[Format, list[Difference]] = {}
        for form in formats:
            exported, _ = load_exported(
                folder,
                method_of=lambda package: method,
                runtime=form,
                device=device,
                configured=lambda stored: _at(stored, threshold),
            )
            model.config = _at(config, threshold)
            differences[form] = [compare(model, exported.to(device), batch) for batch in images]
            model.config = config
        record |= {
            "tolerance": asdict(tolerance),
            "score_threshold": threshold,
            "differences": {form: [asdict(difference) for difference in each] for form, each in differences.items()},
        }
        run_folder.write("results.json", record)
        _say(differences)
        _judge(differences, tolerance)
        runtime = "" if "onnx" in formats else ", runtime='torch'"
        logger.info("in Python: Predictor.from_export('%s'%s)('photo.jpg')", folder, runtime)
        return record | {"run": str(folder)}


def generated(config: Any, seed: int, *, dynamic: bool) -> list[list[Tensor]]:
    """Shapes to compare on: one image that lies, then two that stand; at least about the network's size.

    Where sizes are fixed, one image that becomes the network's input without a change of size.
    """
    if not dynamic:
        height, width = config.test_size
        image, _ = ShapesDataset(1, split="val", seed=seed, size=max(height, width))[0]
        return [[image[:, :height, :width]]]
    side = max(64, round(min(config.test_size) * 4 / 3))
    cut = round(side * 3 / 4)
    shapes = ShapesDataset(3, split="val", seed=seed, size=min(side, 4096))
    first, second, third = (shapes[i][0] for i in range(3))
    return [[first[:, :cut]], [second[:, :, :cut], third[:, :, :cut]]]


def _model(method: Method, call: Call) -> tuple[Any, WeightsInfo]:
    """The model in eval mode and what its weights say; with random parameters where there are no weights."""
    flags = call.flags
    if flags.weights is not None:
        state, info = load_weights(flags.weights, package=method.name)
        config = call.on_top_of(config_from_dict(method.config_type, info.config, f"{flags.weights}: config"))
        model = method.build(config)
        load_into(model, state, info)
        return model.eval(), info
    logger.warning("no --weights: the exported network has random parameters, good for measuring a runtime only")
    torch.manual_seed(flags.seed)
    config = call.config
    categories = tuple((number, f"class {number}") for number in range(config.num_classes))
    info = WeightsInfo(
        package=method.name, variant=flags.variant, config=asdict(config), categories=categories, source="random"
    )
    return method.build(config).eval(), info


def _at(config: Any, threshold: float) -> Any:
    return with_field(config, "inference.score_threshold", threshold)


def _threshold(model: Any, images: list[Tensor]) -> float:
    """The config's score threshold, or a lower one that lets enough detections through to be compared.

    Raises:
        CheckFailed: the model finds nothing at any threshold.
    """
    config = model.config
    threshold: float = config.inference.score_threshold
    count = 0
    with _remembered(model):
        for _ in range(NUM_STEPS):
            model.config = _at(config, threshold)
            count = sum(len(found) for found in model.detect(images, masks=False))
            if count >= ENOUGH:
                break
            threshold *= STEP
    model.config = config
    if count == 0:
        raise CheckFailed(
            "the model finds nothing to compare in the test images",
            "name pictures with --image that it finds something in, or add --no-check",
        )
    return threshold


@contextmanager
def _remembered(model: Any) -> Iterator[None]:
    """The network runs once; later calls, on the same images, get what it said."""
    network = model.raw_outputs
    said: list[Any] = []

    def once(pixels: Tensor) -> Any:
        if not said:
            said.append(network(pixels))
        return said[0]

    object.__setattr__(model, "raw_outputs", once)
    try:
        yield
    finally:
        object.__setattr__(model, "raw_outputs", network)


def _say(differences: dict[Format, list[Difference]]) -> None:
    logger.info(
        "%-6s %-18s %9s %8s %11s %11s %11s",
        *("format", "input", "instances", "unpaired"),
        *("boxes, px", "scores", "masks"),
    )
    for form, each in differences.items():
        for one in each:
            shape = " x ".join(map(str, (one.input_shape[0], *one.input_shape[2:])))
            logger.info(
                "%-6s %-18s %9d %8d %11.2g %11.2g %11.2g",
                *(form, shape, one.detections, one.unpaired, one.boxes, one.scores, one.masks),
            )
            outputs = ", ".join(f"{name} {value:.2g}" for name, value in one.outputs.items())
            logger.debug("       largest differences of the outputs: %s", outputs)


def _judge(differences: dict[Format, list[Difference]], tolerance: Tolerance) -> None:
    """Raises CheckFailed with the numbers of the worst batch, unless all of them hold."""
    for form, each in differences.items():
        for one in each:
            if not one.holds(tolerance):
                raise CheckFailed(
                    f"{NETWORKS[form]} differs from the model on an input of {one.input_shape}:"
                    f" boxes by {one.boxes:.2g} px (allowed {tolerance.boxes:.2g}),"
                    f" masks in {one.masks:.2g} of the pixels ({tolerance.masks:.2g}),"
                    f" scores by {one.scores:.2g} ({tolerance.scores:.2g}),"
                    f" {one.unpaired} of {one.detections} detections without a partner (0)",
                    "do not deploy it; another --opset or --deformable may help, --tolerance allows larger differences",
                )
