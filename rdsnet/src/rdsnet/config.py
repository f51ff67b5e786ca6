"""RDSNet's switches as one frozen value, and every row of the paper's tables by name.

Where paper and released code differ the code is followed (docs/methods/rdsnet.md), and a switch has the paper's form.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from onestage.config import BackboneConfig, InputConfig, ScheduleConfig
from onestage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From raw outputs to detections."""

    candidates_per_level: int = 1000  # best anchors of each level by largest class score
    score_threshold: float = 0.05
    iou_threshold: float = 0.5  # of the NMS of each class
    max_detections: int = 100
    mask_threshold: float = 0.4
    crop_padding: float = 0.1  # p: masks are cropped to boxes 1 + 2 p as large; 0: to the boxes
    refine: Literal["none", "direct", "mbrm"] = "none"  # boxes: regressed, around the mask, or by Sec. 3.3
    refine_frame: Literal["image", "input"] = "image"  # pixels that MBRM moves sides by; input: as the paper says


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """The mask-based boundary refinement module, Sec. 3.3."""

    reach: int = 4  # s: its kernel has 2 s + 1 taps
    gamma: float = 0.05  # standard deviation of the prior, in box sides; 0: no refinement


@dataclass(frozen=True, kw_only=True)
class YolactConfig:
    """What the real-time model has from YOLACT; read with detector = "yolact"."""

    anchor_sides: tuple[float, ...] = (24.0, 48.0, 96.0, 192.0, 384.0)  # of P3..P7, input pixels
    square_anchors: bool = True  # all ratios become squares, as in the published weights
    prototype_relu: bool = True  # on the pixel vectors
    class_negatives: float = 3.0  # background anchors in the class loss for each positive one
    box_weight: float = 1.5
    top_k: int = 200  # candidates of each class in fast NMS


@dataclass(frozen=True, kw_only=True)
class RDSNetConfig:
    """Everything that changes what is trained or computed."""

    num_classes: int = 80
    detector: Literal["retinanet", "yolact"] = "retinanet"  # yolact: the real-time model, RDSNet_s
    masks: Literal["corr", "lc", "none"] = "corr"  # correlation; YOLACT's linear combination (yolact only); boxes only
    width: int = 256  # channels of pyramid, towers and pixel stream
    tower_depth: int = 4  # convs of each of the three towers
    norm: Literal["gn", "none"] = "gn"  # in towers; none: plain RetinaNet
    vector_length: int = 32  # d
    anchor_size: float = 4.0  # side of the smallest square anchor, in strides
    train_crop: float | None = 0.25  # p of the crop that the mask loss sees; 0: the box; None: everything
    ohem: float | None = 1.0  # background pixels for each foreground pixel in the mask loss; None: all
    mask_weight: float = 1.0  # lambda_m
    masks_per_image: int = 100  # positives drawn for the mask loss
    min_mask_area: int = 100  # input pixels; instances with no more do not train masks
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box_beta: float = 0.11  # where smooth L1 becomes linear
    reduce_normalisers: bool = False  # number of positives averaged over processes; as released: per GPU
    refine: RefineConfig = field(default_factory=RefineConfig)
    yolact: YolactConfig = field(default_factory=YolactConfig)
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(norm="frozen_stats"))
    input: InputConfig = field(default_factory=InputConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: SCHEDULE_1X)

    def __post_init__(self) -> None:
        if self.masks == "lc" and self.detector != "yolact":
            raise UsageError(
                "masks 'lc' with detector 'retinanet'", "the linear combination belongs to detector 'yolact'"
            )
        if self.masks == "none" and self.detector == "yolact":
            raise UsageError(
                "masks 'none' with detector 'yolact'", "boxes alone are detector 'retinanet'; here use 'corr' or 'lc'"
            )
        if self.inference.refine != "none" and (self.detector == "yolact" or self.masks == "none"):
            raise UsageError(
                f"inference.refine '{self.inference.refine}' with detector '{self.detector}' and masks '{self.masks}'",
                "boxes are refined from the correlated masks of detector 'retinanet'; use refine 'none' here",
            )


SCHEDULE_1X: ScheduleConfig = ScheduleConfig(
    lr=0.005, batch_size=8, warmup="linear", clip_norm=35.0, min_size=32, drop_empty=True
)
SCHEDULE_2X = replace(SCHEDULE_1X, length=24, milestones=(16, 22))
SIZES_2X = ((640, 1333), (800, 1333))
INPUT_600 = InputConfig(test_size=(600, 1000), train_sizes=((600, 1000),))
R101_TRUNK = BackboneConfig(name="resnet101", norm="frozen_stats")

