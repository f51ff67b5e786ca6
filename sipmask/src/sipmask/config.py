"""SipMask's switches as one frozen value, and every named configuration the paper and its code use.

Numbers are from the authors' released configurations where the paper is silent. `mm` and `fc` name
the authors' two image code bases and `vis` their video code; losses and inference differ (docs/methods/sipmask.md).
"""

from dataclasses import dataclass, replace
from typing import Literal

from onestage.config import CAFFE_MEAN, BackboneConfig, InputConfig, ScheduleConfig

CAFFE_R50 = BackboneConfig(stride_in_1x1=True)
CAFFE_INPUT = InputConfig(channel_order="bgr", mean=CAFFE_MEAN, std=(1.0, 1.0, 1.0))
SCHEDULE_1X = ScheduleConfig(
    warmup="constant",
    bias_lr_factor=2.0,
    bias_decay=False,
    bias_rule_also=("head.alignment.norm.bias",),
    min_size=32,
    drop_empty=True,
)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From raw outputs to detections (docs/methods/sipmask.md)."""

    nms: Literal["greedy", "fast"] = "greedy"  # fast: matrix NMS of the real-time models
    candidates_per_level: int = 1000  # best locations (mm) or location-class pairs (fc) of each level
    score_threshold: float = 0.05  # greedy and fc: on the class score; fast: on class score x centerness
    iou_threshold: float = 0.5
    max_detections: int = 100
    mask_threshold: float = 0.4
    mask_rounding: Literal["ceil", "floor"] = "ceil"  # of the up-sampled canvas; floor is the released code's


GREEDY_INFERENCE = InferenceConfig()


@dataclass(frozen=True, kw_only=True)
class AssociationConfig:
    """How detections find their objects in the memory of a video (Sec. 3.5; MaskTrack R-CNN's score)."""

    score_weight: float = 1.0  # of the log of the detection score
    iou_weight: float = 2.0  # of the box IoU with the object's last box
    label_weight: float = 10.0  # of having the object's class; a new object gets it too
    max_age: int | None = None  # frames after which an object not seen again is forgotten; None: never, as published
    max_tracks: int | None = None  # objects remembered at most, the latest seen; None: all, as published


PUBLISHED_ASSOCIATION = AssociationConfig()


@dataclass(frozen=True, kw_only=True)
class SipMaskConfig:
    """Everything that changes what is trained or computed."""

    num_classes: int = 80
    profile: Literal["mm", "fc", "vis"] = "mm"  # which released code the losses and the decoding follow
    width: int = 256  # channels of pyramid and towers
    tower_depth: int = 4  # convs of the box tower; the class tower has one less plus the alignment
    norm: Literal["gn", "none"] = "gn"  # in towers and alignment
    align_features: bool = True  # deformable alignment, Sec. 3.1; False: a plain conv in its place
    grid: tuple[int, int] = (2, 2)  # rows, columns of sub-regions, k x k
    num_bases: int = 32  # m
    basis_levels: tuple[Literal["P3", "P4", "P5"], ...] = ("P3", "P4", "P5")  # contextual basis masks, Sec. 3.2
    basis_hidden: int = 512  # channels between the two basis convs
    basis_upsample: int = 4  # basis masks at stride 8 / this
    weighting: Literal["none", "cls", "loc", "cls_loc"] = "cls_loc"  # alpha of Sec. 3.4
    normalize_weighting: bool = True  # mean weight 1 per image as released; False: the paper's literal sum
    center_radius: float | None = 1.5  # centre sampling, in strides; None: the whole box
    rescore: bool = False  # masks get scores of their own from a net that predicts their IoU, Sec. 4.2
    track_depth: int = 0  # convs of the tracking branch, Sec. 3.5; 0: a model for images
    track_channels: int = 512  # numbers by which an object is recognised
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    reduce_normalisers: bool = False  # loss normalisers averaged over processes; fc always does
    backbone: BackboneConfig = CAFFE_R50
    input: InputConfig = CAFFE_INPUT
    inference: InferenceConfig = GREEDY_INFERENCE
    association: AssociationConfig = PUBLISHED_ASSOCIATION  # of video models, Sec. 3.5
    schedule: ScheduleConfig = SCHEDULE_1X

    @property
    def num_coefficients(self) -> int:
        """Coefficient channels a location predicts: rows x columns x bases."""
        return self.grid[0] * self.grid[1] * self.num_bases

    @property
    def basis_stride(self) -> int:
        """Input pixels per cell of the up-sampled basis masks."""
        return 8 // self.basis_upsample

    @property
    def is_video(self) -> bool:
        """The model follows objects through videos."""
        return self.track_depth > 0


MULTI_SCALE_INPUT = replace(CAFFE_INPUT, train_sizes=((640, 1333), (800, 1333)), train_draw="range")
REAL_TIME_INPUT = replace(
    CAFFE_INPUT, resize="fixed", test_size=(544, 544), train_sizes=((576, 576),), augmentation="ssd"
)

# 24 passes of a set repeated 3 (6x) or 5 (10x) times.
SCHEDULE_RT_6X = ScheduleConfig(
    warmup="linear", batch_size=32, length=72, milestones=(60, 69), min_size=32, drop_empty=True
)
SCHEDULE_RT_10X = replace(SCHEDULE_RT_6X, length=120, milestones=(100, 115))
SCHEDULE_FC_1X = replace(SCHEDULE_1X, unit="steps", length=90_000, milestones=(60_000, 80_000), bias_rule_also=())

R101 = replace(CAFFE_R50, name="resnet101")

# High accuracy, mmdetection code.
R50 = SipMaskConfig()
R50_MS_2X = replace(R50, input=MULTI_SCALE_INPUT, schedule=replace(SCHEDULE_1X, length=24, milestones=(20, 23)))
R101_MS_4X = replace(
    R50, backbone=R101, input=MULTI_SCALE_INPUT, schedule=replace(SCHEDULE_1X, length=48, milestones=(40, 46))
)
# The paper's large model trained 6x; nobody released it: steps by analogy to the real-time 6x.
R101_MS_6X = replace(R101_MS_4X, schedule=replace(SCHEDULE_1X, length=72, milestones=(60, 69)))

# Real time, mmdetection code.
R50_RT_6X = replace(
    R50,
    tower_depth=2,
    norm="none",
    input=REAL_TIME_INPUT,
    inference=InferenceConfig(nms="fast", score_threshold=0.1),
    schedule=SCHEDULE_RT_6X,
)
R101_RT_6X = replace(R50_RT_6X, backbone=R101)
R50_RT_10X = replace(R50_RT_6X, norm="gn", schedule=SCHEDULE_RT_10X)
R101_RT_10X = replace(R50_RT_10X, backbone=R101)

# SipMask++: every third block of the last three stages is deformable, masks are scored.
R101_PLUS_6X = replace(
    R101_RT_6X, backbone=replace(R101, deformable_stages=(2, 3, 4), deformable_interval=3), rescore=True
)
R101_PLUS_10X = replace(R101_PLUS_6X, norm="gn", schedule=SCHEDULE_RT_10X)

# High accuracy, fcos_core code.
R50_FC = replace(R50, profile="fc", inference=InferenceConfig(iou_threshold=0.6), schedule=SCHEDULE_FC_1X)
R101_FC_MS_3X = replace(
    R50_FC,
    backbone=R101,
    input=MULTI_SCALE_INPUT,
    schedule=replace(SCHEDULE_FC_1X, length=270_000, milestones=(240_000, 260_000)),
)

# Videos, on YouTube-VIS; training starts from an image model (`sipmask.to_video`).
VIDEO = replace(
    R50,
    num_classes=40,
    profile="vis",
    tower_depth=3,
    track_depth=2,
    input=replace(CAFFE_INPUT, test_size=(360, 640), train_sizes=((360, 640),)),
    inference=InferenceConfig(
        nms="fast", candidates_per_level=200, score_threshold=0.03, max_detections=10, mask_threshold=0.5
    ),
    schedule=replace(SCHEDULE_1X, lr=0.005, batch_size=32, warmup="linear", warmup_steps=1000, warmup_factor=1 / 80),
)
# 649 stands so in the released configuration.
VIDEO_MS = replace(VIDEO, input=replace(VIDEO.input, train_sizes=((360, 649), (480, 960)), train_draw="range"))

# The baseline of Tables 2 to 5: one coefficient set, bases from P3, no alignment, no weighting.
ABLATION = replace(R50, grid=(1, 1), align_features=False, basis_levels=("P3",), weighting="none")

# Trained from nothing on a laptop: BN learns, torchvision's trunk and colours.
SMALL = SipMaskConfig(
    width=64,
    tower_depth=2,
    basis_hidden=64,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=InputConfig(test_size=(256, 512), train_sizes=((256, 512),)),
    schedule=ScheduleConfig(
        optimizer="adamw",
        lr=2e-3,
        weight_decay=1e-4,
        batch_size=8,
        length=40,
        policy="onecycle",
        clip_norm=10.0,
    ),
)
# The demo's: 3 generated shapes at 128 px.
DEMO = replace(
    SMALL,
    num_classes=3,
    input=InputConfig(resize="fixed", test_size=(128, 128), train_sizes=((128, 128),)),
    schedule=replace(SMALL.schedule, unit="steps", length=500),
)
# The same for videos.
VIDEO_SMALL = replace(
    SMALL,
    profile="vis",
    track_depth=2,
    track_channels=64,
    input=replace(SMALL.input, test_size=(128, 256), train_sizes=((128, 256),)),
    inference=VIDEO.inference,
)

VARIANTS = {
    "r50": R50,
    "r50_ms_2x": R50_MS_2X,
    "r101_ms_4x": R101_MS_4X,
    "r101_ms_6x": R101_MS_6X,
    "r50_rt_6x": R50_RT_6X,
    "r50_rt_10x": R50_RT_10X,
    "r101_rt_6x": R101_RT_6X,
    "r101_rt_10x": R101_RT_10X,
    "r101_plus_6x": R101_PLUS_6X,
    "r101_plus_10x": R101_PLUS_10X,
    "r50_fc": R50_FC,
    "r101_fc_ms_3x": R101_FC_MS_3X,
    "video": VIDEO,
    "video_ms": VIDEO_MS,
    "ablation": ABLATION,
    "small": SMALL,
    "demo": DEMO,
    "video_small": VIDEO_SMALL,
}
