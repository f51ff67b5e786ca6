"""`python -m onestage.tables`: repeats the papers' tables and writes a page of what came out."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from tyro.conf import Positional

from onestage.cli.app import guard
from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.config import Precision
from onestage.errors import DatasetError, UsageError
from onestage.machine import usable_cores

if TYPE_CHECKING:
    from onestage.method import Method
    from onestage.tables.spec import Table

PROGRAM = "python -m onestage.tables"
OUTPUT = Path("runs") / "tables"


@dataclass(frozen=True, kw_only=True)
class Tables(Talk):
    """Repeats tables of the papers: trains and evaluates their rows, and writes a page beside the papers' numbers.

    Finished rows are kept and used again; the same command goes on where it was interrupted.
    """

    what: Positional[tuple[str, ...]] = ()  # sessions (table1 .. table8, figure5, all), then packages; default: all
    profile: Literal["full", "smoke"] = "full"  # full: the paper's recipe on COCO; smoke: minutes, on generated shapes
    rows: tuple[str, ...] = ()  # only rows whose name fits: "R50*", case does not matter
    seeds: int = 1  # trainings of each row; from two on there is a spread and claims can be decided
    data: Path | None = None  # COCO's folder; default: COCO_ROOT, for videos YTVIS_ROOT
    weights: Path | None = None  # evaluate these weights, or a folder of <package>-<table>-<row>.safetensors
    weights_backbone: str | None = None  # ImageNet start: a local file, or IMAGENET1K_V1 to download torchvision's
    steps: int | None = None  # cut training short: so many steps in place of the schedule; every number says so
    size: int | None = None  # shorter side of the input, px
    batch_size: int | None = None  # images of a step; learning rate and length follow
    accumulate: int = 1  # forward passes of a step
    limit: int | None = None  # use the first N images of each split
    difficulty: Literal["easy", "medium", "hard"] = "easy"  # of generated shapes
    device: str = "auto"
    precision: Precision = "fp32"  # of training and evaluation; fp16 scales the loss
    workers: int | None = None  # processes that read images, for each training
    processes: int = 1  # GPUs of each training, started by torchrun
    jobs: int | None = None  # trainings side by side; default: one, on generated shapes without a GPU one per core
    output: Path | None = None  # default: runs/tables/<profile>
    records: tuple[Path, ...] = ()  # folders with further records that the page takes numbers from
    report_only: Switch = False  # run nothing, write the page from the records that are there
    dry_run: Switch = False  # say what would be run, and stop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 everything that was asked for has a number, 1 a row failed, 2 usage, 3 data is missing (the page is there),
    130 interrupted.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(words, lambda: _run(parse_flags(Tables, words, PROGRAM), words))


def _run(flags: Tables, words: list[str]) -> int:
    from onestage.tables.plan import GENERATED, ROOTS, chosen_rows, data_of, methods_of, tables_of
    from onestage.tables.record import read_records
    from onestage.tables.reproduce import plan_jobs, run_jobs, title

    def say(text: str) -> None:
        if not flags.quiet:
            print(text, file=sys.stderr, flush=True)

    sessions, packages = _what(flags.what)
    settings = _settings(flags)
    output = flags.output or OUTPUT / flags.profile
    tables = tables_of(methods_of(packages), sessions)
    seeds = range(flags.seeds if flags.weights is None else 1)
    command = shlex.join(["python", "-m", "onestage.tables", *words])
    runnable: list[tuple[Method, Table]] = []
    missing: dict[str, str] = {}
    for method, table in tables:
        try:
            data_of(table, settings)
        except (UsageError, DatasetError) as error:
            if flags.data is not None and all(other.data == table.data for _, other in tables):
                raise
            root = ROOTS[table.data]
            missing[table.data] = f"needs a data set: give --data FOLDER or set {root} ({error.what})"
        else:
            runnable.append((method, table))
    rows = chosen_rows(runnable, flags.rows)
    at_once = flags.jobs or (1 if flags.dry_run or flags.report_only else _side_by_side(flags))
    jobs, reused = plan_jobs(rows, settings, seeds, output, alone=at_once == 1, command=command)
    if flags.profile == "smoke":
        say(f"profile smoke: {GENERATED}, small models, short schedule; no number says anything about the papers' data")
    say(f"{len(rows)} rows of {len(runnable)} tables; {reused} runs are there already, {len(jobs)} trainings to go")
    if flags.dry_run:
        for job in jobs:
            print(title(job))
        return 0
    from onestage.tables.render import write_report  # loads torch

    outcome = None
    if jobs and not flags.report_only:
        signal.signal(signal.SIGTERM, _interrupted)
        outcome = run_jobs(jobs, output, at_once=at_once, reused=reused, say=say)
    records = [record for folder in (*flags.records, output / "records") for record in read_records(folder)]
    asked: dict[tuple[str, str], set[str]] = {}
    for method, table, row in chosen_rows(tables, flags.rows):
        asked.setdefault((method.name, table.number), set()).add(row.name)
    shown = [(method, table) for method, table in tables if (method.name, table.number) in asked]
    page, counts = write_report(
        shown,
        records,
        settings,
        seeds,
        output,
        "-".join(sessions) or "all",
        missing=missing,
        only_rows=asked if flags.rows else None,
    )
    say(f"page: {page.resolve()}")
    return _ending(flags, outcome, missing, command, page, counts, say)


def _ending(
    flags: Tables, outcome: Any, missing: dict[str, str], command: str, page: Path, counts: Any, say: Any
) -> int:
    from onestage.tables.reproduce import title

    code = 0
    if outcome is not None:
        for job, why in outcome.failed:
            print(f"failed: {title(job)}: {why}", file=sys.stderr)
        code = 1 if outcome.failed else 0
        if outcome.stopped is not None:
            say(f"interrupted; go on with: {command}")
            code = outcome.stopped
    if missing and not code:
        for text in missing.values():
            print(f"not run: {text}", file=sys.stderr)
        print("  to try without data: add --profile smoke", file=sys.stderr)
        code = DatasetError.exit_code
    if flags.json:
        print(json.dumps({"page": str(page), "claims": counts, "missing": missing, "exit_code": code}))
    return code


def _what(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sessions and the packages among the words; without packages, all that are installed."""
    sessions = [word for word in words if word == "all" or word.startswith(("table", "figure"))]
    packages = [word for word in words if word not in sessions]
    if not packages:
        packages = sorted(entry_points(group="onestage.methods").names)
    if not packages:
        raise UsageError("no paper package is installed", "python -m pip install ./<package>, or name one that is")
    return sessions or ["all"], packages


