"""SAIS's switches as one frozen value, and every row of the paper's tables by name.

Where the paper is silent the first FCOS of mmdetection is followed, for masks YOLACT and the first author's other code
(docs/methods/sais.md).
"""

from dataclasses import dataclass, field, replace

from onestage.config import BackboneConfig, InputConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From raw outputs to detections; FCOS' rules."""

    candidates_per_level: int = 1000  # best locations of each level by largest class score x centerness
    score_threshold: float = 0.05  # on the class score alone
    iou_threshold: float = 0.5  # of the greedy NMS of each class, after multiplying with centerness
    mask_threshold: float = 0.5
    max_detections: int = 100
    emulate_padding_bug: bool = False  # stretches the padded canvas over the image, perhaps Table I's row 1


@dataclass(frozen=True, kw_only=True)
class SAISConfig:
    """Everything that changes what is trained or computed."""

    num_classes: int = 80
    masks: bool = True  # False: the detector alone, Table II's FCOS rows
    fuse: bool = True  # coefficients read class tower + box tower, Sec. III-A; False: the class tower
    center_aware: bool = True  # Eq. 2 to 4; False: the smallest box wins, as in FCOS
    width: int = 256  # channels of pyramid and towers
    tower_depth: int = 4  # convs of each tower
    num_prototypes: int = 32  # k
    prototype_width: int = 256  # channels of the protonet
    mask_weight: float = 1.0  # w of the mask loss in the total
    masks_per_image: int = 100  # positives drawn for the mask loss
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    reduce_normalisers: bool = False  # loss normalisers averaged over processes; the paper's system: per GPU
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    input: InputConfig = field(default_factory=lambda: FIXED_768)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: SCHEDULE_1X)


# Aspect is not kept; 768 and 640 are multiples of 128, so nothing is padded.
FIXED_768: InputConfig = InputConfig(resize="fixed", test_size=(768, 768), train_sizes=((768, 768),))
FIXED_640 = InputConfig(resize="fixed", test_size=(640, 640), train_sizes=((640, 640),))
KEEP_RATIO = InputConfig()

SCHEDULE_1X: ScheduleConfig = ScheduleConfig(
    warmup="constant", bias_lr_factor=2.0, bias_decay=False, min_size=32, drop_empty=True
)

# Table IV.
R50_768 = SAISConfig()
R50_640 = replace(R50_768, input=FIXED_640)
R101_768 = replace(R50_768, backbone=BackboneConfig(name="resnet101"))
X101_768 = replace(R50_768, backbone=BackboneConfig(name="resnext101_64x4d"))

# Table III's first row and Table II's last: without fusion.
CENTER_AWARE = replace(R50_768, fuse=False)
# Table II's third row and Table I's second: without fusion and with FCOS' targets.
AREA_AWARE = replace(CENTER_AWARE, center_aware=False)
# Table I's first row.
AREA_AWARE_KEEP_RATIO = replace(AREA_AWARE, input=KEEP_RATIO)
# Table II's FCOS rows.
FCOS = replace(AREA_AWARE_KEEP_RATIO, masks=False)
FCOS_CENTER_AWARE = replace(FCOS, center_aware=True)

# Trained from nothing on a laptop: BN learns.
SMALL = SAISConfig(
    width=64,
    tower_depth=2,
    prototype_width=64,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=replace(FIXED_768, test_size=(256, 256), train_sizes=((256, 256),)),
    schedule=ScheduleConfig(optimizer="adamw", lr=2e-3, batch_size=8, length=40, policy="onecycle", clip_norm=10.0),
)
# The demo's: 3 generated shapes at 128 px.
DEMO = replace(
    SMALL,
    num_classes=3,
    input=replace(FIXED_768, test_size=(128, 128), train_sizes=((128, 128),)),
    schedule=replace(SMALL.schedule, unit="steps", length=350),
)

VARIANTS = {
    "r50_768": R50_768,
    "r50_640": R50_640,
    "r101_768": R101_768,
    "x101_768": X101_768,
    "center_aware": CENTER_AWARE,
    "area_aware": AREA_AWARE,
    "area_aware_keep_ratio": AREA_AWARE_KEEP_RATIO,
    "fcos": FCOS,
    "fcos_center_aware": FCOS_CENTER_AWARE,
    "small": SMALL,
    "demo": DEMO,
}
