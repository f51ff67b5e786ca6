"""MEInst as the core's engine and command line see it."""

from typing import TYPE_CHECKING, Any

from meinst.config import VARIANTS, MEInstConfig
from onestage.method import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from meinst.model import MEInst
    from onestage.tables.spec import Table


def build(config: MEInstConfig) -> "MEInst":
    """A model with drawn parameters and no fitted encoding."""
    from meinst.model import MEInst

    return MEInst(config)


def convert(state: "dict[str, Tensor]", config: MEInstConfig) -> "tuple[dict[str, Tensor], list[str]]":
    """`meinst.convert.convert_state_dict`."""
    from meinst.convert import convert_state_dict

    return convert_state_dict(state, config)


def infer_config(state: "dict[str, Tensor]") -> MEInstConfig:
    """`meinst.convert.config_of`."""
    from meinst.convert import config_of

    return config_of(state)


def prepare(model: "nn.Module", train_set: Any) -> None:
    """`meinst.fit.prepare_codec`."""
    from meinst.fit import prepare_codec

    prepare_codec(model, train_set)


def fit_encoding(words: list[str]) -> int:
    """Fits the mask encoding on annotations alone and says how well it brings masks back."""
    from meinst.fit_encoding import run

    return run(words)


def tables() -> "tuple[Table, ...]":
    """The paper's tables (`meinst.tables`)."""
    from meinst.tables import TABLES

    return TABLES


METHOD = Method(
    name="meinst",
    title="MEInst (CVPR 2020): a mask as a short code beside each box",
    config_type=MEInstConfig,
    variants=VARIANTS,
    default_variant="r50",
    small_variant="small",
    demo_variant="demo",
    build=build,
    convert=convert,
    infer_config=infer_config,
    prepare=prepare,
    polygons=True,
    extra_verbs={"fit_encoding": fit_encoding},
    tables=tables,
)
