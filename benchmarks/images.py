"""Whole images: the five papers' models against torchvision's Mask R-CNN, RetinaNet and FCOS, on the CPU or a GPU.

    python benchmarks/images.py --image-size 480 640 --rounds 5
    python benchmarks/images.py --models sipmask:r50 --peers mask_rcnn --forms bool rle
    python benchmarks/images.py --mode graph --precision bf16 --channels-last     # on a GPU

All get the same uint8 image from the host's memory, put exactly 1000 candidates through NMS, find exactly 100 instances
and hand out the same: boxes, dense bool masks at the image's size, or COCO RLE. RetinaNet and FCOS have no masks: to
boxes only, they are a lower bound. Parameters are random, so that nothing has to be downloaded; what follows from that
is set so that the work is that of trained models, and the same for all (`lively`, `admit`):

- the score threshold lets the 1000 best pairs of box and class into NMS; at 0 it would be hundreds of thousands;
- boxes have the sizes of each model's levels and nothing else: 6 strides, or the anchor. Their mean area is recorded;
- masks are blobs, not full boxes; how much of the boxes they fill is recorded.

Each round times every model in every form, forwards and backwards through the list (A B C C B A). The record is written
anew after each model, with one time of each of its calls, and after each round: what is ended leaves what it has.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import FAILURES, Call, peak_megabytes, spread
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import detection

from onestage.engine.guard import autocast
from onestage.engine.network import MODES, GraphedNetwork, prepare_network
from onestage.nn.fcos import STRIDES
from onestage.ops import host
from onestage.tables.record import write_record
from onestage.transforms import prepare_batch

NUM_INSTANCES = 100
NUM_CANDIDATES = 1000  # pairs of box and class that enter NMS
TOLERANCE = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.1}  # of those numbers: many scores are equal in half types
SPREAD = 1.7  # standard deviation of class logits, and of mask logits where they are sums of products
HALF_BOX = 3.0  # strides from a location to each side of its box
MODELS = ("sipmask:r50", "meinst:r50", "sais:r50_768", "rdsnet:r50", "sprnet:r50_800")
PEERS = {
    "mask_rcnn": detection.maskrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "fcos": detection.fcos_resnet50_fpn,
}
FORMS = ("boxes", "bool", "rle")
STAGES = ("preprocess", "network", "boxes", "masks", "bool", "rle")


@dataclass(frozen=True)
class Side:
    """A model ready to be timed.

    Args:
        name: As on the command line.
        calls: What to time, by name: forms for a peer, all of STAGES for ours.
        candidates: Pairs of box and class that entered NMS.
        instances: What was found.
        mean_area: Of the boxes, square pixels.
        fill: Share of the boxes' pixels that their masks fill; None without masks.
    """

    name: str
    calls: dict[str, Call]
    candidates: int
    instances: int
    mean_area: float
    fill: float | None


@torch.no_grad()
def main() -> int:
    flags = read_flags()
    torch.set_num_threads(flags.threads)
    device = torch.device(flags.device)
    torch.backends.cudnn.benchmark = True  # sizes do not change; for all models
    with autocast(device, flags.precision):
        if flags.peak:
            name, form = flags.peak
            call = side_of(name, flags, device).calls[form]
            print(peak_megabytes(call, device))
            return 0
        sides: list[Side] = []
        failed: dict[str, str] = {}
        rows: list[dict[str, Any]] = []
        resources = {}
        for name in (*flags.models, *flags.peers):
            try:
                side = side_of(name, flags, device)
                for call in side.calls.values():
                    call()  # warm-up: kernels are compiled, graphs captured
                resources[name] = measure_resources(side, flags, device)
                rows.append(row(side, {call: [timed(side.calls[call], flags)] for call in side.calls}, resources[name]))
            except FAILURES as error:
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{name} failed: {failed[name]}", flush=True)
            else:
                sides.append(side)
                show(rows[-1:], [])
            path = record(rows, failed, 0, flags, device)
        for number, times in enumerate(rounds(sides, flags)):
            rows = [row(side, times[side.name], resources[side.name]) for side in sides]
            path = record(rows, failed, number + 1, flags, device)
    show(rows, compare(rows, flags))
    if path:
        print(f"wrote {path}")
    return 1 if failed else 0


def side_of(name: str, flags: argparse.Namespace, device: torch.device) -> Side:
    """The model called `name`, on the image of these flags."""
    image = torch.randint(256, (3, *flags.image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if device.type == "cuda":
        image = image.pin_memory()
    side = (peer_side if name in PEERS else own_side)(name, image, flags, device)
    assert agree(side.candidates, NUM_CANDIDATES, flags), f"{side.candidates} candidates of {name} enter NMS"
    assert agree(side.instances, NUM_INSTANCES, flags), f"{name} finds {side.instances} instances"
    return side


def agree(count: int, wanted: int, flags: argparse.Namespace) -> bool:
    return abs(count - wanted) <= TOLERANCE[flags.precision] * wanted


def own_side(name: str, image: Tensor, flags: argparse.Namespace, device: torch.device) -> Side:
    """One of ours, `package:variant`."""
    here = image.to(device)
    model = lively(name, here)
    candidates = admit(model, here)
    found = model.detect([here])[0]
    batch = prepare_batch([here], None, model.config.input, training=False)
    prepare_network(model, mode=flags.mode, channels_last=flags.channels_last)

    def detect(masks: bool = True) -> Any:
        return model.detect([image.to(device, non_blocking=True)], masks=masks)[0]

    calls: dict[str, Call] = {
        "preprocess": lambda: prepare_batch(
            [image.to(device, non_blocking=True)], None, model.config.input, training=False
        ),
        "network": lambda: model.raw_outputs(batch.pixels),
        "boxes": lambda: detect(masks=False),
        "masks": detect,
        "bool": lambda: detect().masks.to_bool(),
        "rle": lambda: detect().masks.to_rle(),
    }
    if "bool" not in flags.forms and "rle" not in flags.forms:
        calls = {"preprocess": calls["preprocess"], "network": calls["network"], "boxes": calls["boxes"]}
    fill = float(found.masks.area().sum()) / float(box_areas(found.boxes).sum())
    return Side(name, calls, candidates, len(found), mean_area(found.boxes), round(fill, 3))


def peer_side(name: str, image: Tensor, flags: argparse.Namespace, device: torch.device) -> Side:
    """One of torchvision's; in mode compile or graph its backbone and pyramid run so, the rest has shapes that vary."""
    model = lively_peer(name, image.to(device).float() / 255)
    network = model.backbone.forward
    if flags.channels_last:
        model.to(memory_format=torch.channels_last)
        plain = network
        network = lambda pixels: plain(pixels.contiguous(memory_format=torch.channels_last))  # noqa: E731
    if flags.mode == "compile":
        network = torch.compile(network)
    elif flags.mode == "graph":
        network = GraphedNetwork(network)
    model.backbone.forward = network

    def detect() -> dict[str, Tensor]:
        return model([image.to(device, non_blocking=True).float() / 255])[0]

    with counted_candidates() as counts:
        found = detect()
    calls: dict[str, Call] = {"boxes": detect}
    fill = None
    if "masks" in found:
        dense = lambda: detect()["masks"][:, 0] > 0.5  # noqa: E731
        calls = {"bool": dense, "rle": lambda: encode(dense())}
        fill = round(float(dense().sum()) / float(box_areas(found["boxes"]).sum()), 3)
    return Side(name, calls, counts[-1], len(found["boxes"]), mean_area(found["boxes"]), fill)


