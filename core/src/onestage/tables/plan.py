"""From rows to work: which configuration a row runs with, on which data, and what it shares with other rows.

Two keys say what is the same. The key of a training covers everything that training reads; the key of an entry covers
that and everything its evaluation reads. A record carries its entry's key: that is how finished work is found again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from onestage.config import for_trunk, of_length, resized
from onestage.data.coco import locate
from onestage.data.synth import DifficultyName
from onestage.engine.schedule import rescaled
from onestage.errors import UsageError, some
from onestage.method import Method
from onestage.tables.record import digest, file_digest, file_stem
from onestage.tables.spec import Row, Table, small_config

SMOKE_STEPS = 300  # of 8 images: about 90 s of both cores of a small machine
SMOKE_TRAIN, SMOKE_VAL, SMOKE_SIZE = 2000, 100, 128
GENERATED = "generated shapes, not COCO"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tables are run. Whatever makes a run differ from the paper's recipe shows up in `departures`.

    Args:
        profile: full: the paper's configuration on a data set; smoke: a small one on generated shapes.
        data: Folder of the data set, full.
        weights: Evaluate these and train nothing: a file for the one training that the rows share, or a folder that
            holds `<package>-<table>-<row>.safetensors`; full.
        weights_backbone: ImageNet start of the trunk, as `train` takes it; full.
        steps: Optimiser steps in place of the recipe's length.
        size: Shorter side of the input in place of the recipe's, px.
        batch_size: Images of a step in place of the recipe's; learning rate and length follow.
        limit: Use the first so many images of each split.
        difficulty: Of generated shapes.
        device: auto, cpu, cuda, cuda:N.
        precision: bf16 trains and evaluates under autocast.
        workers: Processes that read images, for each training.
        processes: Processes of each training; more than one starts them with torchrun.
        accumulate: Forward passes of a step.
    """

    profile: Literal["full", "smoke"] = "smoke"
    data: str | None = None
    weights: str | None = None
    weights_backbone: str | None = None
    steps: int | None = None
    size: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    difficulty: DifficultyName = "easy"
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int | None = None
    processes: int = 1
    accumulate: int = 1

    @property
    def label(self) -> str:
        """What stands beside every number; empty where the paper's recipe was followed on real data."""
        if self.profile == "smoke":
            return GENERATED
        return "cut short" if self.departures else ""

    @property
    def recipe(self) -> str:
        """How long, how large and on how much the small profile trains."""
        images = f"{self.limit or SMOKE_TRAIN} images of {self.size or SMOKE_SIZE} px ({self.difficulty})"
        return f"{self.steps or SMOKE_STEPS} steps on {images}, evaluated on {min(self.limit or SMOKE_VAL, SMOKE_VAL)}"

    @property
    def departures(self) -> tuple[str, ...]:
        """What was asked to differ from the recipe."""
        if self.profile == "smoke":
            return ()
        found = {
            "{} steps in place of the schedule": self.steps,
            "input {} px": self.size,
            "batches of {}": self.batch_size,
            "the first {} images of each split": self.limit,
        }
        start = [] if self.weights_backbone or self.weights else ["trunk from random numbers, not from ImageNet"]
        return (*(text.format(value) for text, value in found.items() if value is not None), *start)


@dataclass(frozen=True)
class Entry:
    """A row that can be run, with one seed.

    Args:
        method: Whose row.
        table: Its table.
        row: The row.
        seed: Of the initial parameters, the order of the data and every draw.
        config: What is trained and evaluated; its number of classes is the paper's until the data are open.
        training: Key of the training, or of the weights; rows that measure by themselves have one of their own.
        key: Key of the entry.
    """

    method: Method
    table: Table
    row: Row
    seed: int
    config: Any
    training: str
    key: str


def methods_of(packages: Sequence[str]) -> list[Method]:
    """The methods of paper packages by import name.

    Raises:
        UsageError: no such package, or one without tables.
    """
    methods = []
    for package in packages:
        try:
            method: Method = import_module(f"{package}.method").METHOD
        except ModuleNotFoundError as error:
            if error.name not in (package, f"{package}.method"):
                raise
            raise UsageError(f"package '{package}' is not installed", f"python -m pip install ./{package}") from error
        methods.append(method)
    return methods


def tables_of(methods: Sequence[Method], sessions: Sequence[str]) -> list[tuple[Method, Table]]:
    """Every table that the sessions name; "all" names all.

    Raises:
        UsageError: a session that no package has.
    """
    known = [(method, table) for method in methods for table in method.tables()]
    names = list(dict.fromkeys(table.session for _, table in sorted(known, key=lambda pair: pair[1].session)))
    if unknown := [session for session in sessions if session not in (*names, "all")]:
        owners = ", ".join(method.name for method in methods)
        raise UsageError(f"no {some(unknown)} in {owners}", f"use one of: {', '.join([*names, 'all'])}")
    return [(method, table) for method, table in known if table.session in sessions or "all" in sessions]


