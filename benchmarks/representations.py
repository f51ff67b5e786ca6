"""What each mask representation can reach at best: ground-truth masks through each of them and back.

No detector is trained: boxes are the ground truth's, scores are the IoUs that come out, and so COCO's mask AP
is a bound of what a perfect network could get. Writes a record to results/accuracy/, a table and a chart to tables/;
README.md beside this says more.
"""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from tqdm import tqdm

from meinst.codec import MaskCodec
from meinst.config import MEInstConfig
from meinst.fit import annotation_masks, dataset_masks, fit, reconstruct
from meinst.targets import polygon_mask
from onestage.data.coco import coco_object
from onestage.data.synth import ShapesDataset
from onestage.data.validate import Annotations, read_annotations
from onestage.engine.coco_eval import CocoEvaluator
from onestage.masks import Masks
from onestage.ops.paste import cut_mask, paste_masks
from onestage.structures import Detections
from onestage.tables.record import write_record

TABLES = Path(__file__).parent / "tables"
LENGTHS = (20, 40, 60, 80, 100)
PAPER_ERROR = {100: 0.025}  # Fig. 5 of MEInst, fitted on 849,949 masks of COCO train2017
GROUPS = ("one part, no hole", "several parts", "holes")
SPECK = 12  # pixels of an image; smaller parts and holes do not make a group


@dataclass(frozen=True)
class Truth:
    """Instances of one image.

    Args:
        image_id: The data set's.
        size: (height, width), pixels.
        boxes: [G, 4] float32 xyxy, image pixels.
        labels: [G] int64.
        masks: [G, height, width] uint8.
        polygons: Per instance its polygons, or None where it is a bitmap.
    """

    image_id: int
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    polygons: tuple[Any, ...]


