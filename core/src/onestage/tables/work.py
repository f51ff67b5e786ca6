"""One training and everything that is evaluated on its weights, in a process of its own.

`python -m onestage.tables.work FILE` does what the job in FILE says; `reproduce` writes the files and starts the
processes. A training that was interrupted goes on where it stopped, and an entry that has its record is left alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from onestage.builders import build_model
from onestage.data.clips import ClipsDataset
from onestage.data.coco import CocoDataset
from onestage.data.synth import ShapesDataset
from onestage.data.ytvis import FramePairs, VideoDataset
from onestage.draw import Instances, draw
from onestage.engine import distributed
from onestage.engine.checkpoint import WeightsInfo, load_into, load_weights
from onestage.engine.evaluate import evaluate, evaluate_videos
from onestage.engine.guard import autocast
from onestage.engine.train import Interrupted, TrainOptions, train
from onestage.errors import UserError
from onestage.files import file_digest, write_atomically
from onestage.tables.plan import Entry, Job, Settings, data_of, splits_of, weights_of
from onestage.tables.record import read_records, write_record

NUM_PICTURES = 3  # images whose masks are shown side by side
SHOWN_WIDTH = 240  # px of a picture
SHOWN_SCORE = 0.3  # pictures leave out what scores below
TIMED, WARM_UP = 30, 3  # images whose latency is measured, and before them
CURVE_POINTS = 60  # of a training curve in a record

LOG = logging.getLogger("onestage")


@dataclass(frozen=True)
class Trained:
    """Weights and how they came about.

    Args:
        weights: Their file.
        about: For the record: steps, seconds, curve, hash.
    """

    weights: Path
    about: dict[str, Any]


def work(job: Job) -> None:
    """Trains unless that has been done, evaluates every row that has no record, and writes the records.

    Raises:
        UserError: as training and evaluation do.
        SystemExit: a signal arrived; the training is saved and goes on with the same job.
    """
    device = distributed.start(job.settings.device)
    output = Path(job.output)
    finished = {record["key"] for record in read_records(output / "records") if "key" in record}
    entries = [entry for entry in job.entries() if entry.key not in finished]
    if not entries:
        return
    train_set, val_set = open_data(entries[0], job.settings)
    trained = None
    if entries[0].row.measure is None:
        trained = given(entries[0], job.settings) if job.settings.weights else training(entries[0], job, train_set)
    for entry in entries:
        started = datetime.now(timezone.utc)
        begin = time.perf_counter()
        config = replace(entry.config, num_classes=len(train_set.categories))
        if entry.row.measure is not None:
            ours, pictures = dict(entry.row.measure(config, train_set, val_set)), dict[str, list[str]]()
        else:
            assert trained is not None
            ours, pictures = evaluated(entry, config, trained, train_set, val_set, job, device)
        if not distributed.rank_zero():
            continue
        seconds = time.perf_counter() - begin
        body = {
            "kind": "accuracy",
            "key": entry.key,
            "package": entry.method.name,
            "table": entry.table.number,
            "row": entry.row.name,
            "profile": job.settings.profile,
            "label": job.settings.label,
            "departures": job.settings.departures,
            "seed": job.seed,
            "ours": ours,
            "data": data_of(entry.table, job.settings)
            | {"train_images": len(train_set), "val_images": len(val_set), "categories": len(val_set.categories)},
            "training": None if trained is None else trained.about,
            "training_key": entry.training,
            "pictures": pictures,
            "time": {"started": started.isoformat(timespec="seconds"), "seconds": round(seconds, 1)},
        }
        # The key too: other data or weights with the same configuration are another record.
        row = f"{job.settings.profile}-{entry.method.name}-{entry.table.session}-{entry.row.name}"
        write_record(output / "records", f"{row}-seed{job.seed}-{entry.key[:8]}", asdict(config), body, job.command)


def open_data(entry: Entry, settings: Settings) -> tuple[Any, Any]:
    """Training and validation data of an entry; of a model that follows objects, pairs of frames and videos."""
    video, schedule = entry.method.is_video(entry.config), entry.config.schedule
    train_set: Any
    val_set: Any
    if settings.profile == "smoke":
        size, (train, val) = data_of(entry.table, settings)["size"], settings.counts(entry.table.data)
        if video:
            clips = ClipsDataset(train, split="train", size=size)
            return FramePairs(clips, min_size=0), ClipsDataset(val, split="val", size=size)
        difficulty = settings.difficulty
        return (
            ShapesDataset(train, split="train", size=size, difficulty=difficulty),
            ShapesDataset(val, split="val", size=size, difficulty=difficulty),
        )
    splits = splits_of(entry.table, settings)
    train_at, val_at = splits["train"], splits["val"]
    if video:
        train_set, val_set = VideoDataset(train_at.json, train_at.images), VideoDataset(val_at.json, val_at.images)
    else:
        dropping = {"drop_empty": schedule.drop_empty, "min_size": schedule.min_size}
        train_set = CocoDataset(train_at.json, train_at.images, polygons=entry.method.polygons, **dropping)
        val_set = CocoDataset(val_at.json, val_at.images)
    if settings.limit is not None:
        train_set, val_set = (part.subset(range(min(settings.limit, len(part)))) for part in (train_set, val_set))
    return FramePairs(train_set, min_size=schedule.min_size) if video else train_set, val_set


def given(entry: Entry, settings: Settings) -> Trained:
    """The weights that the settings name."""
    path = weights_of(entry.method, entry.table, entry.row, settings)
    _, info = load_weights(path, package=entry.method.name)
    about = {"weights": path.name, "weights_sha256": file_digest(path), "steps": info.steps, "recipe": info.recipe}
    return Trained(path, about)


def training(entry: Entry, job: Job, train_set: Any) -> Trained:
    """Trains the entry's configuration, or takes up or over what an earlier process left."""
    folder = Path(job.output) / "trainings" / f"{entry.method.name}-{entry.training[:12]}"
    done = folder / "trained.json"
    if done.is_file():
        return Trained(folder / "best.safetensors", json.loads(done.read_text(encoding="utf-8")))
    config = replace(entry.config, num_classes=len(train_set.categories))
    torch.manual_seed(job.seed)
    model = build_model(entry.method, config, weights_backbone=job.settings.weights_backbone)
    if entry.method.prepare is not None:
        entry.method.prepare(model, train_set)
    options = TrainOptions(
        device=job.settings.device,
        precision=job.settings.precision,
        seed=job.seed,
        workers=job.settings.workers,
        accumulate=job.settings.accumulate,
        log_every=10 if job.settings.profile == "smoke" else 50,
        save_every=0 if job.settings.profile == "smoke" else None,  # minutes long: when it ends or is told to stop
        resume=folder / "last.ckpt" if (folder / "last.ckpt").is_file() else None,
    )
    schedule = config.schedule
    length = f"{schedule.length} {schedule.unit} of batch {schedule.batch_size}"
    info = WeightsInfo(
        package=entry.method.name,
        config=asdict(config),
        categories=tuple(train_set.categories),
        recipe=f"{entry.table.title}, {entry.row.name}: {length}",
        source=job.settings.label or str(data_of(entry.table, job.settings)["name"]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = train(model, config, train_set, None, options, folder, info=info)
    except Interrupted as stopped:
        LOG.info("%s", stopped)
        raise SystemExit(stopped.exit_code) from stopped
    about: dict[str, Any] = {
        "folder": folder.name,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "batch_size": schedule.batch_size,
        "curve": loss_curve(folder / "metrics.jsonl") if distributed.rank_zero() else [],
        "weights": result.weights.name,
    }
    if torch.cuda.is_available():
        about["peak_memory"] = torch.cuda.max_memory_allocated()
    if distributed.rank_zero():
        about["weights_sha256"] = file_digest(result.weights)
        write_atomically(done, json.dumps(about).encode())
        if job.settings.profile == "smoke":
            result.checkpoint.unlink()  # the optimiser's state; nobody goes on from here
    distributed.barrier()
    return Trained(result.weights, about)


def evaluated(
    entry: Entry, config: Any, trained: Trained, train_set: Any, val_set: Any, job: Job, device: torch.device
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """What the entry's configuration finds with the weights, by column, and the files of pictures: found and truth."""
    settings = job.settings
    state, info = load_weights(trained.weights, package=entry.method.name)
    model: Any = entry.method.build(config)
    # What a second stage trains may have another shape in every row.
    load_into(model, state, info, head="reinit" if entry.row.finish else "match", categories=val_set.categories)
    model.to(device)
    if entry.row.finish and entry.method.finish is not None:
        entry.method.finish(model, train_set)
    model.eval()
    options: dict[str, Any] = {
        "device": device,
        "precision": settings.precision,
        "workers": settings.workers or 0,
        "batch_size": 10 if settings.profile == "smoke" else 1,
        "progress": job.alone,
    }
    if entry.method.is_video(config):
        metrics, results = evaluate_videos(model, val_set, **options)
        metrics = {name.replace("segm/", "vis/"): value for name, value in metrics.items()}
    else:
        metrics, results = evaluate(model, val_set, **options)
    if settings.profile == "full":
        if distributed.rank_zero():  # as evaluation servers take them, whose annotations nobody else has
            write_atomically(Path(job.output) / "results" / f"{entry.key[:12]}.json", json.dumps(results).encode())
        if "seconds" in trained.about:
            metrics["hours"] = trained.about["seconds"] / 3600
        if "peak_memory" in trained.about:
            metrics["memory"] = trained.about["peak_memory"] / 1e9
        if job.alone and settings.processes == 1:
            metrics |= speed(model, val_set, device, settings.precision)
    if not distributed.rank_zero() or not {"segm/AP", "vis/AP"} & set(metrics):  # boxes alone are not drawn
        return metrics, {}
    return metrics, write_pictures(model, entry, val_set, Path(job.output) / "pictures")


@torch.no_grad()
def speed(model: Any, dataset: Any, device: torch.device, precision: str) -> dict[str, float]:
    """Median latency of an image, from pixels to masks in its own size; batch 1, reading the file not counted.

    Of videos, of a frame of the first one, with the tracker's part.
    """
    seconds = []
    videos = hasattr(dataset, "videos")
    tracker = model.tracker() if videos else None
    number = dataset.videos[0].num_frames if videos else len(dataset)
    for index in range(min(TIMED + WARM_UP, number)):
        image = (dataset.frame(0, index) if videos else dataset[index][0]).to(device)
        _wait(device)
        begin = time.perf_counter()
        with autocast(device, precision):
            (found,) = model.detect([image])
        if tracker is not None:
            tracker.update(found)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[WARM_UP:] or seconds)
    return {"fps": 1 / median, "ms": 1000 * median}


@torch.no_grad()
def write_pictures(model: Any, entry: Entry, dataset: Any, folder: Path) -> dict[str, list[str]]:
    """Draws what is found in the first images, or amid the first videos, and the truth; returns both's file names."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    names = [name for _, name in dataset.categories]
    written: dict[str, list[str]] = {"found": [], "truth": []}
    for index in range(min(NUM_PICTURES, len(dataset))):
        image, truth = _shown(dataset, index)
        found = model.detect([image.to(device)])[0].to("cpu")
        found = found[found.scores >= SHOWN_SCORE]
        target = Instances(truth.boxes, truth.labels, truth.masks.bool())
        seen = Instances(found.boxes, found.labels, found.masks.to_bool(), found.scores, found.unrefined_boxes)
        for kind, instances in (("truth", target), ("found", seen)):
            picture = draw(image, instances, names)
            picture.thumbnail((SHOWN_WIDTH, 2 * SHOWN_WIDTH))
            content = io.BytesIO()
            picture.save(content, format="JPEG", quality=84)
            name = f"{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.jpg"  # equal pictures are one file
            write_atomically(folder / name, content.getvalue())
            written[kind].append(name)
    return written


def _shown(dataset: Any, index: int) -> tuple[Any, Any]:
    """Image and target: of videos, the frame in the middle."""
    if not hasattr(dataset, "videos"):
        return dataset[index]
    middle = dataset.videos[index].num_frames // 2
    return dataset.frame(index, middle), dataset.target(index, middle)


def loss_curve(journal: Path) -> list[tuple[int, float]]:
    """(step, total loss) from a run's metrics.jsonl, thinned to CURVE_POINTS."""
    rows = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    stride = -(-len(points) // CURVE_POINTS) or 1
    return [(step, round(loss, 4)) for step, loss in points[::-1][::stride][::-1]]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None, run: Callable[[Job], None] = work) -> int:
    """Does the job in a file; what a user can mend is left beside it in `<file>.error` for `reproduce` to report."""
    path = Path((sys.argv[1:] if argv is None else list(argv))[0])
    LOG.setLevel(logging.INFO)
    if os.environ.get("RANK", "0") == "0":
        LOG.addHandler(logging.StreamHandler(sys.stderr))
    try:
        with distributed.left_together():
            run(Job.read(path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if distributed.rank_zero():
            write_atomically(path.with_suffix(".error"), json.dumps([error.what, error.fix]).encode())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
