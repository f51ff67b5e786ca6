"""From rows to work: which configuration a row runs with, on which data, and what it shares with other rows.

Two keys say what is the same. The key of a training covers everything that training reads; the key of an entry covers
that and everything its evaluation reads. A record carries its entry's key: that is how finished work is found again.
Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onestage.config import InputConfig, Precision, config_from_dict, for_trunk, of_length, rescaled, resized
from onestage.errors import DatasetError, UsageError, some
from onestage.files import file_digest
from onestage.method import Method
from onestage.tables.record import digest, file_stem
from onestage.tables.spec import Row, Table, small_config

if TYPE_CHECKING:
    from onestage.data.coco import Split

SMOKE_STEPS = 200  # of 8 images: about 90 s of two cores, and Table 1 of five papers within 45 minutes
SMOKE_SIZE = 128
# Generated images, and of tables on videos generated clips, to train on and to evaluate on.
SMOKE_COUNTS = {"coco": (2000, 100), "ytvis": (160, 20)}
GENERATED = "generated shapes, not COCO"
# What names the folder of a data set where `data` does not.
ROOTS = {"coco": "COCO_ROOT", "ytvis": "YTVIS_ROOT"}


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
        precision: bf16 and fp16 train and evaluate under autocast.
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
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    device: str = "auto"
    precision: Precision = "fp32"
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
        train, val = self.counts("coco")
        images = f"{train} images of {self.size or SMOKE_SIZE} px ({self.difficulty})"
        return f"{self.steps or SMOKE_STEPS} steps on {images}, evaluated on {val}"

    def counts(self, data: str) -> tuple[int, int]:
        """Generated images, or clips, that the small profile trains on and is evaluated on."""
        train, val = SMOKE_COUNTS[data]
        return self.limit or train, min(self.limit or val, val)

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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does.

    Args:
        package: Import name.
        seed: Of the training.
        rows: (number of a table, name of a row), all with the same training.
        settings: How.
        output: Folder with `records`, `trainings` and `pictures`.
        alone: No other job runs beside this one, so that latencies can be measured.
        command: What the user typed, for the record.
    """

    package: str
    seed: int
    rows: tuple[tuple[str, str], ...]
    settings: Settings
    output: str
    alone: bool = False
    command: str = ""

    def write(self, path: Path) -> None:
        """To a file that `Job.read` reads."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Job:
        """What `write` wrote."""
        return config_from_dict(Job, json.loads(path.read_text(encoding="utf-8")), str(path))

    def entries(self) -> list[Entry]:
        """Its rows, with their configurations and keys."""
        (method,) = methods_of([self.package])
        tables = {table.number: table for table in method.tables()}
        found = [(tables[number], tables[number].row(name)) for number, name in self.rows]
        return [entry_of(method, table, row, self.settings, self.seed) for table, row in found]


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
            installed = ", ".join(sorted(entry_points(group="onestage.methods").names)) or "none"
            raise UsageError(
                f"package '{package}' is not installed", f"installed are: {installed}; others by pip from the checkout"
            ) from error
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
            input=_scaled(config.input, factor),
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
        UsageError, DatasetError: profile `full` and no data; see `splits_of`.
    """
    if settings.profile == "smoke":
        train, val = settings.counts(table.data)
        facts: dict[str, Any] = {"name": GENERATED, "format": table.data, "size": settings.size or SMOKE_SIZE}
        if table.data == "coco":
            facts["difficulty"] = settings.difficulty
        return facts | {"train": train, "val": val}
    splits = splits_of(table, settings)
    hashes = {f"{name}_sha256": _hash_of(split.json) for name, split in splits.items()}
    return {"name": splits["val"].json.name, "format": table.data, "limit": settings.limit, **hashes}


def splits_of(table: Table, settings: Settings) -> dict[str, Split]:
    """Where the `train` and the `val` part of a table's data lie: below `data`, or where ROOTS says.

    Raises:
        UsageError, DatasetError: nothing says where, or what lies there is no such data set; see `locate`.
    """
    from onestage.data.coco import locate  # loads torch, which planning on generated data does without

    folder = None if settings.data is None else Path(settings.data)
    parts: tuple[Literal["train", "val"], ...] = ("train", "val")
    splits: dict[str, Split] = {part: locate(folder, part, variable=ROOTS[table.data]) for part in parts}
    if table.data == "ytvis" and (strange := [split for split in splits.values() if split.layout != "YouTube-VIS"]):
        raise DatasetError(
            f"'{strange[0].json}' has the layout of images ({strange[0].layout}), and {table.title} is on videos",
            "give a data set in YouTube-VIS layout; to try without: python -m onestage.synth clips --video",
        )
    return splits


def read_by_training(config: Any, method: Method) -> Mapping[str, Any]:
    """The part of a configuration that training reads: without `Method.after_training` and the input's test size."""
    values = {name: value for name, value in asdict(config).items() if name not in method.after_training}
    values["input"] = {name: value for name, value in values["input"].items() if name != "test_size"}
    return values


def _scaled(config: InputConfig, factor: float) -> InputConfig:
    """The input with every size times `factor`."""
    test, *train = [(round(h * factor), round(w * factor)) for h, w in (config.test_size, *config.train_sizes)]
    return replace(config, test_size=test, train_sizes=tuple(train))


@functools.cache
def _hash_of(path: Path) -> str:
    return file_digest(path)
