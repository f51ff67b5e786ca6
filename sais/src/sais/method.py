"""SAIS as the core's engine and command line see it."""

from typing import TYPE_CHECKING, NoReturn

from onestage.method import Method
from sais.config import VARIANTS, SAISConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sais.model import SAIS


def build(config: SAISConfig) -> "SAIS":
    from sais.model import SAIS

    return SAIS(config)


def convert(state: "dict[str, Tensor]", config: SAISConfig) -> NoReturn:
    from sais.convert import convert_state_dict

    convert_state_dict(state, config)


def infer_config(state: "dict[str, Tensor]") -> NoReturn:
    from sais.convert import config_of

    config_of(state)


METHOD = Method(
    name="sais",
    title="SAIS (2019): FCOS with prototype masks and centre-aware targets",
    config_type=SAISConfig,
    variants=VARIANTS,
    default_variant="r50_768",
    small_variant="small",
    demo_variant="demo",
    build=build,
    convert=convert,
    infer_config=infer_config,
)
