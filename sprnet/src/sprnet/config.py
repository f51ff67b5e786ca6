"""SPRNet's switches as one frozen value, and every row of the paper's tables by name.

No code was released. Where the paper is silent, what its numbers point to is followed: RetinaNet, and the settings of
keras-retinanet (docs/methods/sprnet.md).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from onestage.config import BackboneConfig, InputConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From raw outputs to detections; RetinaNet's rules."""

    candidates_per_level: int = 1000  # best (anchor, class) pairs of each level
    score_threshold: float = 0.05  # on the class score
    iou_threshold: float = 0.5  # of the greedy NMS of each class, before any mask is decoded
    max_detections: int = 100
    mask_threshold: float = 0.5


@dataclass(frozen=True, kw_only=True)
class SPRNetConfig:
    """Everything that changes what is trained or computed."""

    num_classes: int = 80
    gate: Literal["full", "spatial", "none"] = "full"  # score per channel and place / per place / plain FPN, Sec. 3.1
    gate_share_levels: bool = False  # one gate for all merges of the pyramid
    masks: bool = True  # False: RetinaNet, the box-only rows of Tables 2b, 3, 5 and 6
    fusion: Literal["sec32", "c33x4", "c33_1246"] = "sec32"  # as Sec. 3.2; Table 2a's rows, the second literally
    shortcut: Literal["add", "none", "concat"] = "add"  # from the 8 x 8 to the 32 x 32 map, Table 2c
    decoder_width: int = 256  # channels of the decoder's maps
    mask_iou: float = 0.7  # a positive pixel has an anchor with a larger IoU, Table 2d
    masks_per_image: int = 300  # positive pixels at most
    pixel_dedupe: bool = True  # a pixel is trained once, for its best anchor; False: once per anchor, as printed
    width: int = 256  # channels of pyramid and towers
    tower_depth: int = 4  # convs of each of the class and box tower
    anchor_size: float = 4.0  # side of a level's smallest square anchor, in strides
    force_match: bool = False  # the best anchors of each instance are positive however small their IoU
    box_coder: Literal["retina", "corners"] = "retina"  # centre and log size; keras-retinanet's corner offsets / 0.2
    box_beta: float = 1 / 9  # where smooth L1 becomes linear
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    reduce_normalisers: bool = False  # loss normalisers averaged over processes: losses as with one process
    backbone: BackboneConfig = field(default_factory=lambda: R50_TRUNK)
    input: InputConfig = field(default_factory=lambda: input_of(800))
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: SCHEDULE)


def input_of(short: int) -> InputConfig:
    """Images whose short side is `short` px, in training and tests; the long side is capped as in RetinaNet's paper."""
    size = (short, round(short * 5 / 3))
    return InputConfig(test_size=size, train_sizes=(size,), augmentation="none")


# "We train the entire network end-to-end": no stage is frozen, batch norms are.
R50_TRUNK: BackboneConfig = BackboneConfig(frozen_stages=0)
R101_TRUNK = BackboneConfig(name="resnet101", frozen_stages=0)

# Learning rate and clip are the paper's, and those of keras-retinanet, like the rest. The clip acts in every step, so
# Adam would undo it but for its eps: Keras' is ten times torch's.
SCHEDULE: ScheduleConfig = ScheduleConfig(
    optimizer="adam",
    lr=1e-5,
    eps=1e-7,
    weight_decay=0.0,
    batch_size=1,
    length=25,
    policy="plateau",
    clip_norm=1e-3,
    drop_empty=True,
)

R50_800 = SPRNetConfig()
R50_500 = replace(R50_800, input=input_of(500))
R101_800 = replace(R50_800, backbone=R101_TRUNK)

# Trained from nothing on a laptop: batch norm learns; anchors and positive pixels for small pictures.
SMALL = SPRNetConfig(
    width=64,
    tower_depth=2,
    decoder_width=64,
    anchor_size=3.0,
    mask_iou=0.6,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=replace(input_of(256), augmentation="flip"),
    schedule=ScheduleConfig(optimizer="adamw", lr=2e-3, batch_size=8, length=40, policy="onecycle", clip_norm=10.0),
)
# The demo's: 3 generated shapes at 128 px.
DEMO = replace(
    SMALL,
    num_classes=3,
    input=InputConfig(resize="fixed", test_size=(128, 128), train_sizes=((128, 128),)),
    schedule=replace(SMALL.schedule, unit="steps", length=300),
)

VARIANTS = {
    # Tables 1 and 4.
    "r50_800": R50_800,
    "r50_500": R50_500,
    "r50_500_fpn": replace(R50_500, gate="none"),
    "r50_800_fpn": replace(R50_800, gate="none"),
    "r101_800": R101_800,
    "r101_800_fpn": replace(R101_800, gate="none"),
    # Table 2, against r50_500.
    "c33x4": replace(R50_500, fusion="c33x4"),
    "c33_1246": replace(R50_500, fusion="c33_1246"),
    "no_shortcut": replace(R50_500, shortcut="none"),
    "iou_half": replace(R50_500, mask_iou=0.5),
    # Tables 2b, 3, 5 and 6: boxes only.
    **{f"retinanet_{short}": replace(R50_800, input=input_of(short), masks=False) for short in range(400, 801, 100)},
    **{
        f"retinanet_{short}_fpn": replace(R50_800, input=input_of(short), masks=False, gate="none")
        for short in range(400, 801, 100)
    },
    "retinanet_r101": replace(R101_800, masks=False),
    "retinanet_r101_fpn": replace(R101_800, masks=False, gate="none"),
    "small": SMALL,
    "demo": DEMO,
}
