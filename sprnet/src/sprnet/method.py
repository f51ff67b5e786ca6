"""SPRNet as the core's engine and command line see it."""

from typing import TYPE_CHECKING

from onestage.method import Method
from sprnet.config import VARIANTS, SPRNetConfig

if TYPE_CHECKING:
    from onestage.tables.spec import Table
    from sprnet.model import SPRNet


def build(config: SPRNetConfig) -> "SPRNet":
    """A new model in train mode, with the initial weights of the method; the trunk's are random, too."""
    from sprnet.model import SPRNet

    return SPRNet(config)


def tables() -> "tuple[Table, ...]":
    """Every table of the paper: its numbers, and the configuration of each row that can be run."""
    from sprnet.tables import TABLES

    return TABLES


METHOD = Method(
    name="sprnet",
    title="SPRNet (2019): RetinaNet on a gated pyramid, masks decoded from single pixels",
    config_type=SPRNetConfig,
    variants=VARIANTS,
    default_variant="r50_800",
    small_variant="small",
    demo_variant="demo",
    build=build,
    unreleased="neither code nor models of the paper were ever released",
    tables=tables,
)
