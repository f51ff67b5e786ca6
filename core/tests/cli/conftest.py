"""A method small enough to run whole verbs with: it always finds the middle of the image, surer with training."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from onestage.cli.app import main
from onestage.config import BackboneConfig, InputConfig, ScheduleConfig
from onestage.data.synth import ShapesDataset
from onestage.errors import WeightsError
from onestage.masks import Masks
from onestage.method import Method
from onestage.structures import Detections


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    num_classes: int = 80
    grid: tuple[int, int] = (2, 2)  # rows, columns
    align_features: bool = True
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet18"))
    input: InputConfig = field(default_factory=InputConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


class Toy(nn.Module):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config = config
        self.backbone = nn.Conv2d(3, 1, 1)
        self.head = nn.Linear(1, config.num_classes)

    def forward(self, images, targets=None):
        assert self.training
        score = self._scores(images)
        return {"loss_cls": ((1 - score) ** 2).mean(), "loss_mask": 0.1 * score.square().mean()}

    @torch.no_grad()
    def detect(self, images, masks=True):
        return [self._find(image, score) for image, score in zip(images, self._scores(images), strict=True)]

    def _scores(self, images: list[Tensor]) -> Tensor:
        means = torch.stack([self.backbone(image[None].float() / 255).mean() for image in images])
        return self.head(means[:, None]).sigmoid()  # [B, K]

    def _find(self, image: Tensor, scores: Tensor) -> Detections:
        height, width = image.shape[-2:]
        scores, labels = scores.sort(descending=True)
        keep = scores >= self.config.inference.score_threshold
        mask = torch.zeros(len(labels), height, width, dtype=torch.bool)
        mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
        boxes = torch.tensor([width // 4, height // 4, 3 * width // 4, 3 * height // 4.0]).expand(len(labels), 4)
        return Detections((height, width), boxes.clone(), scores, labels, Masks.from_bool(mask))[keep]


def _convert(state, config):
    if set(state) != {"theirs.weight"}:
        raise WeightsError("checkpoint has other keys", "give the right one")
    ours = Toy(config).state_dict()
    return {**ours, "head.weight": state["theirs.weight"]}, ["left out nothing"]


BIG = ToyConfig()
SMALL = replace(
    BIG,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=InputConfig(test_size=(64, 128), train_sizes=((64, 128),)),
    schedule=ScheduleConfig(optimizer="adamw", lr=0.01, batch_size=4, length=4, unit="epochs", policy="constant"),
)
DEMO = replace(SMALL, schedule=replace(SMALL.schedule, unit="steps", length=4))

METHOD = Method(
    name="onestage",  # any importable package with a version
    title="Toy: finds the middle of every image",
    config_type=ToyConfig,
    variants={"big": BIG, "small": SMALL, "demo": DEMO},
    default_variant="big",
    small_variant="small",
    demo_variant="demo",
    build=Toy,
    convert=_convert,
    infer_config=lambda state: replace(SMALL, num_classes=3),
)


@pytest.fixture
def method() -> Method:
    return METHOD


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that run folders appear in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here, capsys):
    """Runs a command line: `call("train --data x")`, or word by word, -> (exit code, stdout, stderr)."""

    def run(verb: str | None, *words: object) -> tuple[int, str, str]:
        try:
            verb, *first = (None,) if verb is None else verb.split()
            code = main(METHOD, verb, first + [str(word) for word in words])
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def shapes(here) -> Path:
    """A data set in COCO layout with 8 images to train on and 4 to evaluate on, 64 px."""
    import json

    (here / "shapes" / "annotations").mkdir(parents=True)
    for split, number in (("train", 8), ("val", 4)):
        folder = here / "shapes" / split
        folder.mkdir()
        content = ShapesDataset(number, split=split, size=64).coco_json(folder)
        (here / "shapes" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return here / "shapes"
