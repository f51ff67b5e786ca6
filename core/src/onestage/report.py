"""`python -m onestage.report RUN...`: one page from run folders: curves, numbers side by side, what differs."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from onestage.cli.app import guard, set_up_log
from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.errors import DatasetError, UsageError

PROGRAM = "python -m onestage.report"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
KINDS = {"segm": "mask", "bbox": "box", "unrefined_bbox": "box before refinement"}
QUANTITIES = {"lr": "learning rate", "grad_norm": "norm of the gradient", "images_per_second": "images per second"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SHOWN_WIDTH = 420  # px of a picture in the page
# Of environment.json and config.json: they differ between any two runs and say nothing.
UNINTERESTING = ("time", "command")

logger = logging.getLogger("onestage")


@dataclass(frozen=True, kw_only=True)
class ReportFlags(Talk):
    """Writes one page (index.html, with everything in it) and report.json about one or several run folders.

    Curves, final numbers side by side, differences of configuration and machine, pictures where a run left some.
    """

    runs: Positional[tuple[Path, ...]] = ()  # run folders: runs/<package>/<verb>/<time>, or what --output was
    pictures: int = 6  # at most so many of each run
    output: Path | None = None  # folder, default runs/onestage/report/<time>
    overwrite: Switch = False  # write into an --output that is not empty


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Args:
        name: Short, and no other run's of the page.
        folder: The run folder.
        config: config.json.
        environment: environment.json; empty where there is none.
        rows: metrics.jsonl; none for verbs that do not train.
        metrics: The numbers the run ended with: metrics.json, else the last evaluation of metrics.jsonl.
        error: error.json of a run that failed.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    metrics: dict[str, float]
    error: dict[str, Any] | None

    @property
    def state(self) -> str:
        """In a few words, how it ended."""
        if self.error is not None:
            return f"failed: {self.error.get('what', 'see error.json')}"
        return f"{self.rows[-1]['step']:.0f} steps" if self.rows else "done"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 2 usage, 3 a file of a run cannot be read, 5 no space.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(words, lambda: _report(parse_flags(ReportFlags, words, PROGRAM), words))


def _report(flags: ReportFlags, words: Sequence[str]) -> int:
    if not flags.runs:
        raise UsageError("no RUN", f"name run folders, as in: {PROGRAM} runs/mine")
    # The imports are here so that --help does not wait for torch.
    from onestage.cli.runs import open_run
    from onestage.files import write_atomically

    set_up_log(words, "onestage")
    runs = [read_run(folder, name) for folder, name in zip(flags.runs, short_names(flags.runs), strict=True)]
    record = {"package": "onestage", "verb": "report", "flags": {"runs": [str(folder) for folder in flags.runs]}}
    with open_run("onestage", "report", record, output=flags.output, overwrite=flags.overwrite) as run:
        page = run.folder / "index.html"
        write_atomically(page, render(runs, flags.pictures).encode())
        content = {"runs": [_summary(one) for one in runs], "differences": differences(runs)}
        write_atomically(run.folder / "report.json", json.dumps(_finite(content), allow_nan=False).encode())
        for one in runs:
            scores = [f"{word} AP {100 * one.metrics[key]:.1f}" for key, word in _scores(one)]
            logger.info("%s: %s", one.name, ", ".join([one.state, *scores]))
        logger.info("page: %s", page.resolve())
        if flags.json:
            print(json.dumps({**_finite(content), "page": str(page), "run": str(run.folder)}))
    return 0


def read_run(folder: Path, name: str) -> RunRecord:
    """Reads what a run left behind.

    Args:
        folder: The run folder.
        name: What the page calls it.

    Raises:
        UsageError: it is no run folder.
        DatasetError: one of its files is damaged.
    """
    from onestage.data.validate import read_json
    from onestage.engine.journal import read_rows

    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise UsageError(f"RUN '{folder}' {what}", "name run folders: runs/<package>/<verb>/<time>")

    def content(file: str) -> dict[str, Any]:
        values = read_json(folder / file) if (folder / file).is_file() else {}
        if not isinstance(values, dict):
            raise DatasetError(f"'{folder / file}' is not what a run writes: no JSON object", "name another run")
        return values

    rows: list[Any] = []
    journal = folder / "metrics.jsonl"
    if journal.is_file():
        try:
            rows = read_rows(journal)
        except ValueError as error:  # of JSON, or of UTF-8
            raise DatasetError(f"'{journal}' is not what a run writes: {error}", "name another run") from None
        if not all(isinstance(row, dict) and _is_number(row.get("step"), finite=True) for row in rows):
            raise DatasetError(f"'{journal}' has a row without a step", "name another run")
        rows = [{key: value for key, value in row.items() if _is_number(value)} for row in rows]
    last: dict[str, Any] = next((row for row in reversed(rows) if any("/AP" in key for key in row)), {})
    return RunRecord(
        name=name,
        folder=folder,
        config=content("config.json"),
        environment=content("environment.json"),
        rows=rows,
        metrics={key: value for key, value in (content("metrics.json") or last).items() if _is_number(value)},
        error=content("error.json") if (folder / "error.json").is_file() else None,
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell the folders apart; the same folder named twice has a number."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    longest = max(len(parts) for parts in paths)
    tails = [["/".join(parts[-count:]) for parts in paths] for count in range(1, longest + 1)]
    names = next((names for names in tails if len(set(names)) == len(set(paths))), tails[-1])
    return [
        name if names.index(name) == at else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)
    ]


def differences(runs: Sequence[RunRecord]) -> dict[str, dict[str, list[str]]]:
    """What is not the same in all runs.

    Returns:
        Under `config` and `environment`: dotted name to its values, a text for each run, `-` where a run has none.
    """
    found = {}
    for part in ("config", "environment"):
        tables = [_flat(getattr(run, part)) for run in runs]
        names = dict.fromkeys(name for table in tables for name in table)
        rows = {name: [table.get(name, "-") for table in tables] for name in names if name not in UNINTERESTING}
        found[part] = {name: values for name, values in rows.items() if len(set(values)) > 1}
    return found


def render(runs: Sequence[RunRecord], max_pictures: int) -> str:
    """The page as HTML.

    Args:
        runs: In the order of their columns.
        max_pictures: Of each run.
    """
    from onestage.draw import template

    titles = {f"{run.config.get('package', '')}" for run in runs}
    differ = differences(runs)
    return template("onestage", "report.html").render(
        title=f"{len(runs)} runs" if len(runs) > 1 else runs[0].name,
        packages=", ".join(sorted(titles - {""})),
        runs=[
            {
                "name": run.name,
                "folder": str(run.folder),
                "facts": [
                    f"{run.config.get('package', '-')}.{run.config.get('verb', '-')}",
                    str(run.config.get("variant") or "-"),
                    run.state,
                    str(run.environment.get("time", "-")),
                    str(run.environment.get("commit") or "-"),
                    str(run.environment.get("device", "CPU")),
                ],
                "command": str(run.environment.get("command", "-")),
                "failed": run.error is not None,
                "config": list(_flat(run.config).items()),
                "environment": list(_flat(run.environment).items()),
            }
            for run in runs
        ],
        metrics=_metric_rows(runs),
        charts=_charts(runs),
        differ=[
            (title, list(differ[part].items()))
            for part, title in (("config", "Configuration"), ("environment", "Machine"))
        ],
        pictures=[{"name": run.name, "images": images} for run in runs if (images := _pictures(run, max_pictures))],
    )


def _metric_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Final numbers, a row a number and a cell a run; the best AP or AR of a row is marked."""
    rows = []
    for kind, word in KINDS.items():
        for name in METRICS:
            values = [run.metrics.get(f"{kind}/{name}", -1.0) for run in runs]
            if any(value >= 0 for value in values):
                best = max(values) if sum(value >= 0 for value in values) > 1 else None
                cells = [
                    {"text": f"{100 * value:.1f}" if value >= 0 else "-", "best": value == best} for value in values
                ]
                rows.append({"name": f"{word} {name}", "cells": cells})
    for name, texts in (
        ("highest mask AP of the evaluations, at step", [_highest(run, "segm/AP") for run in runs]),
        ("last loss", [_last(run, "loss") for run in runs]),
        ("images per second, median", [_median(run, "images_per_second") for run in runs]),
    ):
        if any(text != "-" for text in texts):
            rows.append({"name": name, "cells": [{"text": text, "best": False} for text in texts]})
    return rows


