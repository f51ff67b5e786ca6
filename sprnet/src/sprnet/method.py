"""SPRNet as the core's engine and command line see it."""

from typing import TYPE_CHECKING, NoReturn

from onestage.method import Method
from sprnet.config import VARIANTS, SPRNetConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sprnet.model import SPRNet


def build(config: SPRNetConfig) -> "SPRNet":
    from sprnet.model import SPRNet

    return SPRNet(config)


def convert(state: "dict[str, Tensor]", config: SPRNetConfig) -> NoReturn:
    from sprnet.convert import convert_state_dict

    convert_state_dict(state, config)


def infer_config(state: "dict[str, Tensor]") -> NoReturn:
    from sprnet.convert import config_of

    config_of(state)


METHOD = Method(
    name="sprnet",
    title="SPRNet (2019): RetinaNet on a gated pyramid, masks decoded from single pixels",
    config_type=SPRNetConfig,
    variants=VARIANTS,
    default_variant="r50_800",
    small_variant="small",
    demo_variant="demo",
    build=build,
    convert=convert,
    infer_config=infer_config,
)
