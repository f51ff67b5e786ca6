"""Training memory of the SAIS paper's rows: counted on the CPU without computing, measured where there is a GPU.

The paper's numbers (Table IV) are `max_memory_allocated` per GPU of a run with two images each: at other numbers of
images the counts do not come near them. The count follows every tensor of a full fp32 step, gradients kept between
steps as torch did then; a GPU adds workspaces and the allocator's rounding, 5 to 15 %. Writes one record to
results/memory/ and prints a table.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestage.engine.memory import training_peak
from onestage.engine.schedule import make_optimizer
from onestage.structures import Target
from onestage.tables.record import write_record
from onestage.testing import coco_like_boxes
from sais.config import VARIANTS, SAISConfig
from sais.model import SAIS

INSTANCES = 15  # per image; twice COCO's mean, so that every image has more positives than masks are drawn
WARMUP, MEASURED = 5, 20  # GPU steps
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One configuration.

    Args:
        variant: Its name in `sais.config.VARIANTS`.
        images: Per GPU.
        masks: Per image, drawn for the mask loss.
        paper: GB of Table IV, where it has the row.
    """

    variant: str
    images: int = 2
    masks: int = 100
    paper: float | None = None


ROWS = (
    Row("r50_640", paper=1.8),
    Row("r50_768", paper=2.5),
    Row("r101_768", paper=3.6),
    Row("x101_768", paper=6.6),
    Row("r50_768", images=1),
    Row("r50_768", images=4),
    Row("r50_768", masks=1000),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=VARIANTS, help="only these configurations")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "memory")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.rows or row.variant in options.rows]
    print("| configuration | images | masks | paper, GB | counted, GiB | gradients released | GPU, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = []
    for row in rows:
        result = asdict(row) | counted(row) | measured(row)
        results.append(result)
        gpu = result["gpu_allocated"]
        print(
            f"| {row.variant} | {row.images} | {row.masks} | {row.paper or '-'} | {result['counted']:.2f} |"
            f" {result['counted_gradients_released']:.2f} | {'-' if gpu is None else f'{gpu:.2f}'} |",
            flush=True,
        )
    protocol = {
        "precision": "fp32",
        "instances_per_image": INSTANCES,
        "frozen": "stem and stage 1",
        "norm": "BatchNorm2d in eval mode, affine frozen",
        "optimizer": "SGD with momentum",
        "unit": "GiB",
        "gpu_steps": [WARMUP, MEASURED],
    }
    path = write_record(
        options.results,
        "training-memory",
        {"rows": [asdict(row) for row in rows], "protocol": protocol},
        {"kind": "memory", "results": results},
    )
    print(f"record: {path}")


def counted(row: Row) -> dict[str, float]:
    """Peak of a step in GiB, with gradients kept between steps and with gradients released."""
    config = configured(row)
    images, targets = batch(config, row.images)
    kept, released = (
        training_peak(lambda: SAIS(config), images, targets, config.schedule, keep_gradients=keep)
        for keep in (True, False)
    )
    return {"counted": round(kept / GIB, 3), "counted_gradients_released": round(released / GIB, 3)}


def measured(row: Row) -> dict[str, float | None]:
    """Peak of `MEASURED` steps on the GPU in GiB, allocated and reserved; None without a GPU."""
    if not torch.cuda.is_available():
        return {"gpu_allocated": None, "gpu_reserved": None}
    config = configured(row)
    images, targets = batch(config, row.images)
    images, targets = [image.cuda() for image in images], [target.to("cuda") for target in targets]
    model = SAIS(config).cuda().train()
    optimizer = make_optimizer(model, replace(config.schedule, lr=0.0))  # random weights must not diverge
    torch.backends.cudnn.benchmark = False  # its workspaces would count
    for step in range(WARMUP + MEASURED):
        if step == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=False)
        losses: Any = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
    return {
        "gpu_allocated": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "gpu_reserved": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def configured(row: Row) -> SAISConfig:
    """The row's configuration."""
    return replace(VARIANTS[row.variant], masks_per_image=row.masks)


def batch(config: SAISConfig, count: int) -> tuple[list[Tensor], list[Target]]:
    """`count` images of the training size with `INSTANCES` boxes each, of COCO's sizes."""
    generator = torch.Generator().manual_seed(0)
    height, width = size = config.input.train_sizes[0]
    images, targets = [], []
    for _ in range(count):
        boxes = coco_like_boxes(INSTANCES, size, generator)
        masks = torch.zeros(INSTANCES, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(config.num_classes, (INSTANCES,), generator=generator)
        images.append(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator))
        targets.append(Target(boxes, labels, masks, torch.zeros(INSTANCES, dtype=torch.bool)))
    return images, targets


if __name__ == "__main__":
    main()