def _charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Of one run its loss terms together; of several every quantity by itself, with a line a run."""
    from onestage.cli.page import compared_charts, run_charts

    trained = [(run.name, run.rows) for run in runs if run.rows]
    if not trained:
        return []
    if len(trained) == 1:
        charts = run_charts(trained[0][1])
        quantities = QUANTITIES
    else:
        terms = dict.fromkeys(key for _, rows in trained for row in rows for key in row if key.startswith("loss"))
        charts = []
        quantities = {"segm/AP": "mask AP", "bbox/AP": "box AP"} | {term: term for term in terms} | QUANTITIES
    for key, title in quantities.items():
        charts += compared_charts(title, key, trained)
    return charts


def _pictures(run: RunRecord, most: int) -> list[tuple[str, str]]:
    """(file name, data URI) of pictures that the run left in its folder `images`."""
    from PIL import Image

    from onestage.data.coco import read_image
    from onestage.draw import data_uri

    folder = run.folder / "images"
    files = (
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    )
    pictures = []
    for file in files[:most]:
        picture = Image.fromarray(read_image(file).permute(1, 2, 0).numpy())
        picture.thumbnail((SHOWN_WIDTH, 2 * SHOWN_WIDTH))
        pictures.append((file.relative_to(folder).as_posix(), data_uri(picture)))
    return pictures


def _scores(run: RunRecord) -> list[tuple[str, str]]:
    return [(f"{kind}/AP", word) for kind, word in KINDS.items() if run.metrics.get(f"{kind}/AP", -1) >= 0]


def _highest(run: RunRecord, key: str) -> str:
    rows = [row for row in run.rows if row.get(key, -1) >= 0]
    if not rows:
        return "-"
    best = max(rows, key=lambda row: row[key])
    return f"{100 * best[key]:.1f} at {best['step']:.0f}"


def _last(run: RunRecord, key: str) -> str:
    return next((f"{row[key]:.3g}" for row in reversed(run.rows) if key in row), "-")


def _median(run: RunRecord, key: str) -> str:
    values = [row[key] for row in run.rows if key in row]
    return f"{statistics.median(values):.3g}" if values else "-"


def _summary(run: RunRecord) -> dict[str, Any]:
    return {
        "run": str(run.folder),
        "name": run.name,
        "package": run.config.get("package"),
        "verb": run.config.get("verb"),
        "variant": run.config.get("variant"),
        "steps": run.rows[-1]["step"] if run.rows else None,
        "state": run.state,
        "metrics": run.metrics,
    }


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    from onestage.cli.page import flat

    return dict(flat(values))


def _is_number(value: Any, finite: bool = False) -> bool:
    if type(value) is int:
        return abs(value) < 2**63  # larger ones are no counts, and some do not become floats
    return type(value) is float and (not finite or math.isfinite(value))


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