Restore = Callable[[Truth], Masks]  # an image's instances through a representation and back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="annotations to fit on, .json or .json.gz")
    parser.add_argument("--val", type=Path, required=True, help="annotations to measure on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "accuracy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, val = read_annotations(options.train), read_annotations(options.val)
    errors, codecs = real_codes(train, val)
    real = measure(list(truths_of(val)), representations(codecs), ground_truth(val))
    shapes = generated()
    body = {"kind": "accuracy", "reconstruction_error": errors, "real": real, "generated": shapes}
    config = {
        "train": {"masks": count(train), "images": len(train.image_ids)},
        "val": {"masks": count(val), "images": len(val.image_ids)},
        "lengths": LENGTHS,
    }
    path = write_record(options.output, "representations", config, body)
    TABLES.mkdir(exist_ok=True)
    (TABLES / "representations.md").write_text(table(config, body), encoding="utf-8")
    (TABLES / "representations.svg").write_text(chart(errors), encoding="utf-8")
    print(f"{(TABLES / 'representations.md').read_text(encoding='utf-8')}\nrecord: {path}")


def real_codes(train: Annotations, val: Annotations) -> tuple[dict[str, list[float]], dict[str, MaskCodec]]:
    """Reconstruction errors at LENGTHS, and the codecs that the oracle uses."""
    errors, codecs = {}, {}
    for name, noisy in (("noisy logits, as released", True), ("zeros and ones, as printed", False)):
        config = replace(MEInstConfig(), noisy_logits=noisy)
        masks = tqdm(annotation_masks(train, 28), desc=name, unit="chunk", leave=False)
        encodings = fit(masks, LENGTHS, config)
        ious = reconstruct(annotation_masks(val, 28), list(encodings.values()), config)
        errors[name] = [1 - iou for iou in ious]
        for length in LENGTHS if noisy else (60,):
            codec = MaskCodec(replace(config, code_length=length))
            codec.load(encodings[length])
            codecs[f"code of {length}" + ("" if noisy else ", zeros and ones")] = codec
    codecs["code of 60, cosines instead of fitted components"] = MaskCodec(MEInstConfig())
    return errors, codecs


def generated() -> dict[str, Any]:
    """The same on generated shapes, where many objects have holes or several parts."""
    train, val = (
        ShapesDataset(400, size=256, difficulty="hard"),
        ShapesDataset(100, split="val", size=256, difficulty="hard"),
    )
    codec = MaskCodec(MEInstConfig())
    codec.load(fit(dataset_masks(train, 28), [60], MEInstConfig())[60])
    found = []
    for i in range(len(val)):
        target = val[i][1]
        size = (target.masks.shape[1], target.masks.shape[2])
        found.append(
            Truth(target.image_id, size, target.boxes, target.labels, target.masks, (None,) * len(target.labels))
        )
    return measure(found, representations({"code of 60": codec}), val.coco_gt())


def representations(codecs: dict[str, MaskCodec]) -> dict[str, Restore]:
    """Every representation by its name in the table."""
    grids: dict[str, Restore] = {f"{size} x {size} grid": _by_grid(size) for size in (28, 32)}
    contours: dict[str, Restore] = {
        "one contour, exact": lambda truth: _redrawn(truth, _outline),
        "one contour, 36 rays": lambda truth: _redrawn(truth, _rays),
    }
    return {name: _by_code(codec) for name, codec in codecs.items()} | grids | contours


def measure(truths: Sequence[Truth], restores: dict[str, Restore], gt: Any) -> dict[str, Any]:
    """Mask AP and mean IoU of each representation; mean IoU by kind of object."""
    kinds = [[_kind(mask) for mask in truth.masks] for truth in truths]
    rows: dict[str, Any] = {}
    for name, restore in restores.items():
        evaluator = CocoEvaluator(gt, [(entry["id"], entry["name"]) for entry in gt.dataset["categories"]], ("segm",))
        ious: list[float] = []
        for truth in tqdm(truths, desc=name, unit="image", leave=False):
            masks = restore(truth)
            scores = overlaps(masks, truth)
            ious += scores.tolist()
            order = scores.argsort(descending=True)
            found = Detections(truth.size, truth.boxes[order], scores[order], truth.labels[order], masks[order])
            evaluator.add(truth.image_id, found)
        metrics = evaluator.summarize()
        rows[name] = {key: metrics[key] for key in metrics if key.startswith("segm/AP")}
        rows[name]["mean_iou"] = float(np.mean(ious))
        flat = np.array([kind for image in kinds for kind in image])
        for kind in GROUPS:
            chosen = np.array(ious)[flat == kind]
            rows[name][kind] = float(chosen.mean()) if len(chosen) else None
    counts = {kind: sum(image.count(kind) for image in kinds) for kind in GROUPS}
    return {"rows": rows, "instances": counts}


def truths_of(annotations: Annotations) -> Iterator[Truth]:
    """What `measure` needs of every image, crowds left out."""
    for position, image_id in enumerate(annotations.image_ids.tolist()):
        height, width = annotations.image_sizes[position].tolist()
        chosen = [i for i in annotations.of_image(position) if not annotations.crowds[i]]
        corners = annotations.boxes[chosen].reshape(-1, 4)
        boxes = torch.from_numpy(np.concatenate((corners[:, :2], corners[:, :2] + corners[:, 2:]), 1)).float()
        masks = [Masks.from_rle([_text(annotations.rle(i, (height, width)))], (height, width)) for i in chosen]
        dense = Masks.cat(masks).to_bool() if masks else torch.zeros(0, height, width, dtype=torch.bool)
        polygons = tuple(annotations.polygons(i) for i in chosen)
        labels = torch.from_numpy(annotations.labels[chosen]).long()
        yield Truth(image_id, (height, width), boxes, labels, dense.byte(), polygons)


def ground_truth(annotations: Annotations) -> Any:
    """The annotations as pycocotools' object."""
    images, entries = [], []
    for position, image_id in enumerate(annotations.image_ids.tolist()):
        size = (int(annotations.image_sizes[position, 0]), int(annotations.image_sizes[position, 1]))
        images.append({"id": image_id, "height": size[0], "width": size[1]})
        entries += [
            {
                "id": int(annotations.ids[i]),
                "image_id": image_id,
                "category_id": annotations.categories[annotations.labels[i]][0],
                "bbox": annotations.boxes[i].tolist(),
                "area": float(annotations.areas[i]),
                "iscrowd": int(annotations.crowds[i]),
                "segmentation": annotations.polygons(i) or annotations.rle(i, size),
            }
            for i in annotations.of_image(position)
        ]
    return coco_object(images, entries, annotations.categories)


def overlaps(masks: Masks, truth: Truth) -> Tensor:
    """[G] IoU of each restored mask with its own instance."""
    wanted = Masks.from_bool(truth.masks).to_rle()
    pairs = zip(masks.to_rle(), wanted, strict=True)
    return torch.tensor([float(coco_mask.iou([one], [other], [0])[0, 0]) for one, other in pairs])


def count(annotations: Annotations) -> int:
    return int((~annotations.crowds).sum())


def table(config: dict[str, Any], body: dict[str, Any]) -> str:
    """The results as Markdown."""
    sizes = {name: f"{config[name]['masks']:,} masks of {config[name]['images']} images" for name in ("train", "val")}
    lines = [
        "# What each mask representation can reach at best",
        "",
        "Written by `benchmarks/representations.py`. Real masks are COCO annotations: fitted on",
        f"{sizes['train']} of train2017, measured on {sizes['val']} of val2017. That is a small",
        "part of COCO: these numbers compare representations with each other, not with published AP.",
        "",
        "## Reconstruction error of the code (1 - mean IoU of background and foreground, 28 x 28)",
        "",
        "| N | " + " | ".join(str(length) for length in LENGTHS) + " |",
        "|---|" + "---|" * len(LENGTHS),
    ]
    for name, errors in body["reconstruction_error"].items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * error:.2f} %" for error in errors) + " |")
    paper = [f"about {100 * PAPER_ERROR[n]:.1f} %" if n in PAPER_ERROR else "-" for n in LENGTHS]
    lines += [
        "| paper, Fig. 5 (fitted on all of train2017) | " + " | ".join(paper) + " |",
        "",
        "![error by code length](representations.svg)",
    ]
    for title, part in (("Real masks", body["real"]), ("Generated shapes, hard, 256 px", body["generated"])):
        instances = part["instances"]
        lines += [
            "",
            f"## {title}: oracle, boxes of the ground truth",
            "",
            "AP with the reached IoU as score. Mean IoU in the image, by kind of object: "
            + ", ".join(f"{instances[kind]} with {kind}" for kind in GROUPS)
            + ".",
            "",
            "| representation | AP | AP50 | AP75 | APs | APm | APl | mean IoU | " + " | ".join(GROUPS) + " |",
            "|---|" + "---|" * (7 + len(GROUPS)),
        ]
        for name, row in part["rows"].items():
            aps = [f"{100 * row[f'segm/AP{suffix}']:.1f}" for suffix in ("", "50", "75", "s", "m", "l")]
            means = ["-" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("mean_iou", *GROUPS)]
            lines.append(f"| {name} | " + " | ".join(aps + means) + " |")
    return "\n".join(lines) + "\n"


