"""`demo`: trains on generated shapes, evaluates on held-out ones, writes a page."""

from __future__ import annotations

import json
import logging
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2.functional import to_pil_image

from onestage.cli.app import config_record
from onestage.cli.eval import say_metrics
from onestage.cli.flags import Call
from onestage.cli.page import Example, render, run_charts
from onestage.cli.runs import environment, open_run
from onestage.cli.train import options_of, train_in
from onestage.data.synth import ShapesDataset
from onestage.draw import Instances
from onestage.engine import distributed
from onestage.engine.checkpoint import WeightsInfo, load_into, load_weights, save_weights
from onestage.engine.coco_eval import CocoEvaluator
from onestage.engine.evaluate import evaluate
from onestage.engine.journal import read_rows
from onestage.files import write_atomically
from onestage.method import Method

logger = logging.getLogger("onestage")

NUM_TRAIN, NUM_HELD_OUT, NUM_SHOWN = 2000, 100, 12
SHOWN_SCORE = 0.3  # pictures leave out what scores below
LABEL = "generated shapes, not COCO"


def run(method: Method, call: Call) -> dict[str, Any]:
    """Trains the method's demo variant and writes index.html; returns what `--json` prints."""
    flags = call.flags
    distributed.pick_device(flags.device)
    train_set = ShapesDataset(flags.limit or NUM_TRAIN, split="train", seed=flags.seed)
    held_out = ShapesDataset(min(flags.limit or NUM_HELD_OUT, NUM_HELD_OUT), split="val", seed=flags.seed)
    config = replace(call.config, num_classes=len(train_set.categories))
    torch.manual_seed(flags.seed)
    model: Any = method.build(config)
    if method.prepare is not None:
        method.prepare(model, train_set)
    if flags.dry_run:
        return {"dry_run": True}
    info = WeightsInfo(
        package=method.name,
        variant=method.demo_variant,
        config=asdict(config),
        categories=train_set.categories,
        recipe=f"demo: {config.schedule.length} {config.schedule.unit} on generated shapes",
        source=LABEL,
    )
    record = config_record(method, replace(call, config=config))
    with open_run(method.name, "demo", record, output=flags.output, overwrite=flags.overwrite) as run:
        third = math.ceil(config.schedule.length / 3) if config.schedule.unit == "steps" else None
        options = options_of(flags, eval_every=third, save_every=0, log_every=10, eval_batch=10)
        result = train_in(run, method, call, model, config, train_set, held_out, options, info)
        # What is shown and measured are the weights that are kept.
        state, stored = load_weights(result.weights, package=method.name)
        load_into(model, state, info)
        if method.finish is not None:
            logger.info("second stage")
            save_weights(
                result.weights, model.state_dict(), replace(stored, config=asdict(method.finish(model, train_set)))
            )
        if method.finish is not None or result.best_step < result.steps:  # else the last evaluation's
            metrics, results = evaluate(
                model, held_out, batch_size=10, precision=flags.precision, per_class=True, progress=not flags.quiet
            )
            write_atomically(run.folder / "results.json", json.dumps(results).encode())
        else:
            metrics = _metrics_of(run.folder / "results.json", held_out)
        run.write("metrics.json", metrics)
        examples = _examples(model, held_out)
        samples = _write_samples(run.folder / "images", examples)
        commands = _commands(method, result.weights, samples)
        page = run.folder / "index.html"
        html = render(
            title=f"{method.title.partition(':')[0]} on generated shapes",
            lead=(
                f"A small configuration ({config.backbone.name}), trained from random numbers for {result.steps} steps"
                f" of {config.schedule.batch_size} images on {_machine(options.device)}, and evaluated on"
                f" {len(held_out)} images it was not trained on. The numbers say that the whole path works; they say"
                " nothing about photographs."
            ),
            label=LABEL,
            numbers=[
                *([("mask AP", f"{100 * metrics['segm/AP']:.1f}")] if "segm/AP" in metrics else []),
                *_box_numbers(metrics),
                ("training, min", f"{result.seconds / 60:.1f}"),
                ("parameters, million", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"),
            ],
            names=[name for _, name in train_set.categories],
            examples=examples,
            charts=run_charts(read_rows(run.folder / "metrics.jsonl")),
            metrics=metrics,
            commands=commands,
            config=record["model"],
            environment=environment(method.name, "demo"),
        )
        write_atomically(page, html.encode())
        say_metrics(metrics)
        logger.info("page: %s", page.resolve())
        logger.info("next:")
        for what, command in commands:
            logger.info("  # %s\n  %s", what, command.replace("\n", "\n  "))
        return {
            **{name: metrics[name] for name in ("segm/AP", "bbox/AP", "unrefined_bbox/AP") if name in metrics},
            "seconds": round(run.seconds, 1),
            "page": str(page),
            "run": str(run.folder),
        }


def _box_numbers(metrics: dict[str, float]) -> list[tuple[str, str]]:
    after = f"{100 * metrics['bbox/AP']:.1f}"
    if "unrefined_bbox/AP" not in metrics:
        return [("box AP", after)]
    return [("box AP before refinement", f"{100 * metrics['unrefined_bbox/AP']:.1f}"), ("box AP after", after)]


def _metrics_of(results: Path, held_out: Any) -> dict[str, float]:
    """AP, per category too, of the results of the last evaluation."""
    evaluator = CocoEvaluator(held_out.coco_gt(), held_out.categories)
    evaluator.merge(json.loads(results.read_text(encoding="utf-8")))
    return evaluator.summarize(per_class=True)


@torch.no_grad()
def _examples(model: Any, held_out: Any) -> list[Example]:
    model.eval()
    device = next(model.parameters()).device
    examples = []
    for index in range(min(NUM_SHOWN, len(held_out))):
        image, truth = held_out[index]
        found = model.detect([image.to(device)])[0].to("cpu")
        found = found[found.scores >= SHOWN_SCORE]
        masks = None if found.masks is None else found.masks.to_bool()
        examples.append(
            Example(
                image,
                Instances(truth.boxes, truth.labels, truth.masks.bool()),
                Instances(found.boxes, found.labels, masks, found.scores, found.unrefined_boxes),
            )
        )
    return examples


def _write_samples(folder: Path, examples: list[Example]) -> Path:
    """Some held-out images as files, so that `predict` has something to look at."""
    folder.mkdir(exist_ok=True)
    for number, example in enumerate(examples):
        to_pil_image(example.image).save(folder / f"{number:03d}.png")
    return folder


def _commands(method: Method, weights: Path, samples: Path) -> list[tuple[str, str]]:
    name, weights_, samples_ = method.name, shlex.quote(str(weights)), shlex.quote(str(samples))
    return [
        (
            "Find instances in images: here held-out ones of this run; a photograph or a pattern works too",
            f"python -m {name}.predict {samples_} --weights {weights_}",
        ),
        (
            "Write a data set in COCO format to disk, train on it and evaluate; your own data set goes in its place",
            f"python -m onestage.synth shapes\n"
            f"python -m {name}.train --data shapes --small --size 128 --epochs 5\n"
            f"python -m {name}.eval --data shapes --weights {weights_}",
        ),
        ("What these weights are", f"python -m {name}.info {weights_}"),
    ]


def _machine(device: str) -> str:
    if distributed.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads != 1 else ''}"
