"""`train`: from flags to `engine.train`."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onestage.cli.app import config_record
from onestage.cli.datasets import open_split, open_videos, say_skipped
from onestage.cli.flags import Call
from onestage.cli.runs import Run, checkpoint_to_resume, open_run
from onestage.config import config_from_dict, for_trunk
from onestage.data.ytvis import FramePairs
from onestage.engine import distributed
from onestage.engine.checkpoint import WeightsInfo, load_checkpoint, load_into, load_weights
from onestage.engine.evaluate import evaluate, evaluate_videos
from onestage.engine.train import Interrupted, TrainOptions, TrainResult, fraction, train
from onestage.errors import DatasetError, MachineError, UsageError, some
from onestage.method import Method
from onestage.nn.imagenet import load_imagenet

logger = logging.getLogger("onestage")

OVERFIT_STEPS = 200


def run(method: Method, call: Call) -> dict[str, Any]:
    """Trains and returns what `--json` prints."""
    device = distributed.start(call.flags.device)
    if not distributed.rank_zero():
        logger.setLevel(logging.WARNING)
    with distributed.left_together():
        return _replay(method, call, device) if call.flags.replay is not None else _train(method, call)


def options_of(flags: Any, **more: Any) -> TrainOptions:
    """The engine's options among the flags."""
    return TrainOptions(
        device=flags.device,
        precision=flags.precision,
        seed=flags.seed,
        deterministic=flags.deterministic,
        workers=flags.workers,
        progress=not flags.quiet,
        **more,
    )


def train_in(
    run: Run,
    method: Method,
    call: Call,
    model: nn.Module,
    config: Any,
    train_set: Any,
    val_set: Any,
    options: TrainOptions,
    info: WeightsInfo,
    callback: Callable[[dict[str, Any]], None] | None = None,
    resumed: Callable[[], None] | None = None,
) -> TrainResult:
    """Runs `engine.train` in an open run folder; an interruption says how to go on and leaves with 130 or 143."""
    score = evaluate_videos if method.is_video(config) else evaluate
    try:
        settings: dict[str, Any] = {"info": info, "callback": callback, "evaluate": score, "resumed": resumed}
        return train(model, config, train_set, val_set, options, run.folder, **settings)
    except Interrupted as stopped:
        logger.info("%s", stopped)
        if call.verb == "train":
            go_on = f"{method.name}.train --resume {shlex.quote(str(stopped.checkpoint))}"
            logger.info("go on with: %s -m %s", launcher(), go_on)
        else:
            logger.info("a %s is not resumed: it starts anew", call.verb)
        raise SystemExit(stopped.exit_code) from stopped


def launcher() -> str:
    """What starts as many processes as there are: `python`, or a torchrun."""
    world, local = distributed.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    if world == 1:
        return "python"
    if world == local:
        return f"torchrun --standalone --nproc-per-node {world}"
    endpoint = f"--rdzv-backend c10d --rdzv-endpoint {os.environ['MASTER_ADDR']}"
    return f"torchrun --nnodes {world // local} --nproc-per-node {local} {endpoint}"


def _train(method: Method, call: Call) -> dict[str, Any]:
    flags = call.flags
    summary_writer = _summary_writer() if "tensorboard" in flags.log else None
    checkpoint = None if flags.resume is None else checkpoint_to_resume(method.name, flags.resume, flags.output)
    state, info = None, None
    if checkpoint is not None:  # its tensors are the engine's to read; what the run started from is not needed
        info = WeightsInfo.from_json(load_checkpoint(checkpoint)["info"])
    elif flags.weights is not None:
        if flags.weights_backbone is not None:
            raise UsageError("--weights and --weights-backbone are both given", "weights hold the trunk too: drop one")
        state, info = load_weights(flags.weights, package=method.name)
    elif flags.head == "reinit":
        raise UsageError("--head reinit is for --weights, and none are given", "add --weights FILE, or leave it away")
    config = _config(method, call, info, str(checkpoint or flags.weights))
    train_set, val_set = _data(method, call, config)
    count = len(train_set.categories)
    if "model.num_classes" in call.given and call.config.num_classes != count:
        raise UsageError(
            f"--model.num-classes is {call.config.num_classes}, the data set has {count} categories", "leave it away"
        )
    config = replace(config, num_classes=count)
    if flags.overfit is not None:
        config = _by_heart(config, flags)

    torch.manual_seed(flags.seed)
    model = method.build(config)
    if state is not None and info is not None:
        restarted = load_into(
            model, state, info, head=flags.head, categories=train_set.categories, dataset=str(flags.data or "")
        )
        if restarted:
            logger.info("new head: %s start anew", some(restarted))
    elif checkpoint is None:
        trunk: Any = model.backbone
        for note in load_imagenet(trunk, flags.weights_backbone) if flags.weights_backbone else ():
            logger.info("%s", note)
        if method.prepare is not None:
            method.prepare(model, train_set)
    card = WeightsInfo(
        package=method.name,
        variant=flags.variant,
        config=asdict(config),
        categories=train_set.categories,
        recipe=f"{config.schedule.length} {config.schedule.unit}, batch {config.schedule.batch_size}",
        source=str(flags.data or flags.train_json or "COCO_ROOT"),
    )
    record = config_record(method, replace(call, config=config))
    if flags.dry_run:
        logger.info("dry run: model, data and settings fit together; nothing was written")
        return {"dry_run": True, "train_images": len(train_set), "val_images": len(val_set) if val_set else 0}

    options = options_of(
        flags,
        accumulate=flags.accumulate,
        sync_bn=flags.sync_bn,
        compile=flags.compile,
        eval_every=flags.eval_every,
        save_every=flags.save_every,
        log_every=flags.log_every,
        nan_policy=flags.nan_policy,
        resume=checkpoint,
    )
    output = flags.output if checkpoint is None or flags.output is not None else checkpoint.parent
    keep = checkpoint is not None
    with (
        _common_run(method.name, record, output=output, overwrite=flags.overwrite, keep=keep) as run,
        _curves(summary_writer, run.folder / "tensorboard") as callback,
    ):
        result = train_in(run, method, call, model, config, train_set, val_set, options, card, callback, run.describe)
        num_skipped = say_skipped(train_set, val_set)
        _say_what_next(method, flags, config, result)
        return _result(result) | {"bad_samples": num_skipped, "run": str(run.folder)}