def rounds(sides: Sequence[Side], flags: argparse.Namespace) -> Iterator[dict[str, dict[str, list[float]]]]:
    """After each round, forwards and backwards: the milliseconds of every side's calls so far."""
    times: dict[str, dict[str, list[float]]] = {side.name: {call: [] for call in side.calls} for side in sides}
    order = [(side, call) for side in sides for call in side.calls]
    for _ in range(flags.rounds):
        for side, call in (*order, *reversed(order)):
            times[side.name][call].append(timed(side.calls[call], flags))
        yield times


def timed(call: Call, flags: argparse.Namespace) -> float:
    """Milliseconds of a call: of CPU time on one thread, else of wall time."""
    on_gpu = flags.device != "cpu"
    clock = time.process_time if flags.threads == 1 and not on_gpu else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def row(side: Side, times: dict[str, list[float]], resources: dict[str, Any]) -> dict[str, Any]:
    """What the record holds of a model."""
    middle = {call: median(values) for call, values in times.items()}
    stages = {}
    if "network" in times:
        previous = 0.0
        for stage in (stage for stage in STAGES if stage in middle):
            # Stages from `boxes` on are whole images up to there; forms of masks follow `masks`.
            total = middle[stage] + (previous if stage == "network" else 0.0)
            stages[stage] = total - (middle["masks"] if stage in ("bool", "rle") else previous)
            previous = total
    return {
        "model": side.name,
        "milliseconds": {call: spread(values) for call, values in times.items()},
        "stages_ms": stages,
        "candidates": side.candidates,
        "instances": side.instances,
        "mean_box_area": side.mean_area,
        "mask_fill": side.fill,
        **resources,
    }


