"""`Method`: the value with which a paper's package hands itself to the core's engine and command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from onestage.tables.spec import Table


@dataclass(frozen=True, kw_only=True)
class Method:
    """A paper package as the core sees it. Nothing in it imports torch until it is called.

    Args:
        name: Import name of the package and of its command.
        title: One line for help texts and pages.
        config_type: The frozen config dataclass; has `num_classes`, `backbone`, `input`, `schedule`, `inference`.
        variants: Name to config; the names are what `--variant` takes.
        default_variant: What train and eval use when none is named.
        small_variant: A variant that trains on a laptop; `--small` and the documentation use it.
        demo_variant: What `demo` trains.
        build: Config to model. Parameters are initialised by the recipe, no weights are loaded.
        convert: (official state dict, config) to (our state dict, notes); accounts for every tensor or raises
            WeightsError. None where no official weights exist.
        infer_config: Official state dict to the config that fits it; raises WeightsError if none does. None as above.
        unreleased: Why there is nothing to convert, for the message; of methods without `convert`.
        extra_verbs: Name to a function from the words after the verb to the exit code; help texts show the first line
            of its docstring.
        prepare: (model, training data) before training from nothing, for what a method takes from the annotations;
            None where there is no such thing.
        polygons: Training targets carry polygons too.
        is_video: Config to whether its model follows objects through videos: then training samples are pairs of frames
            (`Target.reference`), evaluation runs over videos, and the model has `tracker()`.
        track: Settings of `predict`, by name, to what `--json` prints: follows objects through the video that `source`
            names. None where no model does.
        finish: (trained model, training data) to its new config: a second stage that leaves the trained network as it
            is, run by `demo`; after `train` it is a verb of its own. None where there is no such thing.
        after_training: Fields of the config that training does not read: rows of a table that differ in nothing else
            share one training.
        tables: The paper's tables, as data.
    """

    name: str
    title: str
    config_type: type
    variants: Mapping[str, Any]
    default_variant: str
    small_variant: str
    demo_variant: str
    build: Callable[[Any], nn.Module]
    convert: Callable[[dict[str, Tensor], Any], tuple[dict[str, Tensor], list[str]]] | None = None
    infer_config: Callable[[dict[str, Tensor]], Any] | None = None
    unreleased: str = ""
    extra_verbs: Mapping[str, Callable[[list[str]], int]] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Any], None] | None = None
    polygons: bool = False
    is_video: Callable[[Any], bool] = lambda config: False
    track: Callable[..., dict[str, Any]] | None = None
    finish: Callable[[nn.Module, Any], Any] | None = None
    after_training: tuple[str, ...] = ("inference",)
    tables: Callable[[], Sequence[Table]] = tuple