def chosen_rows(tables: Sequence[tuple[Method, Table]], patterns: Sequence[str]) -> list[tuple[Method, Table, Row]]:
    """The rows whose name fits one of the patterns (`R50*`, case does not matter); all without a pattern.

    Raises:
        UsageError: nothing fits.
    """
    rows = [(method, table, row) for method, table in tables for row in table.rows]
    fitting = [
        (method, table, row)
        for method, table, row in rows
        if not patterns or any(fnmatchcase(row.name.lower(), pattern.lower()) for pattern in patterns)
    ]
    if rows and not fitting:
        names = some([row.name for _, _, row in rows if row.config is not None], 12)
        raise UsageError(f"no row fits --rows {' '.join(patterns)}", f"rows are: {names}")
    return fitting


def entries_of(rows: Sequence[tuple[Method, Table, Row]], settings: Settings, seeds: Sequence[int]) -> Iterator[Entry]:
    """The rows that can be run, as often as there are seeds; those with the same key once."""
    seen = set()
    for seed in seeds:
        for method, table, row in rows:
            if row.config is None or (settings.weights and not weights_of(method, table, row, settings).is_file()):
                continue
            entry = entry_of(method, table, row, settings, seed)
            if entry.key not in seen:
                seen.add(entry.key)
                yield entry


def entry_of(method: Method, table: Table, row: Row, settings: Settings, seed: int) -> Entry:
    """One row with one seed. Reads the annotation files' hashes in profile `full`, but opens no data."""
    config = config_of(method, row, settings)
    source: dict[str, Any] = {"package": method.name, "data": data_of(table, settings), "precision": settings.precision}
    if row.measure is not None:
        source |= {"measure": f"{method.name} {table.number} {row.name}"}
    elif settings.weights is not None:
        source |= {"weights": file_digest(weights_of(method, table, row, settings))}
    else:
        source |= {"seed": seed, "start": settings.weights_backbone, "config": read_by_training(config, method)}
    training = digest(source)
    key = digest({"training": training, "config": asdict(config), "finish": row.finish})
    return Entry(method, table, row, seed, config, training, key)


def config_of(method: Method, row: Row, settings: Settings) -> Any:
    """The configuration that a row runs with under the settings."""
    assert row.config is not None
    if settings.profile == "smoke":
        demo = method.variants[method.demo_variant]
        config = small_config(row, method.variants[method.default_variant], demo)
        factor = (settings.size or SMOKE_SIZE) / SMOKE_SIZE
        config = replace(
            config,
            input=resized(config.input, round(config.input.test_size[0] * factor)),
            schedule=of_length(config.schedule, SMOKE_STEPS, "steps"),
        )
    else:
        config = row.config if settings.weights else for_trunk(row.config, settings.weights_backbone)
        if settings.size is not None:
            config = replace(config, input=resized(config.input, settings.size))
    schedule = config.schedule
    if settings.batch_size is not None:
        schedule = rescaled(schedule, settings.batch_size)
    if settings.steps is not None:
        schedule = of_length(schedule, settings.steps, "steps")
    return replace(config, schedule=schedule)


def weights_of(method: Method, table: Table, row: Row, settings: Settings) -> Path:
    """The file that `weights` means for a row; it need not be there."""
    assert settings.weights is not None
    path = Path(settings.weights)
    return path / f"{file_stem(f'{method.name}-{table.number}-{row.name}')}.safetensors" if path.is_dir() else path


def data_of(table: Table, settings: Settings) -> dict[str, Any]:
    """What the data are, as far as results depend on it.

    Raises:
        UsageError, DatasetError: profile `full` and no data; see `locate`.
    """
    if settings.profile == "smoke":
        size = settings.size or SMOKE_SIZE
        counts = {"train": settings.limit or SMOKE_TRAIN, "val": min(settings.limit or SMOKE_VAL, SMOKE_VAL)}
        return {"name": GENERATED, "format": table.data, "difficulty": settings.difficulty, "size": size, **counts}
    splits = {split: locate(data_folder(settings), split) for split in ("train", "val")}
    hashes = {f"{name}_sha256": _hash_of(split.json) for name, split in splits.items()}
    return {"name": splits["val"].json.name, "format": table.data, "limit": settings.limit, **hashes}


def data_folder(settings: Settings) -> Path | None:
    """The folder that `--data` names, or None for the environment's."""
    return None if settings.data is None else Path(settings.data)


def read_by_training(config: Any, method: Method) -> Mapping[str, Any]:
    """The part of a configuration that training reads: without `Method.after_training` and the input's test size."""
    values = {name: value for name, value in asdict(config).items() if name not in method.after_training}
    values["input"] = {name: value for name, value in values["input"].items() if name != "test_size"}
    return values


@functools.cache
def _hash_of(path: Path) -> str:
    return file_digest(path)