# Table 1 and the README of the released code; Table 2's "+ mask" rows.
R50 = RDSNetConfig()
R101 = replace(R50, backbone=R101_TRUNK)
R101_2X = replace(R101, input=InputConfig(train_sizes=SIZES_2X), schedule=SCHEDULE_2X)
R101_600 = replace(R101, input=INPUT_600)
# Table 2's last rows; Table 4's are R101_600 with refine "none", "direct" and "mbrm".
WITH_MBRM = InferenceConfig(refine="mbrm")
R50_MBRM = replace(R50, inference=WITH_MBRM)
R101_MBRM = replace(R101, inference=WITH_MBRM)
R101_600_MBRM = replace(R101_600, inference=WITH_MBRM)
R101_600_DIRECT = replace(R101_600, inference=InferenceConfig(refine="direct"))
# Table 2's first rows.
RETINANET_R101 = replace(R101, norm="none", masks="none")
RETINANET_R101_600 = replace(R101_600, norm="none", masks="none")

# Table 3. Rows 2 and 3, 4 and 5, 6 and 7 are three trained networks, seen with and without expanded crops.
YOLACT = RDSNetConfig(
    detector="yolact",
    masks="lc",
    mask_weight=6.125,
    backbone=BackboneConfig(name="resnet101", norm="train", frozen_stages=0),
    input=InputConfig(
        resize="fixed",
        test_size=(550, 550),
        train_sizes=((550, 550),),
        pad_multiple=1,
        mean=(123.68, 116.78, 103.94),
        std=(58.40, 57.12, 57.38),
        augmentation="yolact",
    ),
    inference=InferenceConfig(mask_threshold=0.5),
    schedule=ScheduleConfig(
        lr=1e-3,
        weight_decay=5e-4,
        batch_size=8,
        length=800_000,
        unit="steps",
        milestones=(280_000, 600_000, 700_000, 750_000),
        warmup="linear",
        warmup_factor=0.1,
        drop_empty=True,
    ),
)
S_TE_OHEM_IE = replace(
    YOLACT, masks="corr", yolact=YolactConfig(prototype_relu=False), inference=InferenceConfig(mask_threshold=0.4)
)
S_TE_OHEM = replace(S_TE_OHEM_IE, inference=InferenceConfig(mask_threshold=0.4, crop_padding=0.0))
S_TE_IE = replace(S_TE_OHEM_IE, ohem=None)
S_TE = replace(S_TE_OHEM, ohem=None)
S_IE = replace(S_TE_IE, train_crop=0.0)
S_PLAIN = replace(S_TE, train_crop=0.0)

# Figure 5: s and gamma of MBRM; the grid is ours. Its baseline is gamma 0.
REACHES = (1, 2, 3, 4, 5, 6)
GAMMAS = (0.01, 0.02, 0.05, 0.1, 0.15)

# Trained from nothing on a laptop: BN learns.
SMALL = RDSNetConfig(
    width=64,
    tower_depth=2,
    anchor_size=2.0,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=InputConfig(test_size=(256, 512), train_sizes=((256, 512),)),
    schedule=ScheduleConfig(optimizer="adamw", lr=2e-3, batch_size=8, length=40, policy="onecycle", clip_norm=10.0),
)
# The demo's: 3 generated shapes at 128 px.
DEMO = replace(
    SMALL,
    num_classes=3,
    input=InputConfig(resize="fixed", test_size=(128, 128), train_sizes=((128, 128),)),
    schedule=replace(SMALL.schedule, unit="steps", length=400),
)

VARIANTS = {
    "r50": R50,
    "r50_mbrm": R50_MBRM,
    "r101": R101,
    "r101_mbrm": R101_MBRM,
    "r101_2x": R101_2X,
    "r101_600": R101_600,
    "r101_600_direct": R101_600_DIRECT,
    "r101_600_mbrm": R101_600_MBRM,
    "retinanet_r101": RETINANET_R101,
    "retinanet_r101_600": RETINANET_R101_600,
    "yolact": YOLACT,
    "s_plain": S_PLAIN,
    "s_ie": S_IE,
    "s_te": S_TE,
    "s_te_ie": S_TE_IE,
    "s_te_ohem": S_TE_OHEM,
    "s": S_TE_OHEM_IE,
    "small": SMALL,
    "demo": DEMO,
}