def _settings(flags: Tables) -> Any:
    from onestage.tables.plan import Settings

    real = {name: getattr(flags, name) for name in ("data", "weights", "weights_backbone") if getattr(flags, name)}
    if flags.profile == "smoke" and real:
        raise UsageError(f"--{next(iter(real)).replace('_', '-')} and --profile smoke exclude each other", "drop one")
    if flags.weights is not None and not flags.weights.exists():
        raise UsageError(f"--weights '{flags.weights}' does not exist", "name a .safetensors file, or a folder of them")
    if flags.seeds < 1 or (flags.jobs is not None and flags.jobs < 1) or flags.processes < 1:
        raise UsageError("--seeds, --jobs and --processes count from 1", "give at least 1")
    return Settings(
        profile=flags.profile,
        data=None if flags.data is None else str(flags.data),
        weights=None if flags.weights is None else str(flags.weights),
        weights_backbone=flags.weights_backbone,
        steps=flags.steps,
        size=flags.size,
        batch_size=flags.batch_size,
        limit=flags.limit,
        difficulty=flags.difficulty,
        device=flags.device,
        precision=flags.precision,
        workers=flags.workers,
        processes=flags.processes,
        accumulate=flags.accumulate,
    )


def _side_by_side(flags: Tables) -> int:
    """One training per core where small ones run without a GPU, else one."""
    import torch

    if flags.profile == "full" or (flags.device == "auto" and torch.cuda.is_available()) or "cuda" in flags.device:
        return 1
    return min(usable_cores(), 4)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(128 + number)
