"""COCO AP of a model over a data set, shared between processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from onestage.config import InputConfig
from onestage.data.loader import InstanceDataset, make_loader
from onestage.engine import distributed
from onestage.engine.coco_eval import CocoEvaluator
from onestage.engine.guard import autocast
from onestage.errors import DatasetError


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
    progress: bool = True,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Runs `model.detect` over the images and scores what it finds with pycocotools.

    With several processes each takes every n-th image; all return the same.

    Args:
        model: With `detect(images)`; in any mode, which it keeps.
        dataset: As CocoDataset: images, `image_ids`, `categories`, `coco_gt()`.
        device: Where the model is moved; None leaves it where it is.
        precision: fp32 or bf16.
        workers: Processes that read images.
        batch_size: Images per forward pass.
        iou_types: bbox, segm.
        max_dets: Detections per image that count.
        per_class: Also AP for each category.
        categories: (id, name) of the labels the model gives; None: the data set's.
        progress: Show a bar on stderr.

    Returns:
        Metrics by name, such as "segm/AP", and the results in COCO's JSON form. Of a model that refines boxes,
        "unrefined_bbox/AP" and so on say how good they were before.
    """
    if len(dataset) == 0:
        raise DatasetError("the data set to evaluate on has no images", "check the annotations and their folder")
    labels = categories or dataset.categories
    evaluator = CocoEvaluator(dataset.coco_gt(), labels, iou_types=tuple(iou_types), max_dets=tuple(max_dets))
    before = CocoEvaluator(dataset.coco_gt(), labels, iou_types=("bbox",), max_dets=tuple(max_dets))
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
    bar = tqdm(
        total=-(-len(dataset) // distributed.world_size()),
        desc="evaluate",
        unit="image",
        disable=not (progress and distributed.rank_zero()),
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    was_training = model.training
    model.eval()
    with bar, torch.no_grad(), autocast(where, precision):
        for images, targets in loader:
            found = model.detect([image.to(where, non_blocking=True) for image in images])
            for target, detections in zip(targets, found, strict=True):
                detections = detections.to("cpu")
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
    return distributed.broadcast(metrics), evaluator.results()