@contextmanager
def _common_run(package: str, record: dict[str, Any], **where: Any) -> Iterator[Run]:
    """One run folder for all processes: the first chooses it and writes in it."""
    if distributed.rank_zero():
        with open_run(package, "train", record, **where) as run:
            distributed.broadcast(str(run.folder))
            yield run
    else:
        yield Run(Path(distributed.broadcast(None)))


def _summary_writer() -> Any:
    """TensorBoard's writer, where that library is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MachineError(
            "--log tensorboard needs a library that is not installed", "pip install tensorboard, or leave --log away"
        ) from error
    return SummaryWriter


@contextmanager
def _curves(writer: Any, folder: Path) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """What hands rows of metrics on to a `writer`; None without one."""
    if writer is None or not distributed.rank_zero():
        yield None
        return
    with writer(str(folder)) as curves:

        def write(row: dict[str, Any]) -> None:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    curves.add_scalar(name, value, row["step"])

        yield write


def _config(method: Method, call: Call, info: WeightsInfo | None, file: str) -> Any:
    """The config to train: that of weights or a checkpoint where there are some, else with a trunk that can learn."""
    flags, config = call.flags, call.config
    if info is not None:
        stored = call.on_top_of(config_from_dict(method.config_type, info.config, f"{file}: config"))
        return replace(stored, schedule=config.schedule)
    if flags.weights_backbone is not None:
        if not Path(flags.weights_backbone).is_file():
            logger.info("%s: stride in the 3x3 convs, RGB, torchvision's mean and std", flags.weights_backbone)
    elif config.backbone.norm != "train" or config.backbone.frozen_stages:
        logger.info("no --weights or --weights-backbone: the trunk starts from random numbers, all of it learns")
    return for_trunk(config, flags.weights_backbone)


def _by_heart(config: Any, flags: Any) -> Any:
    """For --overfit: no augmentation, and steps enough where no length is given; an epoch is a step or two there."""
    schedule = config.schedule
    if flags.epochs is None and flags.steps is None:
        batch = min(schedule.batch_size, max(1, flags.overfit // 2))
        schedule = replace(schedule, unit="steps", length=OVERFIT_STEPS, milestones=(), batch_size=batch)
    return replace(config, schedule=schedule, input=replace(config.input, augmentation="none"))


def _data(method: Method, call: Call, config: Any) -> tuple[Any, Any]:
    flags, video = call.flags, method.is_video(config)
    train_set: Any
    if video:
        train_set = FramePairs(open_videos(call, "train"), min_size=config.schedule.min_size)
    else:
        train_set = open_split(call, "train", config.schedule, method.polygons)
    if flags.overfit is not None:
        train_set = train_set.subset(range(min(flags.overfit, len(train_set))))
        return train_set, train_set.own_videos() if video else train_set
    val_set: Any = open_videos(call, "val") if video else open_split(call, "val")
    # By name: evaluation finds the ids that the validation data have for them.
    names = [[name for _, name in dataset.categories] for dataset in (train_set, val_set)]
    if sorted(names[0]) != sorted(names[1]):
        raise DatasetError(
            f"training data have the categories {some(names[0])}, validation data {some(names[1])}",
            "use the same list of categories in both files",
        )
    return train_set, val_set


def _replay(method: Method, call: Call, device: torch.device) -> dict[str, Any]:
    from onestage.engine.guard import info_of_crash, replay

    path = call.flags.replay
    config: Any = config_from_dict(method.config_type, info_of_crash(path).config, f"{path}: config")
    seen = replay(path, method.build(config), device)
    for name, value in seen.losses.items():
        logger.info("%-20s %g", name, value)
    logger.info("first layer whose output is not finite: %s", seen.first_layer or "none")
    return {"step": seen.step, "losses": {k: str(v) for k, v in seen.losses.items()}, "first_layer": seen.first_layer}


def _say_what_next(method: Method, flags: Any, config: Any, result: TrainResult) -> None:
    logger.info(
        "done: %d steps in %.0f s; best weights (step %d): %s",
        result.steps,
        result.seconds,
        result.best_step,
        result.weights,
    )
    for name in ("bbox/AP", "segm/AP"):
        if name in result.best_metrics:
            logger.info("  %s %s", name, fraction(result.best_metrics[name]))
    logger.info("next:")
    if flags.data is not None:
        logger.info(
            "  python -m %s.eval --data %s --weights %s", method.name, shlex.quote(str(flags.data)), result.weights
        )
    look = "track VIDEO" if method.is_video(config) else "predict IMAGE"
    logger.info("  python -m %s.%s --weights %s", method.name, look, result.weights)


def _result(result: TrainResult) -> dict[str, Any]:
    return dict(result.best_metrics) | {
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "weights": str(result.weights),
        "checkpoint": str(result.checkpoint),
    }
