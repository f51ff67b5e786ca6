"""MEInst's switches as one frozen value, and every named configuration the paper and its code use.

Where paper and released code differ the code is followed, and a switch has the paper's form.
"""

from dataclasses import dataclass, replace
from typing import Literal

from onestage.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, InputConfig, ScheduleConfig
from onestage.errors import UsageError

R50_TRUNK = BackboneConfig(stride_in_1x1=True)
# MSRA's trunks want BGR of 0..255 without division, FAIR's ResNeXt divides.
BGR_INPUT = InputConfig(
    antialias=True, frame_scale="sizes", channel_order="bgr", mean=IMAGENET_MEAN[::-1], std=(1.0, 1.0, 1.0)
)
RESNEXT_INPUT = replace(BGR_INPUT, std=IMAGENET_STD[::-1])
SIZES_3X = tuple((short, 1333) for short in (640, 672, 704, 736, 768, 800))
SIZES_512 = tuple((short, 1333) for short in (384, 416, 448, 480, 512, 544))

SCHEDULE_1X = ScheduleConfig(
    unit="steps",
    length=90_000,
    milestones=(60_000, 80_000),
    warmup="constant",
    norm_decay=False,
    drop_empty=True,
)
SCHEDULE_3X = replace(
    SCHEDULE_1X,
    length=270_000,
    milestones=(180_000, 240_000),
    warmup="linear",
    warmup_steps=1000,
    warmup_factor=0.001,
)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """From raw outputs to detections (docs/methods/meinst.md)."""

    candidates_per_level: int = 1000  # best (location, class) pairs of each level
    score_threshold: float = 0.05  # on the class score
    threshold_with_centerness: bool = False  # on class score x centerness instead
    iou_threshold: float = 0.6
    max_detections: int = 100  # more where several score as the last one
    mask_threshold: float = 0.5


RELEASED_INFERENCE = InferenceConfig()


@dataclass(frozen=True, kw_only=True)
class MEInstConfig:
    """Everything that changes what is trained or computed."""

    num_classes: int = 80
    width: int = 256  # channels of pyramid and towers
    tower_depth: int = 4  # convs of each of the class, box and mask tower
    shared_depth: int = 0  # convs before the three towers, read by all of them
    norm: Literal["gn", "none"] = "gn"  # in towers
    scales: bool = True  # one learnable factor per level on the box distances
    deformable: Literal["none", "last", "all"] = "none"  # convs of the towers, Sec. 3.3
    modulated: bool = False  # DCNv2 as the paper cites; False: v1 as released
    large_kernel: int = 0  # odd side k of the mask prediction layer's k x 1 and 1 x k convs, Table 5; 0: a 3x3 conv
    mask_branch: bool = True  # False: the detector alone, Table 6
    mask_size: int = 28  # sqrt(D), side of the mask that is encoded
    encoding: Literal["pca", "none"] = "pca"  # none: the network predicts mask_size^2 logits, Table 3
    code_length: int = 60  # N
    whiten: bool = True  # divides a code by its standard deviations; False: Eq. 1 and 2 as printed
    noisy_logits: bool = True  # masks become noisy logits before encoding, a sigmoid undoes it; False: as printed
    class_agnostic: bool = True  # False: one set of components per class, Fig. 5
    encoding_file: str = ""  # what `fit_encoding` wrote; empty: training fits the encoding on its own masks first
    mask_loss: Literal["l2", "l1", "smooth_l1", "cosine"] = "l2"  # between codes, Table 4
    loss_on_mask: bool = False  # compares decoded masks instead of codes: "implicit" encoding, Table 3
    box_loss: Literal["giou", "iou", "linear_iou"] = "giou"
    center_radius: float | None = 1.5  # centre sampling, in strides; None: the whole box
    level_limits: tuple[int, int, int, int] = (64, 128, 256, 512)  # largest distance P3 to P6 answer for, px
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    backbone: BackboneConfig = R50_TRUNK
    input: InputConfig = BGR_INPUT
    inference: InferenceConfig = RELEASED_INFERENCE
    schedule: ScheduleConfig = SCHEDULE_1X

    def __post_init__(self) -> None:
        if self.large_kernel and (self.large_kernel < 0 or self.large_kernel % 2 == 0):
            raise UsageError(f"large_kernel is {self.large_kernel}", "use an odd number, or 0 for a 3x3 conv")

    @property
    def num_codes(self) -> int:
        """Mask channels a location predicts: N, or all pixels without an encoding."""
        return self.code_length if self.encoding == "pca" else self.mask_size**2

    @property
    def level_ranges(self) -> tuple[tuple[float, float], ...]:
        """Smallest and largest distance each level answers for, px, inclusive, P3..P7."""
        return tuple(zip((-1.0, *self.level_limits), (*self.level_limits, 1e8), strict=True))


