"""RDSNet as the core's engine and command line see it."""

from typing import TYPE_CHECKING, Any

from onestage.method import Method
from rdsnet.config import VARIANTS, RDSNetConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from onestage.tables.spec import Table


def build(config: RDSNetConfig) -> "nn.Module":
    if config.detector == "yolact":
        from rdsnet.small import RDSNetSmall

        return RDSNetSmall(config)
    from rdsnet.model import RDSNet

    return RDSNet(config)


def convert(state: "dict[str, Tensor]", config: RDSNetConfig) -> "tuple[dict[str, Tensor], list[str]]":
    from rdsnet.convert import convert_state_dict

    return convert_state_dict(state, config)


def infer_config(state: "dict[str, Tensor]") -> RDSNetConfig:
    from rdsnet.convert import config_of

    return config_of(state)


def train_mbrm(words: list[str]) -> int:
    """Trains MBRM, which refines boxes by masks, after the network; everything else stays."""
    from rdsnet.train_mbrm import run

    return run(words)


def finish(model: Any, train_set: Any) -> RDSNetConfig:
    from rdsnet.refine import train_refinement

    return train_refinement(model, train_set)


def tables() -> "tuple[Table, ...]":
    from rdsnet.tables import TABLES

    return TABLES


METHOD = Method(
    name="rdsnet",
    title="RDSNet (AAAI 2020): masks from correlated object and pixel vectors, box sides read off masks",
    config_type=RDSNetConfig,
    variants=VARIANTS,
    default_variant="r50",
    small_variant="small",
    demo_variant="demo",
    build=build,
    convert=convert,
    infer_config=infer_config,
    extra_verbs={"train_mbrm": train_mbrm},
    finish=finish,
    after_training=("inference", "refine"),
    tables=tables,
)
