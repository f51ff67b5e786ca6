"""Mask post-processing and its kernels: the published dense formulas against ours, in one process, on CPU or GPU.

Each round draws new inputs, asserts that both sides give the same result, then times A B B A: in CPU time, or between
events on a GPU, there eager and as replayed CUDA graphs. Peak memory is that of fresh processes, or of the GPU's
allocator. Writes one record to results/speed/ and prints a table; README.md beside this says more.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import FAILURES, Call, call_timer, ceilings, graphed, num_launches, peak_megabytes, spread
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

from onestage.masks import Masks
from onestage.ops.assemble import assemble_masks, crop_window
from onestage.ops.deform import deform_conv2d
from onestage.ops.edges import Profiles, assemble_with_profiles, refine_boxes
from onestage.ops.mask_loss import window_mask_loss
from onestage.ops.paste import paste_masks
from onestage.tables.record import write_record
from onestage.testing import (
    coco_like_boxes,
    dense_mask_loss,
    dense_masks,
    dense_paste,
    dense_soft_masks,
    dense_two_class_masks,
)

Size = tuple[int, int]
Sides = tuple[Call, Call]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: How the command line and the record call it.
        title: What it is, for people.
        goal: Ratio of CPU time that it has to reach; None: it runs on a GPU only.
        make: Draws inputs, moves them to a device and returns the naive side and ours.
        check: Asserts that two results agree and says how closely.
        gpu_goal: Ratio on a GPU, ours as a replayed graph.
        capture: Whether ours can be one; run lengths end on the host.
        least_bytes: What the result has on any path, for the share of the fill rate that ours reaches; 0: not asked.
    """

    name: str
    title: str
    goal: float | None
    make: Callable[[torch.Generator, torch.device], Sides]
    check: Callable[[Any, Any], dict[str, float]]
    gpu_goal: float = 0.0
    capture: bool = True
    least_bytes: int = 0


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    chosen = [case for case in CASES if case.name in arguments.cases and (case.goal is not None or device != CPU)]
    if arguments.peak:
        print(fresh_side(chosen[0], arguments.peak == "ours"))
        return 0
    limits = ceilings(device) if device.type == "cuda" else {}
    if limits:
        print("ceilings: " + ", ".join(f"{name} {value}" for name, value in limits.items()))
    results: list[dict[str, Any]] = []
    path = record(results, chosen, limits, arguments)
    print(f"{'case':22}{'naive ms':>10}{'ours ms':>9}{'ratio':>8}{'goal':>7}{'naive MB':>10}{'ours MB':>9}{'less':>7}")
    for case in chosen:
        try:
            result = measure(case, arguments.rounds, arguments.threads, device, limits)
        except FAILURES as error:
            result = {"case": case.name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        results.append(result)
        print(f"{case.name:22}{outcome(result)}", flush=True)
        path = record(results, chosen, limits, arguments)  # a run that is ended leaves what it has
    if path:
        print(f"wrote {path}")
    return 0 if all("failed" not in result and result["ratio"] >= result["goal"] for result in results) else 1


def record(
    results: list[dict[str, Any]], cases: list[Case], limits: dict[str, float], arguments: argparse.Namespace
) -> Path | None:
    if not arguments.output:
        return None
    return write_record(
        Path(arguments.output),
        f"masks-{torch.device(arguments.device).type}",
        {"cases": {case.name: case.title for case in cases}, "threads": arguments.threads},
        {"protocol": {**PROTOCOL, "rounds": arguments.rounds}, "ceilings": limits, "results": results},
    )


def parse_arguments() -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="rounds of A B B A (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "speed"), help="'' writes nothing")
    parser.add_argument("--peak", choices=["naive", "ours"], help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(case: Case, rounds: int, threads: int, device: torch.device, limits: dict[str, float]) -> dict[str, Any]:
    """Times both sides of a case and asserts their equality in every round."""
    timed = call_timer(device, threads)
    times: tuple[list[float], list[float]] = ([], [])
    replays: list[float] = []
    refused = ""
    equal: dict[str, float] = {}
    for number in range(rounds):
        sides = case.make(torch.Generator().manual_seed(number), device)
        # Also the warm-up of this round.
        for key, value in case.check(sides[0](), sides[1]()).items():
            equal[key] = max(equal.get(key, 0.0), value)
        for which in (0, 1, 1, 0):
            times[which].append(timed(sides[which]))
        if device.type == "cuda" and case.capture and not refused:
            replay, refused = graphed(sides[1])
            if replay is not None:
                case.check(sides[0](), replay())
                replays += [timed(replay), timed(replay)]
    result: dict[str, Any] = {"case": case.name, "naive_ms": spread(times[0]), "ours_ms": spread(times[1])}
    result["ratio"] = statistics.median(times[0]) / statistics.median(times[1])
    result["goal"] = (case.gpu_goal if device.type == "cuda" else case.goal) or 0.0
    if device.type == "cuda":
        best = statistics.median(replays or times[1])
        result |= {"eager_ratio": result["ratio"], "ratio": statistics.median(times[0]) / best, "refused": refused}
        result["ours_graph_ms"] = spread(replays) if replays else None
        result["launches"] = {"naive": num_launches(sides[0]), "ours": num_launches(sides[1])}
        if case.least_bytes:
            floor = case.least_bytes / limits["fill_gb_per_s"] / 1e6
            result |= {"floor_ms": floor, "share_of_floor": floor / best}
        peaks = [peak_megabytes(side, device) for side in sides]
    else:
        peaks = [fresh_peak(case, which) for which in ("naive", "ours")]
    return result | {
        "naive_peak_mb": peaks[0],
        "ours_peak_mb": peaks[1],
        "memory_ratio": peaks[0] / max(peaks[1], 0.1),
        "equal": True,
        "difference": equal,
    }


def outcome(result: dict[str, Any]) -> str:
    """The printed line of a case behind its name; on a GPU with launches, share of the floor, refused captures."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    text = (
        f"{result['naive_ms']['median']:10.3g}{result['ours_ms']['median']:9.3g}{result['ratio']:8.1f}"
        f"{result['goal']:7.1f}{result['naive_peak_mb']:10.1f}{result['ours_peak_mb']:9.1f}{result['memory_ratio']:7.1f}"
    )
    if "launches" not in result:
        return text
    text += (
        f"   eager {result['eager_ratio']:.1f}, launches {result['launches']['naive']} to {result['launches']['ours']}"
    )
    if "share_of_floor" in result:
        text += f", {100 * result['share_of_floor']:.0f} % of the fill rate"
    return text + (f", not captured: {result['refused']}" if result["refused"] else "")


def fresh_peak(case: Case, which: str) -> float:
    """Peak memory of one run in a process of its own, MB."""
    command = [sys.executable, __file__, "--cases", case.name, "--peak", which, "--device", "cpu"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def fresh_side(case: Case, ours: bool) -> float:
    """How far a run exceeds what is resident once its inputs exist, MB. Linux."""
    return peak_megabytes(case.make(torch.Generator().manual_seed(0), CPU)[ours], CPU)


def moved(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise that varies over four cells, as basis maps do."""
    *_, height, width = shape
    noise = torch.randn(*shape[:-2], height // 4 + 1, width // 4 + 1, generator=generator)
    return F.interpolate(noise[None], size=(height, width), mode="bilinear")[0]


def sub_regions(network: Size, resized: Size, image: Size, rle: bool = False) -> Callable[..., Sides]:
    """SipMask: 2 x 2 coefficient sets, basis at stride 8, probabilities at stride 2."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        basis = smooth((32, network[0] // 8, network[1] // 8), generator).relu()
        coefficients = torch.randn(100, 128, generator=generator)
        half = (network[0] // 2, network[1] // 2)
        valid = (half[0], round(half[1] * image[1] / resized[1])) if resized != image else half
        boxes = coco_like_boxes(100, valid, generator)
        basis, coefficients, boxes = moved(device, basis, coefficients, boxes)

        @torch.no_grad()
        def naive() -> Tensor:
            soft = dense_soft_masks(basis, coefficients, boxes, grid=(2, 2), upsample=4)
            return dense_masks(soft, 0.4, resized, image)

        def ours() -> Masks:
            return assemble_masks(
                basis,
                coefficients,
                crop_window(boxes, half),
                boxes=boxes,
                grid=(2, 2),
                upsample=4,
                threshold=0.4,
                resized_size=resized,
                output_size=image,
            )

        return (lambda: encode(naive()), lambda: ours().to_rle()) if rle else (naive, ours)

    return make


def prototypes(grid: Size, image: Size) -> Callable[..., Sides]:
    """YOLACT and SAIS: one coefficient set, prototypes at stride 4, cropped with a margin."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        basis = smooth((32, *grid), generator).relu()
        coefficients = torch.randn(100, 32, generator=generator).tanh()
        boxes = coco_like_boxes(100, grid, generator)
        basis, coefficients, boxes = moved(device, basis, coefficients, boxes)

        @torch.no_grad()
        def naive() -> Tensor:
            return dense_masks(dense_soft_masks(basis, coefficients, boxes, rule="margin"), 0.5, image, image)

        def ours() -> Masks:
            return assemble_masks(basis, coefficients, crop_window(boxes, grid, "margin"), output_size=image)

        return naive, ours

    return make


def two_classes(padded: Size, resized: Size, image: Size) -> Callable[..., Sides]:
    """RDSNet: background and foreground maps at stride 4, two resizes of logits, crop expanded 1.2 times."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        basis = smooth((32, padded[0] // 4, padded[1] // 4), generator)
        background, foreground = torch.randn(2, 100, 32, generator=generator)
        windows = crop_window(coco_like_boxes(100, image, generator), image, "expand", padding=0.1)
        basis, background, foreground, windows = moved(device, basis, background, foreground, windows)

        @torch.no_grad()
        def naive() -> Tensor:
            soft = dense_two_class_masks(
                basis, background, foreground, windows, padded_size=padded, resized_size=resized, output_size=image
            )
            return soft > 0.4

        def ours() -> Masks:
            return assemble_masks(
                basis,
                foreground - background,
                windows,
                upsample=4,
                order="logits",
                threshold=0.4,
                valid_size=resized,
                output_size=image,
                align_corners=True,
            )

        return naive, ours

    return make


def edges(padded: Size, resized: Size, image: Size, rle: bool = False) -> Callable[..., Sides]:
    """RDSNet with MBRM: the masks above, their profiles, and boxes with refined sides."""
    kernel = torch.tensor([-0.2968, -0.2892, -0.2635, -3.2545, -0.1874, 2.5041, 0.0196, 0.0651, 0.0917])
    bias = torch.tensor([-1.9536])

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        basis = smooth((32, padded[0] // 4, padded[1] // 4), generator)
        background, foreground = torch.randn(2, 100, 32, generator=generator)
        boxes = coco_like_boxes(100, image, generator)
        windows = crop_window(boxes, image, "expand", padding=0.1)
        basis, background, foreground, boxes, windows = moved(device, basis, background, foreground, boxes, windows)
        weight, shift = moved(device, kernel, bias)

        @torch.no_grad()
        def naive() -> Any:
            soft = dense_two_class_masks(
                basis, background, foreground, windows, padded_size=padded, resized_size=resized, output_size=image
            )
            masks = soft > 0.4
            return encode(masks) if rle else masks, refine_boxes(Profiles.of(soft), boxes, weight, shift, 0.05)

        def ours() -> Any:
            masks, profiles = assemble_with_profiles(
                basis,
                foreground - background,
                windows,
                upsample=4,
                threshold=0.4,
                valid_size=resized,
                output_size=image,
                align_corners=True,
            )
            return masks.to_rle() if rle else masks, refine_boxes(profiles, boxes, weight, shift, 0.05)

        return naive, ours

    return make


def pasted(image: Size) -> Callable[..., Sides]:
    """MEInst and SPRNet: 28 x 28 maps into boxes."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        maps, boxes = moved(device, smooth((100, 28, 28), generator).sigmoid(), coco_like_boxes(100, image, generator))

        @torch.no_grad()
        def naive() -> Tensor:
            return dense_paste(maps, boxes, image) >= 0.5

        return naive, lambda: paste_masks(maps, boxes, image)

    return make


def loss(grid: Size, regions: Size) -> Callable[..., Sides]:
    """Mask loss forward and backward: 40 locations answer for 8 instances with boxes around theirs."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        basis = smooth((32, *grid), generator).relu()
        coefficients = 0.3 * torch.randn(40, 32 * regions[0] * regions[1], generator=generator)
        answered = coco_like_boxes(8, grid, generator)
        index = torch.randint(8, (40,), generator=generator)
        sides = answered[index, 2:] - answered[index, :2]
        boxes = answered[index] + 0.1 * torch.cat((sides, sides), 1) * torch.randn(40, 4, generator=generator)
        masks = (smooth((8, *grid), generator) > 0).byte()
        weights = torch.rand(40, generator=generator)
        basis, coefficients, boxes = moved(device, basis, coefficients, boxes)
        masks, index, weights = moved(device, masks, index, weights)

        def side(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor | None, ...]]:
            def run() -> tuple[Tensor | None, ...]:
                inputs = basis.clone().requires_grad_(), coefficients.clone().requires_grad_()
                losses = function(*inputs, boxes, masks, index, grid=regions)
                (losses * weights).sum().backward()
                return losses.detach(), inputs[0].grad, inputs[1].grad

            return run

        return side(dense_mask_loss), side(window_mask_loss)

    return make


def deformed(size: Size, dtype: torch.dtype) -> Callable[..., Sides]:
    """SipMask's feature alignment: 3 x 3, 256 to 256 channels, 4 groups of offsets; torchvision's op in float32."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        x = torch.randn(1, 256, *size, generator=generator)
        offset = torch.randn(1, 4 * 18, *size, generator=generator)
        weight = torch.randn(256, 256, 3, 3, generator=generator) / 48
        x, offset, weight = moved(device, x, offset, weight)
        half = x.to(dtype, memory_format=torch.channels_last), weight.to(dtype)

        @torch.no_grad()
        def naive() -> Tensor:
            return ops.deform_conv2d(x, offset, weight, padding=1)

        @torch.no_grad()
        def ours() -> Tensor:
            return deform_conv2d(half[0], offset, half[1], padding=1)

        return naive, ours

    return make


def dense(case: Callable[..., Sides]) -> Callable[..., Sides]:
    """The case with bool masks at image size on both sides."""

    def make(generator: torch.Generator, device: torch.device = CPU) -> Sides:
        naive, ours = case(generator, device)
        return naive, lambda: ours().to_bool()

    return make


def encode(dense: Tensor) -> list[dict[str, Any]]:
    """COCO run lengths of dense masks by pycocotools."""
    columns = np.asfortranarray(dense.cpu().numpy().transpose(1, 2, 0).view(np.uint8))
    return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in coco_mask.encode(columns)]


def same_masks(naive: Tensor, ours: Masks) -> dict[str, float]:
    """At most five of a million pixels differ, and run lengths are pycocotools' to the byte."""
    masks = ours.to_bool()
    difference = same_dense(naive, masks)
    assert ours.to_rle() == encode(masks), "run lengths differ from pycocotools'"
    return difference


def same_dense(naive: Tensor, ours: Tensor) -> dict[str, float]:
    """At most five of a million pixels differ."""
    per_million = 1e6 * float((ours != naive).sum()) / int(naive.sum())
    assert per_million <= 5, f"{per_million} pixels of a million differ"
    return {"pixels_per_million": per_million}


def same_values(tolerance: float) -> Callable[[Tensor, Tensor], dict[str, float]]:
    """Values agree to `tolerance` of the largest."""

    def check(naive: Tensor, ours: Tensor) -> dict[str, float]:
        worst = float((naive - ours.float()).abs().max() / naive.abs().max())
        assert worst <= tolerance, f"values differ by {worst} of the largest"
        return {"relative": worst}

    return check


def same_runs(naive: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, float]:
    """Run lengths are equal, but for masks with a pixel on the threshold."""
    different = sum(a != b for a, b in zip(naive, ours, strict=True))
    assert different <= 5, f"{different} of {len(naive)} masks have other run lengths"
    return {"masks_of_100": different}


def same_masks_and_boxes(naive: tuple[Any, Tensor], ours: tuple[Any, Tensor]) -> dict[str, float]:
    """Masks as above; of 400 refined sides at most one lies on a tie."""
    moved = int((naive[1] != ours[1]).sum())
    assert moved <= 1, f"{moved} of {naive[1].numel()} sides differ"
    return (same_runs if isinstance(naive[0], list) else same_masks)(naive[0], ours[0]) | {"sides": moved}


def same_gradients(naive: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> dict[str, float]:
    """Losses and gradients agree to 1e-5 of the largest."""
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(naive, ours, strict=True))
    assert worst <= 1e-5, f"losses or gradients differ by {worst}"
    return {"relative": worst}


LARGE: Size = (800, 1333)
DENSE_BYTES = 100 * 800 * 1333
CASES = (
    Case(
        "subregions-544",
        "SipMask masks, input 544 x 544, image 480 x 640",
        8,
        sub_regions((544, 544), (480, 640), (480, 640)),
        same_masks,
        gpu_goal=20,
    ),
    Case(
        "subregions-800",
        "SipMask masks, input 800 x 1344, image 800 x 1333",
        20,
        sub_regions((800, 1344), (800, 1344), LARGE),
        same_masks,
        gpu_goal=20,
    ),
    Case(
        "subregions-800-rle",
        "the same to COCO RLE; naive: pycocotools on dense masks",
        12,
        sub_regions((800, 1344), (800, 1344), LARGE, rle=True),
        same_runs,
        gpu_goal=20,
        capture=False,
    ),
    Case(
        "prototypes-544",
        "YOLACT masks, 138 x 138, image 480 x 640",
        6,
        prototypes((138, 138), (480, 640)),
        same_masks,
        gpu_goal=10,
    ),
    Case(
        "prototypes-800",
        "SAIS masks, 200 x 334, image 800 x 1333",
        10,
        prototypes((200, 334), LARGE),
        same_masks,
        gpu_goal=10,
    ),
    Case(
        "two-classes-800",
        "RDSNet masks, input 800 x 1344, image 800 x 1333",
        20,
        two_classes((800, 1344), LARGE, LARGE),
        same_masks,
        gpu_goal=25,
    ),
    Case(
        "edges-544",
        "RDSNet masks and MBRM, input 544 x 725, image 480 x 640",
        10,
        edges((544, 736), (544, 725), (480, 640)),
        same_masks_and_boxes,
        gpu_goal=25,
    ),
    Case(
        "edges-800",
        "RDSNet masks and MBRM, input 800 x 1344, image 800 x 1333",
        20,
        edges((800, 1344), LARGE, LARGE),
        same_masks_and_boxes,
        gpu_goal=25,
    ),
    Case(
        "edges-800-rle",
        "the same to COCO RLE; naive: pycocotools on dense masks",
        20,
        edges((800, 1344), LARGE, LARGE, rle=True),
        same_masks_and_boxes,
        gpu_goal=20,
        capture=False,
    ),
    Case(
        "paste-800",
        "28 x 28 maps into boxes of 800 x 1333; naive: torchvision-like dense sampling",
        10,
        pasted(LARGE),
        same_masks,
        gpu_goal=20,
    ),
    Case(
        "mask-loss-stride-4",
        "loss forward and backward, 200 x 336, one set",
        4,
        loss((200, 336), (1, 1)),
        same_gradients,
        gpu_goal=5,
    ),
    Case(
        "mask-loss-stride-2",
        "loss forward and backward, 400 x 672, 2 x 2 sets",
        4,
        loss((400, 672), (2, 2)),
        same_gradients,
        gpu_goal=5,
    ),
    Case("deform-100x168", "deformable 3 x 3, float32", 1.7, deformed((100, 168), torch.float32), same_values(1e-5)),
    Case(
        "deform-100x168-bf16",
        "the same in bfloat16 against torchvision's in float32",
        None,
        deformed((100, 168), torch.bfloat16),
        same_values(2e-2),
        gpu_goal=4,
    ),
    *(
        Case(
            f"{name}-800-dense",
            "the case of that name with bool masks at image size",
            None,
            dense(case),
            same_dense,
            least_bytes=DENSE_BYTES,
        )
        for name, case in (
            ("subregions", sub_regions((800, 1344), (800, 1344), LARGE)),
            ("prototypes", prototypes((200, 334), LARGE)),
            ("two-classes", two_classes((800, 1344), LARGE, LARGE)),
            ("paste", pasted(LARGE)),
        )
    ),
)
PROTOCOL = {
    "order": "A B B A, new inputs each round, one checked run of each side before as warm-up",
    "time": "CPU time of the process with one thread, wall time with more; between events on a GPU",
    "memory": "peak resident set of one run in a fresh process, above what is resident once the inputs exist; on a GPU"
    " peak of the allocator",
    "detections": 100,
    "boxes": "onestage.testing.coco_like_boxes: 40 % small, 35 % medium, 25 % large",
    "precision": "float32",
    "gpu": "events around a call after 256 MB were written; naive eager, ours eager and as a replayed graph",
    "output": "naive: dense bool; ours: pixels of box windows, bool on the CPU and bits on a GPU",
}

if __name__ == "__main__":
    sys.exit(main())
