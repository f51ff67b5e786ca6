"""Box AP of one trained RDSNet with regressed boxes, with boxes read off its masks ("direct") and with MBRM (Table 4).

Several seeds, each with its own data, network and MBRM, on generated shapes. Writes one record to results/accuracy/ and
beside it the mask profiles of the sides that MBRM moved farthest from the truth. The numbers are what they are.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from onestage import boxes as box_ops
from onestage.data.synth import ShapesDataset
from onestage.engine.checkpoint import WeightsInfo
from onestage.engine.coco_eval import CocoEvaluator
from onestage.engine.train import TrainOptions, train
from onestage.ops.edges import enclosing_boxes, refine_boxes
from onestage.tables.record import write_record
from rdsnet.config import DEMO
from rdsnet.model import RDSNet
from rdsnet.refine import FitOptions, Observed, collect, fit, observe

# Table 4, COCO val2017, R-101 at 600; its AP50 and AP75 are not printed.
PAPER = {
    "regressed": {"AP": 35.9, "APs": 17.1, "APm": 39.7, "APl": 53.3},
    "direct": {"AP": 34.2, "APs": 11.8, "APm": 37.7, "APl": 55.1},
    "mbrm": {"AP": 37.2, "APs": 16.9, "APm": 40.8, "APl": 56.5},
}
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
NUM_DRAWN = 8


@dataclass(frozen=True)
class Side:
    """One side of a detection that MBRM moved, with what it was read from."""

    error_before: float
    error_after: float
    truth: float
    before: float
    after: float
    profile: Tensor


def main() -> None:
    arguments = parse_arguments()
    runs, sides = [], []
    for seed in range(arguments.seeds):
        result, moved = one_seed(seed, arguments)
        runs.append(result)
        sides += moved
        for name in PAPER:
            print(seed, f"{name:10}", " ".join(f"{key} {shown(result[name][key])}" for key in COLUMNS), flush=True)
    body = {
        "kind": "accuracy",
        "split": "100 generated images",
        "paper": PAPER,
        "runs": runs,
        "mean": mean(runs),
        "sides": summary(sides),
    }
    config = {"model": asdict(DEMO), "steps": arguments.steps, "seeds": arguments.seeds, "images": arguments.images}
    path = write_record(Path(arguments.output), "refined-boxes", config, body)
    draw(sorted(sides, key=lambda side: side.error_before - side.error_after)[:NUM_DRAWN], path.with_suffix(".png"))
    print(f"wrote {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=DEMO.schedule.length, help="of the detector (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="generated for training (%(default)s)")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "accuracy"))
    return parser.parse_args()


def one_seed(seed: int, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Side]]:
    """Trains detector and MBRM and measures three kinds of boxes of the same detections."""
    train_set = ShapesDataset(arguments.images, split="train", seed=seed)
    held_out = ShapesDataset(100, split="val", seed=seed)
    config = replace(DEMO, schedule=replace(DEMO.schedule, length=arguments.steps))
    torch.manual_seed(seed)
    model = RDSNet(config)
    options = TrainOptions(device="cpu", seed=seed, eval_every=0, save_every=0, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        info = WeightsInfo(package="rdsnet", categories=train_set.categories)
        trained = train(model, config, train_set, held_out, options, Path(folder), info=info)
    model.eval()
    stage = FitOptions(seed=seed)
    weight, bias = fit(list(collect(model, train_set, stage)), config.refine, stage)
    evaluators = {name: CocoEvaluator(held_out.coco_gt(), held_out.categories, iou_types=("bbox",)) for name in PAPER}
    sides = []
    for index in range(len(held_out)):
        image, target = held_out[index]
        (seen,) = observe(model, [image])
        refined = refine_boxes(seen.profiles, seen.boxes, weight, bias, config.refine.gamma)
        direct = enclosing_boxes(seen.profiles, seen.boxes, config.inference.mask_threshold)
        for name, boxes in (("regressed", seen.boxes), ("direct", direct), ("mbrm", refined)):
            evaluators[name].add(target.image_id, seen.refined(boxes))
        sides += moved_sides(seen, refined, box_ops.to_legacy(target.boxes))
    result: dict[str, Any] = {
        name: {key: percent(evaluator.summarize()[f"bbox/{key}"]) for key in COLUMNS}
        for name, evaluator in evaluators.items()
    }
    result |= {"seed": seed, "mask AP": 100 * trained.metrics["segm/AP"], "seconds of training": trained.seconds}
    return result | {"kernel": weight.tolist(), "bias": float(bias)}, sides


def moved_sides(seen: Observed, refined: Tensor, truth: Tensor) -> list[Side]:
    """The sides of confident detections that lie on an instance (IoU above one half); boxes inclusive."""
    if len(truth) == 0:
        return []
    iou, owner = box_ops.iou_matrix(seen.boxes, truth, legacy=True).max(1)
    sides = []
    for n in ((iou > 0.5) & (seen.found.scores > 0.3)).nonzero().flatten().tolist():
        for side in range(4):
            profile = (seen.profiles.columns if side % 2 == 0 else seen.profiles.rows)[n]
            true, before, after = (float(box[side]) for box in (truth[owner[n]], seen.boxes[n], refined[n]))
            sides.append(Side(abs(before - true), abs(after - true), true, before, after, profile))
    return sides


def summary(sides: list[Side]) -> dict[str, float]:
    """How far sides lie from the truth before and after, pixels."""
    before, after = (torch.tensor([getattr(side, name) for side in sides]) for name in ("error_before", "error_after"))
    return {
        "sides": len(sides),
        "mean error before": float(before.mean()),
        "mean error after": float(after.mean()),
        "share nearer": float((after < before).float().mean()),
        "share farther": float((after > before).float().mean()),
        "share over 2 px before": float((before > 2).float().mean()),
        "share over 2 px after": float((after > 2).float().mean()),
    }


def shown(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.1f}"


def percent(value: float) -> float | None:
    """None for the evaluation's -1: no instance of that size."""
    return None if value < 0 else 100 * value


def mean(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    found = {name: {key: [run[name][key] for run in runs] for key in COLUMNS} for name in PAPER}
    return {
        name: {key: None if None in values else sum(values) / len(values) for key, values in columns.items()}
        for name, columns in found.items()
    }


def draw(sides: list[Side], path: Path) -> None:
    """Profiles, one below the other: green the true side, blue the regressed one, red where MBRM put it."""
    width, height, left = 640, 90, 10
    picture = Image.new("RGB", (width + 2 * left, height * max(1, len(sides))), "white")
    pen = ImageDraw.Draw(picture)
    for row, side in enumerate(sides):
        bottom, step = (row + 1) * height - 22, width / len(side.profile)
        points = [(left + (i + 0.5) * step, bottom - 60 * float(p)) for i, p in enumerate(side.profile)]
        pen.line([(left, bottom), (left + width, bottom)], fill=(200, 200, 200))
        pen.line(points, fill=(60, 60, 60), width=2)
        for value, colour in ((side.truth, (0, 140, 60)), (side.before, (40, 110, 220)), (side.after, (210, 40, 40))):
            x = left + (value + 0.5) * step
            pen.line([(x, bottom), (x, bottom - 64)], fill=colour, width=2)
        text = f"true {side.truth:.1f} (green)  regressed {side.before:.1f} (blue)  MBRM {side.after:.1f} (red)"
        pen.text((left, bottom + 4), text, fill=(0, 0, 0))
    picture.save(path)


if __name__ == "__main__":
    main()
