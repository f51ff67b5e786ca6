"""AP of a model over a data set of images or of videos, shared between processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from onestage.config import InputConfig
from onestage.data.loader import InstanceDataset, leave_sigterm, make_loader
from onestage.data.ytvis import Videos
from onestage.engine import distributed
from onestage.engine.coco_eval import Backend, CocoEvaluator
from onestage.engine.guard import autocast
from onestage.engine.ytvis_eval import VideoEvaluator
from onestage.errors import DatasetError, UsageError, UserError
from onestage.ops.nms import greedy_nms
from onestage.structures import Detections


def evaluate(
    model: Any,
    dataset: InstanceDataset,
    *,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    workers: int = 0,
    batch_size: int = 1,
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: Sequence[int] = (1, 10, 100),
    per_class: bool = False,
    categories: Sequence[tuple[int, str]] | None = None,
    backend: Backend = "pycocotools",
    tta: bool = False,
    progress: bool = True,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Runs `model.detect` over the images and scores what it finds as COCO does.

    With several processes each takes every n-th image; all return the same.

    Args:
        model: With `detect(images)`; in any mode, which it keeps.
        dataset: As CocoDataset: images, `image_ids`, `categories`, `coco_gt()`.
        device: Where the model is moved; None leaves it where it is.
        precision: fp32, bf16 or fp16.
        workers: Processes that read images.
        batch_size: Images per forward pass.
        iou_types: bbox, segm; the second is left out where detections have no masks.
        max_dets: Detections per image that count.
        per_class: Also AP for each category.
        categories: (id, name) of the labels the model gives; None: the data set's.
        backend: What counts.
        tta: Test-time augmentation: look at mirror images too (`detect_twice`).
        progress: Show a bar on stderr.

    Returns:
        Metrics by name, such as "segm/AP", and the results in COCO's JSON form. Of a model that refines boxes,
        "unrefined_bbox/AP" and so on say how good they were before.

    Raises:
        DatasetError: no images.
        UsageError: masks alone are asked for, and the model finds none.
    """
    if len(dataset) == 0:
        raise DatasetError("the data set to evaluate on has no images", "check the annotations and their folder")
    labels, gt = categories or dataset.categories, dataset.coco_gt()
    evaluator = CocoEvaluator(gt, labels, iou_types, max_dets, backend)
    before = CocoEvaluator(gt, labels, ("bbox",), max_dets, backend)
    if device is not None:
        model.to(device)
    where = next(model.parameters()).device
    loader = make_loader(
        dataset,
        InputConfig(augmentation="none"),
        batch_size=batch_size,
        training=False,
        workers=workers,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    bar = _progress(-(-len(dataset) // distributed.world_size()), "image", progress)
    detect = partial(detect_twice, model) if tta else model.detect
    was_training = model.training
    model.eval()
    with bar, torch.no_grad(), autocast(where, precision):
        for images, targets in loader:
            found = detect([image.to(where, non_blocking=True) for image in images])
            for target, detections in zip(targets, found, strict=True):
                evaluator.add(target.image_id, detections)
                if detections.unrefined_boxes is not None and "bbox" in iou_types:
                    before.add(target.image_id, replace(detections, boxes=detections.unrefined_boxes, masks=None))
            bar.update(len(images))
    model.train(was_training)
    if distributed.world_size() > 1:
        for part in (evaluator, before):
            for results in distributed.gather(part.results()):
                part.merge(results)
    metrics = None
    if distributed.rank_zero():
        metrics = evaluator.summarize(per_class)
        if before.results():
            metrics |= {f"unrefined_{name}": value for name, value in before.summarize().items()}
    metrics = distributed.broadcast(metrics)
    if not metrics:
        raise UsageError("the model finds boxes and no masks", "evaluate --iou-types bbox")
    return metrics, evaluator.results()


def detect_twice(model: Any, images: Sequence[Tensor]) -> list[Detections]:
    """What a model finds in images and in their mirror images, of both the best that NMS within classes leaves.

    Args:
        model: With `detect(images)`, its `config.inference` says which NMS; in eval mode.
        images: [3, H, W] each.

    Returns:
        One for each image, on the CPU.
    """
    rules = model.config.inference
    merged = []
    for found, mirrored in zip(model.detect(images), model.detect([image.flip(-1) for image in images]), strict=True):
        both = Detections.cat((found.to("cpu"), mirrored.to("cpu").mirrored()))
        keep = greedy_nms(both.boxes, both.scores, both.labels, rules.iou_threshold)
        merged.append(both[keep[: rules.max_detections]])
    return merged


def evaluate_videos(
    model: Any,
    dataset: Videos,
    *,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    workers: int = 0,
    batch_size: int = 1,
    max_dets: Sequence[int] = (1, 10, 100),
    per_class: bool = False,
    categories: Sequence[tuple[int, str]] | None = None,
    progress: bool = True,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Runs `model.detect` over the frames, follows objects with `model.tracker()` and scores the tracks.

    With several processes each takes every n-th video; all return the same.

    Args:
        model: With `detect(images)`, whose detections have what its `tracker()` needs; in any mode, which it keeps.
        dataset: `VideoDataset` or `ClipsDataset`.
        device: Where the model is moved; None leaves it where it is.
        precision: fp32, bf16 or fp16.
        workers: Processes that read frames.
        batch_size: Frames per forward pass, all of one video.
        max_dets: Tracks per video that count.
        per_class: Also AP for each category.
        categories: (id, name) of the labels the model gives; None: the data set's.
        progress: Show a bar on stderr.

    Returns:
        Metrics by name as in `VideoEvaluator.summarize`, and the results in YouTube-VIS submission form.
    """
    if len(dataset) == 0:
        raise DatasetError("the data set to evaluate on has no videos", "check the annotations and their folder")
    evaluator = VideoEvaluator(dataset, categories or dataset.categories, max_dets)
    if device is not None:
        model.to(device)
    where = next(model.parameters()).device
    own = range(distributed.rank(), len(dataset), distributed.world_size())
    bar = _progress(sum(dataset.videos[index].num_frames for index in own), "frame", progress)
    was_training = model.training
    model.eval()
    with bar, torch.no_grad(), autocast(where, precision):
        for index in own:
            tracker = model.tracker()
            followed: list[Detections] = []
            for frames in _frames_of(dataset, index, batch_size, workers):
                for found in model.detect([frame.to(where, non_blocking=True) for frame in frames]):
                    followed.append(tracker.update(found).to("cpu"))
                bar.update(len(frames))
            evaluator.add(index, followed)
    model.train(was_training)
    if distributed.world_size() > 1:
        for results in distributed.gather(evaluator.results()):
            evaluator.merge(results)
    metrics = evaluator.summarize(per_class) if distributed.rank_zero() else None
    return distributed.broadcast(metrics), evaluator.results()


def _frames_of(dataset: Videos, video: int, batch_size: int, workers: int) -> Iterator[list[Tensor]]:
    """The frames of one video in order, some at a time."""
    loader = DataLoader(
        _Frames(dataset, video),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_sigterm,
    )
    for frames in loader:
        for frame in frames:
            if isinstance(frame, UserError):
                raise frame
        yield frames


class _Frames(Dataset):
    """One video's frames by number; an error is handed on, as torch would make text of one raised in a worker."""

    def __init__(self, dataset: Videos, video: int):
        self.dataset = dataset
        self.video = video

    def __len__(self) -> int:
        return self.dataset.videos[self.video].num_frames

    def __getitem__(self, number: int) -> Tensor | UserError:
        try:
            return self.dataset.frame(self.video, number)
        except UserError as error:
            return error


def _progress(total: int, unit: str, shown: bool) -> tqdm:
    return tqdm(
        total=total,
        desc="evaluate",
        unit=unit,
        disable=not (shown and distributed.rank_zero()),
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