def chart(errors: dict[str, list[float]]) -> str:
    """Fig. 5 as SVG: error in per cent over N."""
    width, height, left, bottom = 640, 320, 56, 44
    top = math.ceil(100 * max(max(values) for values in errors.values()))

    def place(length: float, error: float) -> tuple[float, float]:
        x = left + (width - left - 24) * length / 110
        return round(x, 1), round(height - bottom - (height - bottom - 20) * 100 * error / top, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in range(0, top + 1, 2):
        _, y = place(0, tick / 100)
        parts.append(f'<path d="M{left} {y}H{width - 24}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tick} %</text>')
    for length in LENGTHS:
        x, y = place(length, 0)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{length}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">code length N</text>')
    for number, ((name, values), colour) in enumerate(zip(errors.items(), ("#1b6ca8", "#c2571a"), strict=True)):
        points = [place(length, error) for length, error in zip(LENGTHS, values, strict=True)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{_pairs(points)}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
        text = html.escape(name)
        parts.append(f'<text x="{width - 28}" y="{36 + 18 * number}" text-anchor="end" fill="{colour}">{text}</text>')
    for length, error in PAPER_ERROR.items():
        x, y = place(length, error)
        parts.append(f'<path d="M{x - 5} {y}h10M{x} {y - 5}v10" stroke="black" stroke-width="2"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 14}" text-anchor="end">paper, all of train2017</text>')
    return "\n".join([*parts, "</svg>", ""])


def _by_code(codec: MaskCodec) -> Restore:
    def restore(truth: Truth) -> Masks:
        masks = _in_boxes(truth, codec.mask_size)
        noise = torch.rand(len(masks), codec.mask_size**2, generator=torch.Generator().manual_seed(truth.image_id))
        soft = codec.decode(codec.encode(masks, truth.labels, noise), truth.labels)
        return paste_masks(soft, truth.boxes, truth.size)

    return restore


def _by_grid(size: int) -> Restore:
    return lambda truth: paste_masks(_in_boxes(truth, size).float(), truth.boxes, truth.size)


def _in_boxes(truth: Truth, size: int) -> Tensor:
    masks = [
        cut_mask(mask, box, size) if parts is None else torch.from_numpy(polygon_mask(parts, box.numpy(), size))
        for parts, mask, box in zip(truth.polygons, truth.masks, truth.boxes, strict=True)
    ]
    return torch.stack(masks) if masks else torch.zeros(0, size, size, dtype=torch.uint8)


def _redrawn(truth: Truth, contour: Callable[[Tensor], list[float]]) -> Masks:
    """Masks filled from one contour each."""
    rles = []
    for mask in truth.masks:
        points = contour(mask)
        filled = coco_mask.frPyObjects([points], *truth.size) if len(points) >= 6 else []
        rles.append(_text(filled[0]) if filled else Masks.from_bool(torch.zeros(1, *truth.size)).to_rle()[0])
    return Masks.from_rle(rles, truth.size)


def _outline(mask: Tensor) -> list[float]:
    """The outline of the largest part; its holes are lost."""
    outlines = _outlines(mask)
    return max(outlines, key=_area) if outlines else []


def _rays(mask: Tensor, num_rays: int = 36) -> list[float]:
    """Ends of rays from the centre of mass to the farthest pixel of the mask along each."""
    y, x = mask.nonzero().double().add(0.5).unbind(1)
    if len(x) == 0:
        return []
    centre_y, centre_x = y.mean(), x.mean()
    angle = torch.arange(num_rays, dtype=torch.float64) * (2 * math.pi / num_rays)
    reach = torch.arange(0, math.hypot(*mask.shape), 0.25, dtype=torch.float64)
    along_y, along_x = centre_y + angle.sin()[:, None] * reach, centre_x + angle.cos()[:, None] * reach
    row, column = along_y.floor().long(), along_x.floor().long()
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    hit = inside & (mask[row.clamp(0, mask.shape[0] - 1), column.clamp(0, mask.shape[1] - 1)] > 0)
    farthest = torch.where(hit, reach, 0.0).amax(1)
    ends = torch.stack((centre_x + angle.cos() * farthest, centre_y + angle.sin() * farthest), 1)
    return ends.flatten().tolist()


def _kind(mask: Tensor) -> str:
    """Which of GROUPS an instance belongs to."""
    parts = [outline for outline in _outlines(mask) if _area(outline) >= SPECK]
    filled = coco_mask.frPyObjects(parts, *mask.shape) if parts else []
    covered = int(coco_mask.area(coco_mask.merge(filled))) if filled else 0
    if covered - int(mask.sum()) >= SPECK:
        return GROUPS[2]
    return GROUPS[1] if len(parts) > 1 else GROUPS[0]


def _outlines(mask: Tensor) -> list[list[float]]:
    return Masks.from_bool(mask[None]).to_polygons()[0]


def _area(outline: Sequence[float]) -> float:
    x, y = np.array(outline).reshape(-1, 2).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


if __name__ == "__main__":
    main()
