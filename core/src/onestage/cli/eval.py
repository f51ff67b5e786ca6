"""`eval`: AP of weights, or of a results file, on a data set."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from onestage.cli.app import config_record
from onestage.cli.datasets import open_split, open_videos, say_skipped
from onestage.cli.flags import Call
from onestage.cli.runs import open_run
from onestage.config import config_from_dict
from onestage.data.validate import read_json
from onestage.engine import distributed
from onestage.engine.checkpoint import load_into, load_weights
from onestage.engine.coco_eval import evaluate_results_file
from onestage.engine.evaluate import evaluate, evaluate_videos
from onestage.engine.ytvis_eval import evaluate_video_results_file
from onestage.errors import UsageError, some
from onestage.files import write_atomically
from onestage.machine import default_workers
from onestage.method import Method

logger = logging.getLogger("onestage")
REPEATED = ("limit", "max_dets", "iou_types", "on_bad_sample", "max_pixels")  # decide what is counted
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


def run(method: Method, call: Call) -> dict[str, Any]:
    """Evaluates and returns the metrics, as `--json` prints them."""
    flags = call.flags
    given = [f"--{name}" for name in ("weights", "results", "seeds") if getattr(flags, name)]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are both given", "leave one of the two away")
    if flags.tta and flags.results is not None:
        raise UsageError("--tta is for weights, and --results are what they are", "leave one of the two away")
    device = distributed.start(flags.device)
    if not distributed.rank_zero():
        logger.setLevel(logging.WARNING)
    with distributed.left_together():
        if flags.seeds:
            return _evaluate_seeds(method, call, device)
        return _evaluate_file(method, call) if flags.results is not None else _evaluate_model(method, call, device)


def say_metrics(metrics: Mapping[str, float]) -> None:
    """Writes the table of metrics for people."""
    columns = [name for name in COLUMNS if any(f"{kind}/{name}" in metrics for kind in ("bbox", "segm"))]
    logger.info("%6s%s", "", "".join(f"{name:>8}" for name in columns))
    for kind in ("unrefined_bbox", "bbox", "segm"):
        if f"{kind}/AP" in metrics:
            values = [metrics.get(f"{kind}/{name}", -1.0) for name in columns]
            logger.info(
                "%6s%s",
                "before" if kind == "unrefined_bbox" else kind,
                "".join(f"{100 * v:8.1f}" if v >= 0 else f"{'-':>8}" for v in values),
            )
    for name, value in metrics.items():
        kind, _, rest = name.partition("/AP/")
        if rest and kind == "segm":
            logger.info("  segm AP %-24s %s", rest, f"{100 * value:.1f}" if value >= 0 else "-")
    if "identity_switches" in metrics:
        logger.info(
            "  %d identity switches on %d objects, which were followed in %.1f %% of their frames",
            metrics["identity_switches"],
            metrics["objects"],
            100 * max(0.0, metrics["frames_followed"]),
        )


def _evaluate_model(method: Method, call: Call, device: torch.device) -> dict[str, Any]:
    flags = call.flags
    state, info = load_weights(flags.weights, package=method.name) if flags.weights else (None, None)
    config = call.config
    if info is not None:
        config = call.on_top_of(config_from_dict(method.config_type, info.config, f"{flags.weights}: config"))
    video = method.is_video(config)
    if video and flags.tta:
        raise UsageError("--tta is for images, and this model follows objects through videos", "leave --tta away")
    dataset: Any = open_videos(call, "val") if video else open_split(call, "val")
    if info is None:
        logger.info("no --weights: %s with random parameters (seed %d); AP will be about 0", flags.variant, flags.seed)
        config = replace(config, num_classes=len(dataset.categories))
    if flags.max_dets[-1] != config.inference.max_detections and flags.max_dets[-1] > 100:
        config = replace(config, inference=replace(config.inference, max_detections=flags.max_dets[-1]))
    torch.manual_seed(flags.seed)
    model = method.build(config)
    if state is not None and info is not None:
        load_into(model, state, info)
    if flags.dry_run:
        logger.info("dry run: model, data and settings fit together; nothing was computed")
        return {"dry_run": True, ("videos" if video else "images"): len(dataset)}
    record = config_record(method, replace(call, config=config))

    def compute() -> tuple[dict[str, float], list[dict[str, Any]]]:
        settings: dict[str, Any] = {
            "device": device,
            "precision": flags.precision,
            "workers": default_workers(device) if flags.workers is None else flags.workers,
            "batch_size": flags.batch_size,
            "max_dets": flags.max_dets,
            "per_class": flags.per_class,
            "categories": None if info is None else info.categories,
            "progress": not flags.quiet,
        }
        if video:
            return evaluate_videos(model, dataset, **settings)
        return evaluate(model, dataset, iou_types=flags.iou_types, backend=flags.backend, tta=flags.tta, **settings)

    if not distributed.rank_zero():
        metrics = dict(compute()[0])
        say_skipped(dataset)
        return metrics
    with open_run(method.name, "eval", record, output=flags.output, overwrite=flags.overwrite) as run:
        metrics, results = compute()
        path = run.folder / "results.json"
        write_atomically(path, _json(results))
        augmentation = {"tta": "flip" if flags.tta else None}
        run.write("metrics.json", metrics | augmentation)
        things, key = ("tracks", "video") if video else ("detections", "image")
        found_in = len({entry[f"{key}_id"] for entry in results})
        logger.info("%d %s in %d of %d %ss: %s", len(results), things, found_in, len(dataset), key, path)
        say_metrics(metrics)
        if flags.tta:
            logger.info("with test-time augmentation: images and their mirror images, merged by NMS")
        num_skipped = say_skipped(dataset)
        if flags.data is not None:
            words = ["--data", str(flags.data), "--results", str(path), *_repeated(call, REPEATED)]
            logger.info("the same numbers from that file: python -m %s.eval %s", method.name, shlex.join(words))
            if not video:
                words = [str(flags.data), "--results", str(path), *_repeated(call, ("limit", "max_pixels"))]
                logger.info("what went wrong, as a page: python -m onestage.explore %s", shlex.join(words))
        return metrics | {
            f"{key}s": len(dataset),
            f"{key}s_with_{things}": found_in,
            things: len(results),
            "bad_samples": num_skipped,
            **augmentation,
            "weights": None if flags.weights is None else str(flags.weights),
            "results": str(path),
            "seconds": round(run.seconds, 1),
            "run": str(run.folder),
        }


def _evaluate_seeds(method: Method, call: Call, device: torch.device) -> dict[str, Any]:
    """Evaluates the weights one after the other, each into a folder of its own; the metrics are means."""
    flags = call.flags
    if len(flags.seeds) < 2:
        raise UsageError("--seeds has one file, which has no spread", "name two or more, or use --weights")
    configs = [load_weights(path, package=method.name)[1].config for path in flags.seeds]
    for path, config in zip(flags.seeds[1:], configs[1:], strict=True):
        other = [name for name in configs[0] if config.get(name) != configs[0][name]]
        if other:
            raise UsageError(
                f"'{path}' and '{flags.seeds[0]}' have different configurations ({some(other)})",
                "give weights that differ in the --seed of their training alone",
            )

    def compute(folder: Path | None) -> list[dict[str, Any]]:
        done = []
        for number, path in enumerate(flags.seeds, 1):
            logger.info("weights %d of %d: %s", number, len(flags.seeds), path)
            output = None if folder is None else folder / str(number)
            single = replace(flags, weights=path, seeds=(), output=output)
            done.append(_evaluate_model(method, replace(call, flags=single), device))
        return done

    if flags.dry_run or not distributed.rank_zero():
        return compute(None)[0]
    record = config_record(method, call)
    with open_run(method.name, "eval", record, output=flags.output, overwrite=flags.overwrite) as run:
        runs = compute(run.folder)
        numbers = [read_json(Path(one["run"], "metrics.json")) for one in runs]
        augmentation = {"tta": numbers[0].pop("tta")}
        metrics = {name: fmean(one[name] for one in numbers) for name in numbers[0]}
        spread = {name: stdev(one[name] for one in numbers) for name in numbers[0]}
        summary = metrics | augmentation | {"seeds": len(runs), "spread": spread}
        run.write("metrics.json", summary)
        logger.info("means of %d trainings:", len(runs))
        say_metrics(metrics)
        for name in ("bbox/AP", "segm/AP"):
            if name in spread:
                each = ", ".join(f"{100 * one[name]:.1f}" for one in numbers)
                logger.info("  %s of each: %s; standard deviation %.2f", name, each, 100 * spread[name])
        return summary | {"runs": [one["run"] for one in runs], "run": str(run.folder)}


def _evaluate_file(method: Method, call: Call) -> dict[str, Any]:
    """Metrics of `--results`; with `--output` they are left there too."""
    flags = call.flags
    if flags.output is not None and flags.results.resolve().parent == flags.output.resolve():
        raise UsageError(f"--output '{flags.output}' is the folder of --results", "name another folder")
    content = read_json(flags.results)
    video = isinstance(content, list) and content and isinstance(content[0], dict) and "video_id" in content[0]
    dataset: Any = open_videos(call, "val") if video else open_split(call, "val")
    counted = {"videos" if video else "images": len(dataset)}
    if flags.dry_run:
        return {"dry_run": True, **counted}

    def compute() -> dict[str, Any]:
        settings: dict[str, Any] = {"max_dets": flags.max_dets, "per_class": flags.per_class}
        metrics: dict[str, Any]
        if video:
            metrics = evaluate_video_results_file(flags.results, dataset, **settings)
        else:
            settings |= {"iou_types": flags.iou_types, "backend": flags.backend}
            metrics = evaluate_results_file(flags.results, dataset.coco_gt(), **settings)
        say_metrics(metrics)
        return metrics

    done = counted | {"results": str(flags.results)}
    if flags.output is None or not distributed.rank_zero():
        return compute() | done
    record = config_record(method, call)
    with open_run(method.name, "eval", record, output=flags.output, overwrite=flags.overwrite) as run:
        metrics = compute()
        run.write("metrics.json", metrics)
        return metrics | done | {"run": str(run.folder)}


def _repeated(call: Call, names: Sequence[str]) -> list[str]:
    """Those of the flags that were given, as words of a command line."""
    words = []
    for name in names:
        if name in call.given:
            value = getattr(call.flags, name)
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _json(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()
