"""SAIS as the core's engine and command line see it."""

from typing import TYPE_CHECKING

from onestage.method import Method
from sais.config import VARIANTS, SAISConfig

if TYPE_CHECKING:
    from onestage.tables.spec import Table
    from sais.model import SAIS


def build(config: SAISConfig) -> "SAIS":
    """A new model in train mode, with the initial weights of the method; the trunk's are random, too."""
    from sais.model import SAIS

    return SAIS(config)


def tables() -> "tuple[Table, ...]":
    """Every table of the paper: its numbers, and the configuration of each row that can be run."""
    from sais.tables import TABLES

    return TABLES


METHOD = Method(
    name="sais",
    title="SAIS (2019): FCOS with prototype masks and centre-aware targets",
    config_type=SAISConfig,
    variants=VARIANTS,
    default_variant="r50_768",
    small_variant="small",
    demo_variant="demo",
    build=build,
    unreleased="the code and the weights behind the paper's tables were never released",
    tables=tables,
)
