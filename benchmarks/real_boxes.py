"""From ground truth of real images, without a network: whom target assignment reaches, what MBRM makes of boxes.

Assignment: each method's own rule at its input size, on every object: how many places answer for it, and how many
objects no place answers for. MBRM: true masks on RDSNet's grid in the place of predicted ones, true boxes with every
side moved at random in the place of regressed ones; its kernel is trained on one set of annotations and measured on
another. Writes a record to results/accuracy/ and a table to tables/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from representations import Truth, count, truths_of
from torch import Tensor
from tqdm import tqdm

import meinst.config
import meinst.targets
import rdsnet.config
import rdsnet.targets
import sais.config
import sais.targets
import sipmask.config
import sipmask.targets
import sprnet.config
import sprnet.targets
from onestage import boxes as box_ops
from onestage.data.validate import read_annotations
from onestage.nn import fcos, retinanet
from onestage.ops.assemble import crop_window
from onestage.ops.edges import enclosing_boxes, refine_boxes
from onestage.ops.mask_loss import masks_on_grid
from onestage.structures import ImageFrame, Target
from onestage.tables.record import write_record
from onestage.transforms import move_target, plan_resize
from rdsnet.decode import PIXEL_STRIDE, Correlation, input_profiles
from rdsnet.refine import RELEASED_BIAS, RELEASED_WEIGHT, FitOptions, Samples, fit

TABLES = Path(__file__).parent / "tables"
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}  # COCO's, mask area in px
LEVELS = ("P3", "P4", "P5", "P6", "P7")
LOGIT = 4.0  # of a true mask's inside; minus this outside
DISPLACEMENT = 0.05  # standard deviation of a moved side, in lengths of the box: MBRM's own prior
SEED = 0


@dataclass(frozen=True)
class Rule:
    """A method's target assignment.

    Args:
        config: Whose input size, sampling and thresholds count.
        legacy: Target boxes are inclusive.
        places: Level sizes to what the package reads of its network's output.
        assign: (target, frame, that, config) to the object that each place answers for, [P]; < 0: none.
    """

    config: Any
    legacy: bool
    places: Callable[[list[tuple[int, int]]], Any]
    assign: Callable[[Target, ImageFrame, Any, Any], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="annotations that MBRM learns from, .json(.gz)")
    parser.add_argument("--val", type=Path, required=True, help="annotations to measure on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "accuracy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, val = read_annotations(options.train), read_annotations(options.val)
    truths = list(truths_of(val))
    reached = {name: assignment(rule, truths, name) for name, rule in RULES.items()}
    refined = refinement(truths_of(train), truths)
    config = {
        "train": {"masks": count(train), "images": len(train.image_ids)},
        "val": {"masks": count(val), "images": len(val.image_ids)},
        "rules": {name: rule.config.input.test_size for name, rule in RULES.items()},
        "displacement": DISPLACEMENT,
        "seed": SEED,
    }
    body = {"kind": "accuracy", "assignment": reached, "refinement": refined}
    path = write_record(options.output, "real-boxes", config, body)
    (TABLES / "real-boxes.md").write_text(table(config, body), encoding="utf-8")
    print(f"{(TABLES / 'real-boxes.md').read_text(encoding='utf-8')}\nrecord: {path}")


def assignment(rule: Rule, truths: Sequence[Truth], name: str = "") -> dict[str, Any]:
    """How many places answer for the objects of images, by COCO's sizes and by level."""
    positives, areas, per_level = list[Tensor](), list[Tensor](), torch.zeros(len(LEVELS), dtype=torch.int64)
    for truth in tqdm(truths, desc=name, unit="image", leave=False):
        if not len(truth.labels):
            continue
        target, frame = network_input(truth, rule.config.input, rule.legacy)
        sizes = [(-(-frame.padded_size[0] // s), -(-frame.padded_size[1] // s)) for s in fcos.STRIDES]
        raw = rule.places(sizes)
        index = rule.assign(target, frame, raw, rule.config)
        cells = torch.tensor([height * width for height, width in sizes])
        level = torch.arange(len(LEVELS)).repeat_interleave(cells * (len(index) // int(cells.sum())))
        per_level += level[index >= 0].bincount(minlength=len(LEVELS))
        positives.append(index[index >= 0].bincount(minlength=len(target)))
        areas.append(truth.masks.flatten(1).sum(1))
    number, area = torch.cat(positives), torch.cat(areas)
    groups = {kind: (area >= low) & (area < high) for kind, (low, high) in SIZES.items()}
    return {
        "objects": len(number),
        "missed": {kind: _share(number[chosen] == 0) for kind, chosen in _with_all(groups, number)},
        "median": {kind: _median(number[chosen]) for kind, chosen in _with_all(groups, number)},
        "levels": {name: _share_of(n, per_level) for name, n in zip(LEVELS, per_level.tolist(), strict=True)},
        "positives_per_image": float(number.sum()) / len(positives),
    }


def network_input(truth: Truth, config: Any, legacy: bool) -> tuple[Target, ImageFrame]:
    """The objects of an image as training sees them, in pixels of the test-size input."""
    frame = plan_resize(truth.size, config.test_size, config)
    height, width = (-(-side // config.pad_multiple) * config.pad_multiple for side in frame.input_size)
    frame = replace(frame, padded_size=(height, width))
    crowd = torch.zeros(len(truth.labels), dtype=torch.bool)
    return move_target(Target(truth.boxes, truth.labels, truth.masks, crowd), frame, legacy), frame


def _locations(sizes: list[tuple[int, int]]) -> Any:
    return SimpleNamespace(points=fcos.locations(sizes), sizes=sizes)


def _anchors(legacy: bool) -> Callable[[list[tuple[int, int]]], Any]:
    def places(sizes: list[tuple[int, int]]) -> Any:
        return SimpleNamespace(anchors=retinanet.anchors(sizes, retinanet.STRIDES, legacy=legacy), sizes=sizes)

    return places


def _sais(target: Target, frame: ImageFrame, raw: Any, config: Any) -> Tensor:
    return sais.targets.assign_targets([target], raw, config).locations.index[0]


def _meinst(target: Target, frame: ImageFrame, raw: Any, config: Any) -> Tensor:
    return meinst.targets.assign_targets([target], raw, config).assignment.index[0]


def _sipmask(target: Target, frame: ImageFrame, raw: Any, config: Any) -> Tensor:
    return sipmask.targets.assign_targets([target], raw, config).assigned.index[0]


def _rdsnet(target: Target, frame: ImageFrame, raw: Any, config: Any) -> Tensor:
    return rdsnet.targets.assign_targets([target], [frame], raw, config).anchors.index[0]


def _sprnet(target: Target, frame: ImageFrame, raw: Any, config: Any) -> Tensor:
    return sprnet.targets.assign_targets([target], raw, [frame], config).assignment.index[0]


RULES = {
    "SipMask, centre sampling": Rule(sipmask.config.R50, True, _locations, _sipmask),
    "MEInst, centre sampling": Rule(meinst.config.R50, False, _locations, _meinst),
    "SAIS, FCOS' smallest area": Rule(sais.config.VARIANTS["area_aware"], False, _locations, _sais),
    "SAIS, centre-aware": Rule(sais.config.VARIANTS["center_aware"], False, _locations, _sais),
    "RDSNet, anchors, forced match": Rule(rdsnet.config.R50, True, _anchors(legacy=True), _rdsnet),
    "SPRNet, anchors": Rule(sprnet.config.VARIANTS["r50_800"], False, _anchors(legacy=False), _sprnet),
}


def refinement(train: Iterator[Truth], val: Sequence[Truth]) -> dict[str, Any]:
    """How near boxes are to the truth: moved ones, those that enclose the mask, and MBRM's with two kernels."""
    config = rdsnet.config.R50_MBRM
    generator = torch.Generator().manual_seed(SEED)
    samples = []
    for truth in tqdm(train, desc="MBRM, collecting", unit="image", leave=False):
        if len(truth.labels):
            target, frame = network_input(truth, config.input, legacy=True)
            moved = displaced(target.boxes, frame.input_size, generator)
            samples.append(Samples(input_profiles(correlation(target, frame), moved, config), moved, target.boxes))
    weight, bias = fit(samples, config.refine, FitOptions(seed=SEED))
    kernels = {
        "MBRM, trained here": (weight, bias),
        "MBRM, kernel as released": (torch.tensor(RELEASED_WEIGHT), torch.tensor([RELEASED_BIAS])),
    }
    rules, found = config.inference, dict[str, list[Tensor]]()
    wanted, areas = list[Tensor](), list[Tensor]()
    for truth in tqdm(val, desc="MBRM, measuring", unit="image", leave=False):
        if not len(truth.labels):
            continue
        target, frame = network_input(truth, config.input, legacy=True)
        true_boxes = box_ops.to_legacy(truth.boxes)
        moved = displaced(true_boxes, truth.size, generator)
        windows = crop_window(moved, truth.size, "expand", padding=rules.crop_padding)
        _, profiles = correlation(target, frame).masks_with_profiles(windows, truth.size, rules.mask_threshold)
        ways = {"moved": moved, "around the mask": enclosing_boxes(profiles, moved, rules.mask_threshold)}
        ways |= {name: refine_boxes(profiles, moved, *kernel, config.refine.gamma) for name, kernel in kernels.items()}
        for name, own in ways.items():
            found.setdefault(name, []).append(own)
        wanted.append(true_boxes)
        areas.append(truth.masks.flatten(1).sum(1))
    true_boxes, area = torch.cat(wanted), torch.cat(areas)
    groups = {kind: (area >= low) & (area < high) for kind, (low, high) in SIZES.items()}
    rows = {}
    for name, parts in found.items():
        boxes = torch.cat(parts)
        iou, error = box_ops.paired_iou(boxes, true_boxes, legacy=True), (boxes - true_boxes).abs()
        rows[name] = {
            "iou": {kind: float(iou[chosen].mean()) for kind, chosen in _with_all(groups, iou)},
            "over_75": _share(iou >= 0.75),
            "over_90": _share(iou >= 0.9),
            "median_error": float(error.median()),
        }
    return {"rows": rows, "weight": weight.tolist(), "bias": bias.tolist(), "sides": 4 * sum(map(len, samples))}


def correlation(target: Target, frame: ImageFrame) -> Correlation:
    """What RDSNet would correlate to the true masks: one map for each object on the grid of the pixel vectors."""
    maps = LOGIT * (2 * masks_on_grid(target.masks, PIXEL_STRIDE).float() - 1)
    return Correlation(maps, torch.eye(len(maps)), PIXEL_STRIDE, frame.input_size, align_corners=True)


def displaced(boxes: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Inclusive boxes [N, 4] with every side moved by a normal number of DISPLACEMENT box lengths, in the image."""
    lengths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + DISPLACEMENT * lengths * torch.randn(boxes.shape, generator=generator)
    return box_ops.clip(moved, size, legacy=True)


def table(config: dict[str, Any], body: dict[str, Any]) -> str:
    """The results as Markdown."""
    sizes = {name: f"{config[name]['masks']:,} objects of {config[name]['images']} images" for name in ("train", "val")}
    kinds = ("all", *SIZES)
    lines = [
        "# Target assignment and box refinement on real ground truth",
        "",
        f"Written by `benchmarks/real_boxes.py` from COCO annotations: {sizes['val']} of val2017;",
        f"MBRM's kernel was trained on {sizes['train']} of train2017. No network takes part.",
        "",
        "## Whom target assignment reaches",
        "",
        "Each method's own rule at its input size. Objects without a place that answers for them are not learned.",
        "Sizes are COCO's (mask area in image pixels).",
        "",
        "| rule | input, px | objects without a place | " + " | ".join(SIZES) + " | places per object, median | "
        + " | ".join(SIZES) + " | places per image | " + " | ".join(LEVELS) + " |",
        "|---|---|" + "---|" * (2 * len(kinds) + 1 + len(LEVELS)),
    ]  # fmt: skip
    for name, row in body["assignment"].items():
        height, width = config["rules"][name]
        cells = [f"{100 * row['missed'][kind]:.1f} %" for kind in kinds]
        cells += [f"{row['median'][kind]:g}" for kind in kinds]
        cells += [f"{row['positives_per_image']:.0f}", *(f"{100 * row['levels'][level]:.0f} %" for level in LEVELS)]
        lines.append(f"| {name} | {height} x {width} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## What MBRM makes of boxes beside true masks",
        "",
        f"Every side of the true boxes was moved by a normal number of {config['displacement']:g} box lengths, and",
        "boxes were refined from the true masks on the grid of RDSNet's pixel vectors, cropped to the moved boxes.",
        "",
        "| boxes | IoU with the truth | " + " | ".join(SIZES) + " | IoU >= 0.75 | IoU >= 0.9 | side error, median |",
        "|---|" + "---|" * (len(kinds) + 3),
    ]
    for name, row in body["refinement"]["rows"].items():
        cells = [f"{100 * row['iou'][kind]:.1f}" for kind in kinds]
        cells += [f"{100 * row[key]:.1f} %" for key in ("over_75", "over_90")]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['median_error']:.2f} px |")
    return "\n".join(lines) + "\n"


def _with_all(groups: dict[str, Tensor], values: Tensor) -> list[tuple[str, Tensor]]:
    return [("all", torch.ones(len(values), dtype=torch.bool)), *groups.items()]


def _share(chosen: Tensor) -> float:
    return float(chosen.float().mean())


def _share_of(number: int, numbers: Tensor) -> float:
    return number / int(numbers.sum())


def _median(numbers: Tensor) -> float:
    return float(numbers.float().median())


if __name__ == "__main__":
    main()