def measure_resources(side: Side, flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Peak memory of each form, if it is asked for, and how often the host waits for a GPU."""
    forms = [form for form in flags.forms if form in side.calls]
    return {
        "peak_mb": {form: peak(side, form, flags, device) for form in forms} if flags.memory else {},
        "host_synchronisations": synchronisations(side.calls[forms[-1]]) if device.type == "cuda" else None,
    }


def peak(side: Side, form: str, flags: argparse.Namespace, device: torch.device) -> float:
    """Peak memory of a call above what the model takes, MB: of the GPU, or of a fresh process."""
    if device.type == "cuda":
        return peak_megabytes(side.calls[form], device)
    command = [sys.executable, __file__, "--peak", side.name, form, "--image-size", *map(str, flags.image_size)]
    command += ["--threads", str(flags.threads), "--precision", flags.precision, "--device", "cpu"]
    command += ["--mode", flags.mode, *(["--channels-last"] if flags.channels_last else [])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def synchronisations(call: Call) -> int:
    """How often the host waits for the GPU in a call."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # That the mode itself is a prototype is warned of too, once.
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def compare(rows: Sequence[dict[str, Any]], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Each of ours against each peer in every form that both have."""
    ratios = []
    for ours in rows:
        for peer in rows:
            if ours["model"] in PEERS or peer["model"] not in PEERS:
                continue
            for form in flags.forms:
                if form in ours["milliseconds"] and form in peer["milliseconds"]:
                    ratio = peer["milliseconds"][form]["median"] / ours["milliseconds"][form]["median"]
                    ratios.append({"model": ours["model"], "peer": peer["model"], "form": form, "ratio": ratio})
    return ratios


def show(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> None:
    for found in rows:
        times = "  ".join(f"{form} {value['median']:.1f}" for form, value in found["milliseconds"].items())
        sizes = f"mean box {found['mean_box_area']:.0f} px, fill {found['mask_fill']}"
        print(f"{found['model']:16} ms: {times}   {sizes}", flush=True)
        if found["stages_ms"]:
            print(f"{'':16} by stage: " + "  ".join(f"{k} {v:.1f}" for k, v in found["stages_ms"].items()))
        if found["peak_mb"] or found["host_synchronisations"] is not None:
            print(f"{'':16} peak MB {found['peak_mb']}, host waits {found['host_synchronisations']}")
    for found in ratios:
        print(f"{found['model']:16} {found['form']:6} {found['ratio']:6.2f} times the speed of {found['peer']}")


def record(
    rows: Sequence[dict[str, Any]],
    failed: dict[str, str],
    num_rounds: int,
    flags: argparse.Namespace,
    device: torch.device,
) -> Path | None:
    """Writes what there is after so many rounds, if that is asked for."""
    if not flags.output:
        return None
    kept = ("models", "peers", "forms", "image_size", "threads", "precision", "mode", "channels_last")
    clock = "CPU" if flags.threads == 1 and device.type == "cpu" else "wall"
    protocol: dict[str, Any] = {"order": "A B C C B A", "rounds": num_rounds, "warm_up": 1, "clock": clock}
    # What else ran: CPU time of one thread bears other processes, but shared caches and memory do not.
    protocol["load_average"] = [round(load, 1) for load in os.getloadavg()]
    body = {
        "protocol": {
            **protocol,
            "weights": "random",
            "input": "uint8 in host memory",
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        },
        "instances": NUM_INSTANCES,
        "candidates": NUM_CANDIDATES,
        "results": rows,
        "ratios": compare(rows, flags),
        "failed": failed,
    }
    config = {key: getattr(flags, key) for key in kept} | {"device": device.type}
    return write_record(Path(flags.output), f"images-{device.type}", config, body)


def encode(dense: Tensor) -> list[dict[str, Any]]:
    """COCO run lengths of dense masks."""
    masks = dense.to("cpu", torch.uint8).numpy()
    return coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))


def lively(name: str, image: Tensor) -> Any:
    """`package:variant` on the image's device with random parameters, outputs spread as a trained model's."""
    package, variant = name.split(":")
    method = import_module(f"{package}.method").METHOD
    torch.manual_seed(0)
    model: Any = method.build(method.variants[variant]).to(image.device).eval()
    head = model.head
    if package in ("rdsnet", "sprnet"):
        nn.init.zeros_(head.deltas.weight)  # boxes are anchors
        nn.init.zeros_(head.deltas.bias)
    else:
        nn.init.zeros_(head.distances.weight)
        nn.init.constant_(head.distances.bias, HALF_BOX)
    if package == "sais":  # the exponential of input pixels
        nn.init.ones_(head.distances.bias)
        for scale, stride in zip(head.scales, STRIDES, strict=True):
            nn.init.constant_(scale.scale, math.log(HALF_BOX * stride))
    if package in ("sipmask", "sais"):
        nn.init.normal_(head.coefficients.weight, std=0.05)
    if package == "meinst":
        nn.init.normal_(head.codes.weight, std=0.05)
    if package == "sipmask" and head.alignment.offset is not None:
        nn.init.normal_(head.alignment.offset.weight, std=0.1)  # of distances of 3: offsets of half a cell
    pixels = prepare_batch([image], None, model.config.input, training=False).pixels
    raw = spread_logits(head.logits, lambda: model.raw_outputs(pixels))
    if package == "rdsnet":
        anchors = torch.arange(0, len(raw.anchors), len(raw.anchors) // NUM_INSTANCES, device=image.device)
        background, foreground = model.vectors_at(raw, 0, anchors).float().unbind(1)
        logits = torch.einsum("nd,dhw->nhw", foreground - background, raw.pixel_vectors[0].float())
        model.object_vectors.out.weight.mul_(SPREAD / logits.std())
    return model


def spread_logits(layer: nn.Module, run: Call) -> Any:
    """Scales a layer so that its outputs in `run` deviate by SPREAD; what `run` returned before."""
    outputs: list[Tensor] = []
    with layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.float().flatten())):
        result = run()
    layer.weight.mul_(SPREAD / torch.cat(outputs).std())
    torch.clear_autocast_cache()  # it holds the weight as it was
    return result


def lively_peer(name: str, image: Tensor) -> Any:
    """torchvision's with random parameters, its scores spread and its boxes as its anchors, or 6 strides for FCOS."""
    torch.manual_seed(0)
    model: Any = PEERS[name](weights=None, weights_backbone=None).to(image.device).eval()
    if name == "mask_rcnn":
        predictor = model.roi_heads.box_predictor
        silent = [model.rpn.head.bbox_pred, predictor.bbox_pred]
        classes, scoring, owner = predictor.cls_score, predictor, model.roi_heads
    else:
        silent = [model.head.regression_head.bbox_reg]
        classes, scoring, owner = model.head.classification_head.cls_logits, model.head, model
    for part in silent:
        nn.init.zeros_(part.weight)
        nn.init.constant_(part.bias, HALF_BOX if name == "fcos" else 0.0)
    owner.detections_per_img = NUM_INSTANCES
    run = lambda: model([image])  # noqa: E731
    spread_logits(classes, run)
    outputs: list[Any] = []
    with scoring.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        run()
    owner.score_thresh = lowest_admitted(peer_scores(name, outputs[0]))
    return model


def peer_scores(name: str, output: Any) -> Tensor:
    """Scores of all pairs of box and class, as torchvision compares them with its threshold."""
    if name == "mask_rcnn":
        return output[0].softmax(1)[:, 1:].flatten()
    scores = output["cls_logits"].sigmoid()
    if name == "fcos":
        scores = (scores * output["bbox_ctrness"].sigmoid()).sqrt()
    return scores.flatten()


def lowest_admitted(scores: Tensor) -> float:
    """The threshold that NUM_CANDIDATES of `scores` pass."""
    return float(scores.topk(NUM_CANDIDATES + 1).values[-1])


def admit(model: Any, image: Tensor) -> int:
    """Sets the score threshold that lets NUM_CANDIDATES pairs into NMS, by bisection; how many it lets in.

    What a model compares with the threshold, and which locations it looks at, is its own; so it is tried.
    """
    network, outputs = model.raw_outputs, []

    def once(pixels: Tensor) -> Any:
        if not outputs:
            outputs.append(network(pixels))
        return outputs[0]

    low, high, config = 0.0, 1.0, model.config
    object.__setattr__(model, "raw_outputs", once)
    # With shapes that are not fixed, whatever the device: candidates are counted where torchvision's NMS gets them.
    with mock.patch.object(host, "keeps_fixed_shapes", return_value=False):
        for _ in range(60):
            middle = (low + high) / 2
            model.config = replace(config, inference=replace(config.inference, score_threshold=middle))
            with counted_candidates(suppress=False) as counts:
                model.detect([image], masks=False)
            (count,) = counts  # one call of greedy NMS; variants with matrix NMS have none
            if count == NUM_CANDIDATES:
                break
            low, high = (middle, high) if count > NUM_CANDIDATES else (low, middle)
    del model.raw_outputs
    return count


@contextmanager
def counted_candidates(suppress: bool = True) -> Iterator[list[int]]:
    """Collects how many boxes enter torchvision's NMS of several classes; without `suppress` none leaves it."""
    counts: list[int] = []
    batched_nms = ops.boxes.batched_nms

    def count(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
        counts.append(len(boxes))
        return batched_nms(boxes, scores, labels, iou_threshold) if suppress else labels[:0]

    with mock.patch.object(ops, "batched_nms", count), mock.patch.object(ops.boxes, "batched_nms", count):
        yield counts


def box_areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def mean_area(boxes: Tensor) -> float:
    """Mean area of boxes [N, 4] xyxy, square pixels."""
    return round(float(box_areas(boxes).mean()), 1)


def read_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="PACKAGE:VARIANT", help="(%(default)s)")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="what is handed out (all)")
    parser.add_argument("--image-size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds through all models and back (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--mode", choices=MODES, default="eager", help="how the network runs (%(default)s)")
    parser.add_argument("--precision", choices=[*TOLERANCE], default="fp32")
    parser.add_argument("--channels-last", action="store_true", help="order of weights and pixels, of all models")
    parser.add_argument("--memory", action="store_true", help="peak memory too; on a CPU in a fresh process each")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "speed"), help="'' writes nothing")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
