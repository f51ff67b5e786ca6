"""SipMask as the core's engine and command line see it."""

from typing import TYPE_CHECKING, Any

from onestage.method import Method
from sipmask.config import VARIANTS, SipMaskConfig

if TYPE_CHECKING:
    from torch import Tensor

    from onestage.tables.spec import Table
    from sipmask.model import SipMask


def build(config: SipMaskConfig) -> "SipMask":
    """The model of a configuration, initialised by the recipe, without weights."""
    from sipmask.model import SipMask

    return SipMask(config)


def convert(state: "dict[str, Tensor]", config: SipMaskConfig) -> "tuple[dict[str, Tensor], list[str]]":
    """Our state dict from an official one and notes on what was left out: `sipmask.convert.convert_state_dict`."""
    from sipmask.convert import convert_state_dict

    return convert_state_dict(state, config)


def infer_config(state: "dict[str, Tensor]") -> SipMaskConfig:
    """The configuration that fits an official state dict: `sipmask.convert.config_of`."""
    from sipmask.convert import config_of

    return config_of(state)


def is_video(config: SipMaskConfig) -> bool:
    """Whether a model of this configuration follows objects through videos."""
    return config.is_video


def to_video(words: list[str]) -> int:
    """A video model that starts from an image model, to be trained."""
    from sipmask.to_video import run

    return run(words)


def track(words: list[str]) -> int:
    """Follows objects through a video, a folder of frames or a camera."""
    from sipmask.track import run

    return run(words)


def follow(**settings: Any) -> dict[str, Any]:
    """Follows objects as the verb `track` with these flags does, by name; returns what `--json` prints."""
    from sipmask.track import Track, track

    return track(Track(**settings))


def tables() -> "tuple[Table, ...]":
    """The tables of the paper, as data."""
    from sipmask.tables import TABLES

    return TABLES


METHOD = Method(
    name="sipmask",
    title="SipMask (ECCV 2020): one coefficient set per sub-region of a box",
    config_type=SipMaskConfig,
    variants=VARIANTS,
    default_variant="r50",
    small_variant="small",
    demo_variant="demo",
    build=build,
    convert=convert,
    infer_config=infer_config,
    is_video=is_video,
    track=follow,
    extra_verbs={"to_video": to_video, "track": track},
    tables=tables,
)
