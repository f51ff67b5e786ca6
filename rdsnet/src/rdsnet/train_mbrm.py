"""`python -m rdsnet.train_mbrm --weights FILE`: the stage after training, ten numbers that read box sides off masks."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestage.cli.flags import Call, Data, Switch, Talk, parse_flags
from onestage.errors import UsageError, WeightsError
from rdsnet.config import GAMMAS, REACHES

if TYPE_CHECKING:
    from rdsnet.model import RDSNet

logger = logging.getLogger("onestage")


@dataclass(frozen=True, kw_only=True)
class TrainMBRM(Data, Talk):
    """Trains the mask-based boundary refinement of a trained RDSNet; everything else stays as it is."""

    weights: Path | None = None  # trained RDSNet (required)
    train_json: Path | None = None  # with --train-images, in place of --data
    train_images: Path | None = None
    output: Path | None = None  # default: <weights>_mbrm.safetensors beside them
    overwrite: Switch = False  # replace an existing file
    steps: int = 1000
    lr: float = 0.005
    batch: int = 8  # images of a step
    images: int = 300  # training images whose mask profiles are collected; memory: 100 x (height + width) numbers each
    reach: int = 4  # s: the kernel has 2 s + 1 taps
    gamma: float = 0.05  # standard deviation of the prior, in box sides
    sweep: Switch = False  # also box AP on the val split for a grid of s and gamma, each trained (Figure 5)
    limit: int | None = None  # use the first N images of each split only
    seed: int = 0
    device: str = "auto"


def run(words: list[str]) -> int:
    """Runs the verb with the words after it; returns the exit code."""
    flags = parse_flags(TrainMBRM, words, "python -m rdsnet.train_mbrm")
    output = _checked(flags)
    # The imports are here because these modules load torch.
    from onestage.cli.datasets import open_split
    from onestage.engine.checkpoint import save_weights
    from onestage.engine.distributed import pick_device
    from rdsnet.refine import FitOptions, collect, fit, install

    model, info = _model(flags)
    model.to(pick_device(flags.device))
    call = Call("train_mbrm", flags, frozenset(), None)
    options = FitOptions(steps=flags.steps, lr=flags.lr, batch_size=flags.batch, images=flags.images, seed=flags.seed)
    samples = list(collect(model, open_split(call, "train", model.config.schedule), options))
    logger.info("%d instances of %d images", sum(map(len, samples)), len(samples))
    config = replace(model.config.refine, reach=flags.reach, gamma=flags.gamma)
    weight, bias = fit(samples, config, options)
    install(model, config, weight, bias)
    recipe = f"{info.recipe}; MBRM: {flags.steps} steps, profiles of {len(samples)} images"
    save_weights(output, model.state_dict(), replace(info, config=asdict(model.config), recipe=recipe, metrics={}))
    logger.info("kernel %s, bias %.4f", " ".join(f"{tap:.4f}" for tap in weight.tolist()), float(bias))
    logger.info("wrote %s", output)
    if flags.data is not None:
        data = shlex.quote(str(flags.data))
        logger.info("next: python -m rdsnet.eval --data %s --weights %s", data, shlex.quote(str(output)))
    result: dict[str, Any] = {"weights": str(output), "kernel": weight.tolist(), "bias": float(bias)}
    if flags.sweep:
        rows = _sweep(model, samples, open_split(call, "val"), options, flags.quiet)
        result["sweep"] = rows
        _say(rows)
    if flags.json:
        print(json.dumps(result))
    return 0


def _checked(flags: TrainMBRM) -> Path:
    """Where the result goes, if every flag can be used."""
    if flags.weights is None:
        raise UsageError("no weights given", "python -m rdsnet.train_mbrm --weights FILE --data FOLDER")
    if flags.reach < 0 or flags.gamma < 0:
        raise UsageError(f"--reach {flags.reach} --gamma {flags.gamma}", "neither can be negative")
    output = flags.output or flags.weights.with_name(f"{flags.weights.stem}_mbrm.safetensors")
    if output.exists() and not flags.overwrite:
        raise UsageError(f"'{output}' exists", "add --overwrite, or name another file with --output")
    return output


def _model(flags: TrainMBRM) -> tuple[RDSNet, Any]:
    from onestage.config import config_from_dict
    from onestage.engine.checkpoint import load_into, load_weights
    from rdsnet.config import RDSNetConfig
    from rdsnet.model import RDSNet

    assert flags.weights is not None
    state, info = load_weights(flags.weights, package="rdsnet")
    config = config_from_dict(RDSNetConfig, info.config, str(flags.weights))
    if config.detector != "retinanet" or config.masks != "corr":
        raise WeightsError(
            f"weights '{flags.weights}' have detector '{config.detector}' with masks '{config.masks}'",
            "MBRM refines the boxes of detector 'retinanet' with masks 'corr'",
        )
    model = RDSNet(config)
    load_into(model, state, info)
    return model.eval(), info


def _sweep(model: Any, samples: Any, dataset: Any, options: Any, quiet: bool) -> list[dict[str, float]]:
    """Box AP for every s and gamma; the network runs once over the images."""
    from tqdm import tqdm

    from onestage.engine.coco_eval import CocoEvaluator
    from onestage.ops.edges import refine_boxes
    from rdsnet.refine import fit, observe

    kernels, evaluators = {}, {}
    for reach in REACHES:
        for gamma in (0.0, *GAMMAS):
            config = replace(model.config.refine, reach=reach, gamma=gamma)
            kernels[reach, gamma] = fit(samples, config, options)
            evaluators[reach, gamma] = CocoEvaluator(dataset.coco_gt(), dataset.categories, iou_types=("bbox",))
    device = model.mbrm.bias.device
    for index in tqdm(range(len(dataset)), desc="sweep", disable=quiet, leave=False, file=sys.stderr):
        image, target = dataset[index]
        (seen,) = observe(model, [image.to(device)])
        for (reach, gamma), (weight, bias) in kernels.items():
            boxes = refine_boxes(seen.profiles, seen.boxes, weight.to(device), bias.to(device), gamma)
            evaluators[reach, gamma].add(target.image_id, seen.refined(boxes))
    return [
        {"s": reach, "gamma": gamma, **{key: metrics[f"bbox/{key}"] for key in ("AP", "AP50", "AP75")}}
        for (reach, gamma), evaluator in evaluators.items()
        for metrics in (evaluator.summarize(),)
    ]


def _say(rows: list[dict[str, float]]) -> None:
    logger.info("box AP   %s", "".join(f"gamma {gamma:<6g}" for gamma in (0.0, *GAMMAS)))
    for reach in REACHES:
        logger.info("s = %d    %s", reach, "".join(f"{100 * row['AP']:<12.1f}" for row in rows if row["s"] == reach))


if __name__ == "__main__":
    from rdsnet.__main__ import run_verb

    run_verb("train_mbrm")
