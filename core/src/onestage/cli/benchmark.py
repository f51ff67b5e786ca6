"""`benchmark`: latency by stage, memory, instances per image."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from onestage.cli.app import config_record
from onestage.cli.flags import Call
from onestage.cli.runs import open_run
from onestage.config import config_from_dict, with_field
from onestage.engine import distributed
from onestage.engine.checkpoint import load_into, load_weights
from onestage.engine.guard import autocast
from onestage.engine.network import prepare_network
from onestage.errors import UsageError
from onestage.machine import peak_memory
from onestage.method import Method

logger = logging.getLogger("onestage")


def run(method: Method, call: Call) -> dict[str, Any]:
    """Times the model on random images and returns the record."""
    flags = call.flags
    device = distributed.pick_device(flags.device)
    state, info = load_weights(flags.weights, package=method.name) if flags.weights else (None, None)
    if info is None:
        config = _full_house(method, call.config, flags.seed)
    else:
        config = call.on_top_of(config_from_dict(method.config_type, info.config, f"{flags.weights}: config"))
    torch.manual_seed(flags.seed)
    model: Any = method.build(config)
    if state is not None and info is not None:
        load_into(model, state, info)
    model.to(device).eval()
    height, width = flags.image_size or config.input.test_size
    images = list(torch.rand(flags.batch, 3, height, width, device=device))
    if flags.dry_run:
        return {"dry_run": True}
    if flags.mode != "eager" or flags.channels_last:
        prepare_network(model, mode=flags.mode, channels_last=flags.channels_last)

    ours = lambda: model.detect(images)  # noqa: E731 - three callables of one form
    boxes_only = lambda: model.detect(images, masks=False)  # noqa: E731
    rivals: dict[str, Callable[[], Any]] = {"total": ours, "boxes only": boxes_only}
    with torch.no_grad(), autocast(device, flags.precision):
        has_masks = ours()[0].masks is not None
        if flags.compare == "maskrcnn" and not has_masks:
            raise UsageError("--compare maskrcnn compares masks, and this model finds boxes", "leave --compare away")
        memory = peak_memory(device)  # before a rival takes any
        if flags.compare == "maskrcnn":
            # Both give dense bool masks at image size, the form torchvision's users get.
            rivals["ours, dense masks"] = lambda: [found.masks.to_bool() for found in model.detect(images)]
            rivals["maskrcnn"] = _mask_rcnn(images, config.num_classes, device)
        seconds = _interleaved(rivals, flags.warmup, flags.iters, device)
        # Parts of a compiled or captured network have no time of their own.
        with _timed_children(model if flags.mode == "eager" else nn.Module(), device) as stages:
            num_found = [len(found) for found in ours()]
    total = seconds["total"]
    if has_masks:
        stages["masks"] = median(total) - median(seconds["boxes only"])
    record = {
        "milliseconds": _milliseconds(total),
        "stages": {name: round(1000 * value, 2) for name, value in stages.items()},
        "images_per_second": round(flags.batch / median(total), 2),
        "instances_per_image": sum(num_found) / len(num_found),
        "peak_memory_mib": None if math.isnan(memory) else round(memory / 2**20),
        "image_size": [height, width],
        "batch": flags.batch,
        "precision": flags.precision,
        "mode": flags.mode,
        "channels_last": flags.channels_last,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "weights": None if flags.weights is None else str(flags.weights),
    }
    if flags.compare == "maskrcnn":
        rival, dense = seconds["maskrcnn"], seconds["ours, dense masks"]
        record["maskrcnn_milliseconds"] = _milliseconds(rival)
        record["ours_dense_milliseconds"] = _milliseconds(dense)
        record["times_maskrcnn_speed"] = round(median(rival) / median(dense), 3)
    with open_run(
        method.name,
        "benchmark",
        config_record(method, replace(call, config=config)),
        output=flags.output,
        overwrite=flags.overwrite,
    ) as run_folder:
        run_folder.write("results.json", record)
        _say(record)
        return record | {"run": str(run_folder.folder)}


def _full_house(method: Method, config: Any, seed: int) -> Any:
    """The config whose threshold lets random parameters find as many instances as there may be, and few more.

    A threshold of 0 would send every location of every class through NMS, which no trained model does.
    """
    height, width = config.input.test_size
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))

    def found(threshold: float) -> torch.Tensor:
        torch.manual_seed(seed)
        model: Any = method.build(_with_threshold(config, threshold)).eval()
        with torch.no_grad():
            return model.detect([image], masks=False)[0].scores

    scores = found(0.0)
    if len(scores) == 0:
        return _with_threshold(config, 0.0)
    threshold = 0.999 * float(scores[-1])
    if len(found(threshold)) < len(scores):
        # The score is the root of class times centre-ness there, and the threshold is on the class.
        threshold = 0.999 * float(scores[-1]) ** 2
    return _with_threshold(config, threshold)


def _with_threshold(config: Any, threshold: float) -> Any:
    return with_field(config, "inference.score_threshold", threshold)


def _interleaved(
    rivals: dict[str, Callable[[], Any]], warmup: int, iters: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, the rivals taking turns so that a slow phase of the machine hits all of them."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for round_number in range(warmup + iters):
        order = list(rivals) if round_number % 2 == 0 else list(rivals)[::-1]
        for name in order:
            _synchronise(device)
            start = time.perf_counter()
            rivals[name]()
            _synchronise(device)
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def _timed_children(model: nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds that each direct part of the model (backbone, pyramid, head) spends in its forward."""
    seconds: dict[str, float] = {}
    starts: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            _synchronise(device)
            starts[name] = time.perf_counter()

        return note

    def after(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            _synchronise(device)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - starts[name]

        return note

    hooks = [child.register_forward_pre_hook(before(name)) for name, child in model.named_children()]
    hooks += [child.register_forward_hook(after(name)) for name, child in model.named_children()]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _mask_rcnn(images: list[Tensor], num_classes: int, device: torch.device) -> Callable[[], Any]:
    """torchvision's Mask R-CNN R-50 with random parameters, made to give 100 detections, masks as bool."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    rival = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        box_score_thresh=0.0,
        box_nms_thresh=1.0,
        min_size=min(images[0].shape[-2:]),
        max_size=max(images[0].shape[-2:]),
    )
    rival.to(device).eval()
    return lambda: [found["masks"] > 0.5 for found in rival(images)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    p90 = quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
    return {
        "p50": round(1000 * median(seconds), 2),
        "p90": round(1000 * min(p90, max(seconds)), 2),
        "min": round(1000 * min(seconds), 2),
    }


def _say(record: dict[str, Any]) -> None:
    size, total = " x ".join(map(str, record["image_size"])), record["milliseconds"]
    logger.info("%s, batch %d, %s, %s", size, record["batch"], record["precision"], record["device"])
    logger.info("  %-12s p50 %9.2f ms   p90 %9.2f ms", "total", total["p50"], total["p90"])
    for name, value in record["stages"].items():
        logger.info("  %-12s     %9.2f ms", name, value)
    logger.info(
        "  %.1f instances per image, peak memory %s MiB", record["instances_per_image"], record["peak_memory_mib"]
    )
    if "times_maskrcnn_speed" in record:
        logger.info(
            "  dense masks: %.2f ms; torchvision Mask R-CNN R-50 %.2f ms: %.2f times its speed",
            record["ours_dense_milliseconds"]["p50"],
            record["maskrcnn_milliseconds"]["p50"],
            record["times_maskrcnn_speed"],
        )
