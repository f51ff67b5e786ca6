"""Whole image: SipMask R-50 against torchvision's Mask R-CNN R-50, both at 800 x 1333 px, on the CPU or a GPU.

    python benchmarks/images.py --image-size 480 640 --rounds 5

Both get the same image, find exactly 100 instances and hand out the same: dense bool masks or COCO RLE at the image's
size, in float32. Parameters are random, so that nothing has to be downloaded; what follows from that is set so that
the work is that of trained models, and the same for both (`lively`, `admit`):

- the score threshold lets the 1000 best pairs of box and class into NMS; at 0 it would be hundreds of thousands;
- boxes have the sizes of each model's levels and nothing else: 6 strides for SipMask, the anchor for Mask R-CNN. The
  record holds their mean area;
- masks are blobs, not full boxes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

from onestage.tables.record import write_record
from sipmask.config import VARIANTS
from sipmask.model import SipMask

Sides = tuple[Callable[[], Any], Callable[[], Any]]  # ours, Mask R-CNN's

NUM_INSTANCES = 100
NUM_CANDIDATES = 1000  # pairs of box and class that enter NMS
HALF_BOX = 3.0  # strides from a location to each side of its box


@torch.no_grad()
def main() -> None:
    flags = read_flags()
    torch.set_num_threads(flags.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = torch.rand(3, *flags.image_size, generator=torch.Generator().manual_seed(0)).to(device)
    sipmask = lively_sipmask(flags.variant, image)
    rival = lively_mask_rcnn(image)
    areas = mean_area(sipmask.detect([image], masks=False)[0].boxes), mean_area(rival([image])[0]["boxes"])
    print(f"mean box area, px: ours {areas[0]:.0f}, Mask R-CNN {areas[1]:.0f}")
    results = {}
    for form, sides in forms(sipmask, rival, image).items():
        ours, theirs = alternate(sides, flags.rounds, flags.threads)
        ratio = median(theirs) / median(ours)
        results[form] = {"ratio": ratio, "ours_ms": spread(ours), "mask_rcnn_ms": spread(theirs)}
        print(
            f"{form:5} ours {median(ours):8.1f} ms   Mask R-CNN {median(theirs):8.1f} ms   {ratio:.2f} times its speed"
        )
    if flags.output:
        clock = "CPU" if flags.threads == 1 and device.type == "cpu" else "wall"
        path = write_record(
            Path(flags.output),
            f"image-sipmask-{device.type}",
            {
                "variant": flags.variant,
                "image_size": flags.image_size,
                "threads": flags.threads,
                "model": asdict(sipmask.config),
            },
            {
                "protocol": {
                    "order": "A B B A",
                    "rounds": flags.rounds,
                    "warm_up": 1,
                    "clock": clock,
                    "precision": "fp32",
                },
                "rival": "torchvision maskrcnn_resnet50_fpn",
                "weights": "random",
                "instances": NUM_INSTANCES,
                "candidates": NUM_CANDIDATES,
                "mean_box_area": {"ours": areas[0], "mask_rcnn": areas[1]},
                "results": results,
            },
        )
        print(f"wrote {path}")


def alternate(sides: Sides, rounds: int, threads: int) -> tuple[list[float], list[float]]:
    """Milliseconds of both sides in A B B A order: of CPU time on one thread, else of wall time."""
    on_gpu = torch.cuda.is_available()
    clock = time.process_time if threads == 1 and not on_gpu else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    assert [len(side()) for side in sides] == [NUM_INSTANCES] * 2  # also the warm-up
    for which in (0, 1, 1, 0) * rounds:
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        sides[which]()
        if on_gpu:
            torch.cuda.synchronize()
        times[which].append(1e3 * (clock() - start))
    return times


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def forms(sipmask: SipMask, rival: MaskRCNN, image: Tensor) -> dict[str, Sides]:
    """What is handed out, by name: (ours, Mask R-CNN's)."""

    def rival_bool() -> Tensor:
        return rival([image])[0]["masks"][:, 0] > 0.5

    def rival_rle() -> list[Any]:
        masks = rival_bool().to("cpu", torch.uint8).numpy()
        return coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))

    return {
        "bool": (lambda: sipmask.detect([image])[0].masks.to_bool(), rival_bool),
        "rle": (lambda: sipmask.detect([image])[0].masks.to_rle(), rival_rle),
    }


def lively_sipmask(variant: str, image: Tensor) -> SipMask:
    """SipMask with random parameters whose outputs are spread as a trained model's."""
    torch.manual_seed(0)
    model = SipMask(VARIANTS[variant]).to(image.device).eval()
    head = model.head
    nn.init.normal_(head.logits.weight, std=0.05)
    nn.init.normal_(head.coefficients.weight, std=0.05)
    nn.init.zeros_(head.distances.weight)
    nn.init.constant_(head.distances.bias, HALF_BOX)
    if head.alignment.offset is not None:
        nn.init.normal_(head.alignment.offset.weight, std=0.1)  # of distances of 3: offsets of half a cell
    logits: list[Tensor] = []
    with head.logits.register_forward_hook(lambda module, inputs, output: logits.append(output)):
        model.detect([image], masks=False)
    threshold = admit(torch.cat([level.flatten() for level in logits]).sigmoid())
    inference = replace(model.config.inference, score_threshold=threshold)
    model.config = replace(model.config, inference=inference)
    return model


def lively_mask_rcnn(image: Tensor) -> MaskRCNN:
    """torchvision's Mask R-CNN with random parameters, its boxes as its anchors, its scores spread."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).to(image.device).eval()
    predictor = model.roi_heads.box_predictor
    for part in (model.rpn.head.bbox_pred, predictor.bbox_pred):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    logits: list[Tensor] = []
    with predictor.register_forward_hook(lambda module, inputs, output: logits.append(output[0])):
        model([image])
    model.roi_heads.score_thresh = admit(logits[0].softmax(1)[:, 1:].flatten())
    return model


def admit(scores: Tensor) -> float:
    """The threshold that NUM_CANDIDATES of `scores` pass."""
    return float(scores.topk(NUM_CANDIDATES + 1).values[-1])


def mean_area(boxes: Tensor) -> float:
    """Mean area of boxes [N, 4] xyxy, square pixels."""
    return round(float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean()), 1)


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), default="r50")
    parser.add_argument("--image-size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds of A B B A (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time (%(default)s)")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "speed"), help="'' writes nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
