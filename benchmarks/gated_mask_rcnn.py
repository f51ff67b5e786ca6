"""torchvision's Mask R-CNN on our pyramid, gated or plain: the two-stage rows of SPRNet's Tables 1, 3 and 4.

    python benchmarks/gated_mask_rcnn.py train --variant r101_gated --data COCO
    python benchmarks/gated_mask_rcnn.py eval --weights runs/.../best.safetensors --data COCO

The verbs and their flags are those of the packages. The paper's numbers on val2017, plain and gated: box AR@1/10/100
32.0/50.1/52.4 and 32.9/51.2/53.5, mask AR 29.9/45.7/47.6 and 30.3/45.9/47.7, mask AP of the gated one 36.0.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN

from onestage.cli.app import main
from onestage.config import BackboneConfig, InputConfig, ScheduleConfig
from onestage.masks import Masks
from onestage.method import Method
from onestage.nn.fpn import FPN
from onestage.nn.resnet import build_backbone
from onestage.structures import Detections, Target, training_targets
from sprnet.gate import GatedMerge

__version__ = "0.1.0"

WIDTH = 256  # channels of the pyramid; torchvision's heads expect them


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """torchvision's settings of the second stage."""

    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100
    mask_threshold: float = 0.5


@dataclass(frozen=True, kw_only=True)
class MaskRCNNConfig:
    """What differs between the rows, and the usual recipe of 12 epochs."""

    num_classes: int = 80
    gate: Literal["full", "spatial", "none"] = "full"  # as in SPRNet
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet101"))
    input: InputConfig = field(default_factory=InputConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(lr=0.02, warmup="linear", warmup_factor=0.001, drop_empty=True)
    )


class OnPyramid(nn.Module):
    """Mask R-CNN with the interface of the packages' models: `model(images, targets)`, `model.detect(images)`."""

    def __init__(self, config: MaskRCNNConfig):
        super().__init__()
        self.config = config
        rules, (short, longest) = config.inference, config.input.test_size
        self.detector = MaskRCNN(
            Pyramid(config),
            num_classes=config.num_classes + 1,  # and background
            min_size=min(short, longest),
            max_size=max(short, longest),
            box_score_thresh=rules.score_threshold,
            box_nms_thresh=rules.iou_threshold,
            box_detections_per_img=rules.max_detections,
        )

    @property
    def backbone(self) -> nn.Module:
        """The trunk, where pretrained weights go."""
        return self.detector.backbone.trunk

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            return [found.as_dict() for found in self.detect(images)]
        truth = training_targets(targets, images, self.config.num_classes)
        return self.detector(
            [_unit(image) for image in images],
            [
                {"boxes": t.boxes.to(i.device), "labels": t.labels.to(i.device) + 1, "masks": t.masks.to(i.device)}
                for t, i in zip(truth, images, strict=True)
            ],
        )

    @torch.no_grad()
    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections in image pixels; torchvision pastes dense masks, which become windows here."""
        detections = []
        for image, found in zip(images, self.detector([_unit(image) for image in images]), strict=True):
            pasted = Masks.from_bool(found["masks"][:, 0] > self.config.inference.mask_threshold) if masks else None
            size = (image.shape[1], image.shape[2])
            detections.append(Detections(size, found["boxes"], found["scores"], found["labels"] - 1, pasted))
        return detections


class Pyramid(nn.Module):
    """P2 to P6 under torchvision's names. Three merges; P6 is every second cell of P5."""

    out_channels = WIDTH

    def __init__(self, config: MaskRCNNConfig):
        super().__init__()
        self.trunk = build_backbone(config.backbone)
        merge = None if config.gate == "none" else GatedMerge(WIDTH, 3, scores=config.gate)
        self.fpn = FPN(self.trunk.channels, WIDTH, extra="none", merge=merge)

    def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
        levels = self.fpn(self.trunk(pixels))
        named = OrderedDict((str(i), level) for i, level in enumerate(levels))
        named["pool"] = F.max_pool2d(levels[-1], kernel_size=1, stride=2)
        return named


def _unit(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


GATED = MaskRCNNConfig()
R50 = BackboneConfig()
SMALL = replace(
    GATED,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=replace(GATED.input, test_size=(256, 512), train_sizes=((256, 512),)),
    schedule=ScheduleConfig(optimizer="adamw", lr=1e-3, batch_size=8, length=40, policy="onecycle", clip_norm=10.0),
)
DEMO = replace(
    SMALL,
    num_classes=3,
    input=replace(GATED.input, test_size=(128, 128), train_sizes=((128, 128),)),
    schedule=replace(SMALL.schedule, unit="steps", length=400),
)
VARIANTS = {
    "r101_gated": GATED,
    "r101": replace(GATED, gate="none"),
    "r50_gated": replace(GATED, backbone=R50),
    "r50": replace(GATED, gate="none", backbone=R50),
    "small": SMALL,
    "demo": DEMO,
}
METHOD = Method(
    name="gated_mask_rcnn",
    title="Mask R-CNN on a gated pyramid, a configuration to compare with",
    config_type=MaskRCNNConfig,
    variants=VARIANTS,
    default_variant="r101_gated",
    small_variant="small",
    demo_variant="demo",
    build=OnPyramid,
    unreleased="the paper's were never released, and torchvision's have no gate",
)


if __name__ == "__main__":
    raise SystemExit(main(METHOD))
