"""A model that trains in milliseconds, its data, and a run of it that other processes can start."""

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from onestage.config import InputConfig, ScheduleConfig
from onestage.data.coco import coco_object
from onestage.engine import distributed
from onestage.engine.checkpoint import WeightsInfo
from onestage.engine.train import TrainOptions, train
from onestage.masks import Masks
from onestage.structures import Detections, Target

SIZE = 16
CATEGORIES = ((3, "left"), (5, "right"))


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    num_classes: int = 2
    input: InputConfig = field(default_factory=lambda: InputConfig(augmentation="flip"))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            lr=0.05, batch_size=4, unit="steps", length=12, policy="cosine", clip_norm=5.0
        )
    )


class TinyModel(nn.Module):
    """Says where the bright square is; dropout and batch norm make it depend on every random draw."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.box = nn.Linear(4 * 16, 4)
        self.logits = nn.Linear(4 * 16, config.num_classes)

    def features(self, images):
        pixels = torch.stack([image.float() / 255 for image in images])
        pixels = pixels + 0.01 * torch.randn(pixels.shape[0], 1, 1, 1) * self.training
        return self.dropout(self.backbone(pixels).flatten(1))

    def forward(self, images, targets):
        features = self.features(images)
        box = nn.functional.smooth_l1_loss(self.box(features), torch.cat([t.boxes for t in targets]) / SIZE)
        cls = nn.functional.cross_entropy(self.logits(features), torch.cat([t.labels for t in targets]))
        return {"loss_cls": cls, "loss_box": box * 10}

    @torch.no_grad()
    def detect(self, images, masks=True):
        assert not self.training
        features = self.features(images)
        found = []
        for box, logits in zip(self.box(features) * SIZE, self.logits(features).softmax(-1), strict=True):
            box = torch.cat([box[:2].clamp(0, SIZE - 2), torch.maximum(box[2:], box[:2] + 1).clamp(1, SIZE)])
            dense = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
            left, top, right, bottom = box.round().int().tolist()
            dense[0, top:bottom, left:right] = True
            score, label = logits.max(0)
            found.append(Detections((SIZE, SIZE), box[None], score[None], label[None], Masks.from_bool(dense)))
        return found


class TinySet:
    """Squares on noise, in memory, with CocoDataset's interface."""

    categories = CATEGORIES

    def __init__(self, length=10, first=0):
        self.image_ids = [first + index for index in range(length)]
        self.aspect_ratios = [1.0] * length
        self.image_sizes = np.full((length, 2), SIZE)
        self.skipped = []

    name = "squares"

    def __len__(self):
        return len(self.image_ids)

    def subset(self, indices):
        part = TinySet(0)
        part.image_ids = [self.image_ids[index] for index in indices]
        part.aspect_ratios = [1.0] * len(part.image_ids)
        return part

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.image_ids[index])
        image = torch.randint(0, 60, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        side = int(torch.randint(4, 9, (), generator=generator))
        left, top = (int(torch.randint(0, SIZE - side, (), generator=generator)) for _ in range(2))
        image[:, top : top + side, left : left + side] += 150
        masks = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
        masks[0, top : top + side, left : left + side] = 1
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        label = torch.tensor([int(left + side / 2 > SIZE / 2)])
        return image, Target(box, label, masks, torch.zeros(1, dtype=torch.bool), self.image_ids[index])

    def coco_gt(self):
        annotations = []
        for index, image_id in enumerate(self.image_ids):
            _, target = self[index]
            x1, y1, x2, y2 = target.boxes[0].tolist()
            rle = Masks.from_bool(target.masks).to_rle()[0]
            annotations.append(
                {
                    "id": index + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[int(target.labels[0])][0],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": rle,
                }
            )
        images = [{"id": image_id, "height": SIZE, "width": SIZE} for image_id in self.image_ids]
        return coco_object(images, annotations, CATEGORIES)


def run_tiny(folder, options=None, schedule=None, *, train_set=None, val_set=None, model=None, **more):
    """Trains a freshly built tiny model; returns it and the result."""
    config = TinyConfig()
    config = replace(config, schedule=replace(config.schedule, **(schedule or {})))
    torch.manual_seed(7)
    model = model or TinyModel(config)
    options = TrainOptions(**{"device": "cpu", "progress": False, "log_every": 1, **(options or {})})
    info = WeightsInfo(package="tiny", config=asdict(config), categories=CATEGORIES, source="squares")
    train_set = TinySet() if train_set is None else train_set
    result = train(model, config, train_set, val_set, options, Path(folder), info=info, **more)
    return SimpleNamespace(model=model, result=result)


def run_as_process(folder, options=None, schedule=None, *, kill_at=None, stop_at=None):
    """A whole run of a process: joins its group if there is one.

    After a step it may kill itself, unannounced, or ask the process that started it to stop.
    """

    def signal_after(row):
        if row["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if row["step"] == stop_at:
            os.kill(os.getppid(), signal.SIGTERM)

    distributed.start("cpu")
    run_tiny(folder, options, schedule, val_set=TinySet(6, first=100), callback=signal_after)
    distributed.stop()


if __name__ == "__main__":  # what torchrun starts
    run_as_process(sys.argv[1], *map(json.loads, sys.argv[2:4]), stop_at=int(sys.argv[4]))