R101_TRUNK = BackboneConfig(name="resnet101", stride_in_1x1=True)
X101_TRUNK = BackboneConfig(name="resnext101_32x8d")

# 12 epochs at 800 px; "dcn": the last conv of each tower is deformable.
R50 = MEInstConfig()
R50_DCN = replace(R50, deformable="last")
R50_LK = replace(R50, large_kernel=9)
R101 = replace(R50, backbone=R101_TRUNK)
R101_DCN = replace(R101, deformable="last")
X101 = replace(R50, backbone=X101_TRUNK, input=RESNEXT_INPUT)
X101_DCN = replace(X101, deformable="last")

# 36 epochs, several sizes. The released ones are R-50 with deformable towers.
R50_DCN_3X = replace(R50_DCN, input=replace(BGR_INPUT, train_sizes=SIZES_3X), schedule=SCHEDULE_3X)
R50_DCN_512_3X = replace(
    R50_DCN, input=replace(BGR_INPUT, train_sizes=SIZES_512, test_size=(512, 1333)), schedule=SCHEDULE_3X
)
R101_3X = replace(R101, input=replace(BGR_INPUT, train_sizes=SIZES_3X), schedule=SCHEDULE_3X)
X101_3X = replace(X101, input=replace(RESNEXT_INPUT, train_sizes=SIZES_3X), schedule=SCHEDULE_3X)
X101_DCN_3X = replace(X101_3X, deformable="last")

# Rows of Tables 3 and 6; Tables 2 and 4 are R50_DCN with another code_length or mask_loss.
IMPLICIT = replace(R50_DCN, loss_on_mask=True)
NO_ENCODING = replace(R50_DCN, encoding="none")
BOXES_ONLY = replace(R50_DCN, mask_branch=False)

# Trained from nothing on a laptop: BN learns, torchvision's trunk and colours.
SMALL = MEInstConfig(
    width=64,
    tower_depth=2,
    backbone=BackboneConfig(name="resnet18", norm="train", frozen_stages=0),
    input=InputConfig(frame_scale="sizes", test_size=(256, 512), train_sizes=((256, 512),)),
    schedule=ScheduleConfig(optimizer="adamw", lr=2e-3, batch_size=8, length=40, policy="onecycle", clip_norm=10.0),
)
# The demo's: 3 generated shapes at 128 px.
DEMO = replace(
    SMALL,
    num_classes=3,
    input=InputConfig(resize="fixed", test_size=(128, 128), train_sizes=((128, 128),)),
    schedule=replace(SMALL.schedule, unit="steps", length=350),
)

VARIANTS = {
    "r50": R50,
    "r50_dcn": R50_DCN,
    "r50_dcn_3x": R50_DCN_3X,
    "r50_dcn_512_3x": R50_DCN_512_3X,
    "r50_lk": R50_LK,
    "r101": R101,
    "r101_dcn": R101_DCN,
    "r101_3x": R101_3X,
    "x101": X101,
    "x101_dcn": X101_DCN,
    "x101_3x": X101_3X,
    "x101_dcn_3x": X101_DCN_3X,
    "implicit": IMPLICIT,
    "no_encoding": NO_ENCODING,
    "boxes_only": BOXES_ONLY,
    "small": SMALL,
    "demo": DEMO,
}
