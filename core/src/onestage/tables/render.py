"""Records as a page: the paper's numbers beside ours, what became of its claims, where every number is from.

One self-contained HTML file, and the same as Markdown. A number without a record is a dash.
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from onestage.draw import Line, chart, template
from onestage.files import write_atomically
from onestage.method import Method
from onestage.tables.plan import GENERATED, Settings, config_of, entry_of, weights_of
from onestage.tables.record import file_stem
from onestage.tables.spec import Claim, Row, Table

Verdict = Literal["held", "not held", "undecided", "not run"]
VERDICTS: tuple[Verdict, ...] = ("held", "not held", "undecided", "not run")
# Student's t, two-sided 90 %, by degrees of freedom; beyond, the last one, a little wide.
T90 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
RULE = (
    "A claim is held where the 90 % interval of the mean difference over seeds (Student's t, differences of equal"
    " seeds) lies on the claimed side of zero, not held where it lies on the other side, and undecided otherwise. One"
    " seed decides nothing; its sign is shown all the same. What is measured without training needs no seeds."
)
SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MAX_CURVES, MAX_SIDE_BY_SIDE = 6, 8
DASH = "-"
NETWORKS = "The networks: parameters and multiply-adds"


@dataclass(frozen=True)
class Result:
    """What the records say about one row.

    Args:
        records: By seed.
        state: Why there is none; empty otherwise.
    """

    records: Mapping[int, Mapping[str, Any]]
    state: str = ""

    def values(self, column: str) -> dict[int, float]:
        """Seed to number in `column`, as printed: percent where print has percent."""
        found = {}
        for seed, record in self.records.items():
            value = record["ours"].get(column)
            if value is not None and value != -1:  # pycocotools' -1: nothing there to find
                found[seed] = scaled(column, value)
        return found


@dataclass(frozen=True)
class Judgement:
    """What became of a claim here.

    Args:
        claim: The claim.
        verdict: By RULE.
        paper: The paper's difference, where it prints both numbers.
        ours: Mean difference over seeds, in the column's unit.
        half_width: Of its 90 % interval, from two seeds on.
        seeds: How many.
        note: What else a reader should know.
    """

    claim: Claim
    verdict: Verdict
    paper: float | None
    ours: float | None
    half_width: float | None
    seeds: int
    note: str = ""


def write_report(
    tables: Sequence[tuple[Method, Table]],
    records: Iterable[Mapping[str, Any]],
    settings: Settings,
    seeds: Sequence[int],
    folder: Path,
    name: str,
    *,
    missing: Mapping[str, str] | None = None,
    only_rows: Mapping[tuple[str, str], set[str]] | None = None,
) -> tuple[Path, dict[Verdict, int]]:
    """Writes `folder/<name>.html` and `.md`.

    Args:
        tables: What the page shows.
        records: Those that belong to its rows are found by key; the last one of kind "networks" gives the sizes of the
            packages' networks.
        settings: Of the runs.
        seeds: Which may have been run.
        folder: Where to; its `pictures` are taken into the page.
        name: Stem of the two files.
        missing: Format of data to what is missing of it: "needs a data set: ..."; such tables have no numbers of ours.
        only_rows: (package, table number) to the rows that were asked for; None: all.

    Returns:
        The HTML file, and how many claims came to which verdict.
    """
    records = list(records)
    by_key = {record["key"]: record for record in records if "key" in record}
    views, judged = [], []
    missing = missing or {}
    for method, table in tables:
        lacks = missing.get(table.data, "")
        asked = None if only_rows is None else only_rows.get((method.name, table.number), set())
        results = {row.name: result_of(method, table, row, by_key, settings, seeds, lacks, asked) for row in table.rows}
        judgements = [judge(claim, table, results) for claim in table.claims]
        judged += judgements
        views.append(_table_view(method, table, results, judgements, settings, folder / "pictures"))
    counts: dict[Verdict, int] = {word: sum(j.verdict == word for j in judged) for word in VERDICTS}
    values = {
        "title": _page_title(name, settings),
        "label": settings.label,
        "departures": settings.departures,
        "mark": {GENERATED: "generated", "": ""}.get(settings.label, settings.label),
        "profile": settings.profile,
        "recipe": settings.recipe,
        "missing": "; ".join(missing.values()) if all(table.data in missing for _, table in tables) else "",
        "rule": RULE,
        "counts": counts,
        "tiles": _tiles(views, counts),
        "tables": views,
        "packages": list(dict.fromkeys(view["package"] for view in views)),
        "networks_title": NETWORKS,
        "networks": _networks(records, {method.name: method for method, _ in tables}),
    }
    page = folder / f"{name}.html"
    write_atomically(page, template("onestage.tables", "tables.html").render(values).encode())
    write_atomically(folder / f"{name}.md", markdown(values).encode())
    return page, counts


def result_of(
    method: Method,
    table: Table,
    row: Row,
    by_key: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    seeds: Sequence[int],
    missing: str = "",
    asked: set[str] | None = None,
) -> Result:
    """The records of a row, or why it has none."""
    if row.config is None:
        return Result({}, row.why_not)
    if missing:
        return Result({}, f"not run: {missing}")
    if settings.weights and not weights_of(method, table, row, settings).is_file():
        return Result({}, f"not run: needs {weights_of(method, table, row, settings).name}")
    keys = {seed: entry_of(method, table, row, settings, seed).key for seed in seeds}
    found = {seed: by_key[key] for seed, key in keys.items() if key in by_key}
    if len(set(keys.values())) == 1:  # no training, no seeds
        found = dict(list(found.items())[:1])
    if found:
        return Result(found)
    left_out = asked is not None and row.name not in asked
    return Result({}, "not run: not asked for" if left_out else "not run")


def judge(claim: Claim, table: Table, results: Mapping[str, Result]) -> Judgement:
    """A claim against the records, by RULE."""
    higher, lower = results[claim.higher], results[claim.lower]
    printed = [_number(table.row(name).paper.get(claim.column, "")) for name in (claim.higher, claim.lower)]
    paper = None if printed[0] is None or printed[1] is None else printed[0] - printed[1]
    ups, downs = higher.values(claim.column), lower.values(claim.column)
    differences = [ups[seed] - downs[seed] for seed in sorted(ups.keys() & downs.keys())]
    if not differences:
        return Judgement(claim, "not run", paper, None, None, 0)
    mean, count = statistics.fmean(differences), len(differences)
    if {record["key"] for record in higher.records.values()} & {record["key"] for record in lower.records.values()}:
        return Judgement(claim, "undecided", paper, mean, None, count, "both rows are the same run in this profile")
    if all(table.row(name).measure is not None for name in (claim.higher, claim.lower)):
        return Judgement(claim, "held" if mean > 0 else "not held", paper, mean, None, count, "measured, not trained")
    if count == 1:
        sign = "sign as claimed" if mean > 0 else "sign against the claim" if mean < 0 else "no difference"
        return Judgement(claim, "undecided", paper, mean, None, 1, f"one seed: {sign}")
    spread = statistics.stdev(differences) / math.sqrt(count)
    half = T90[min(count - 2, len(T90) - 1)] * spread
    verdict: Verdict = "held" if mean > half else "not held" if mean < -half else "undecided"
    return Judgement(claim, verdict, paper, mean, half, count)


def scaled(column: str, value: float) -> float:
    """A measured value in the unit of print."""
    return 100 * value if "/" in column or column == "error" else value


def parameters(method: Method, config: Any) -> float:
    """Parameters of a configuration's network, million; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in method.build(config).parameters()) / 1e6


def markdown(values: Mapping[str, Any]) -> str:
    """The page's tables, claims and provenance as Markdown."""
    lines, mark = [f"# {values['title']}", ""], values["mark"]
    if values["label"]:
        facts = values["departures"] or (values["recipe"],)
        lines += [f"**{values['label']}**" + "".join(f"; {text}" for text in facts) + ".", ""]
    lines += ["Each cell: paper / ours. A dash is a number that nobody measured. " + values["rule"], ""]
    for table in values["tables"]:
        lines += [f"## {table['package_title']}, {table['title']}: {table['caption']}", "", table["about"], ""]
        lines.append("| row | " + " | ".join(heading for _, heading in table["columns"]) + " | |")
        lines.append("| --- |" + " --- |" * (len(table["columns"]) + 1))
        for row in table["rows"]:
            cells = [
                f"{cell['paper']} / {cell['ours']}{cell['spread']}" + (f" {mark}" if cell["measured"] and mark else "")
                for cell in row["cells"]
            ]
            about = ". ".join(text.rstrip(".") for text in (row["state"], row["facts"], *row["notes"]) if text)
            lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | {about} |")
        for claim in table["claims"]:
            lines.append("") if claim is table["claims"][0] else None
            lines.append(
                f"- **{claim['verdict']}**: {claim['higher']} over {claim['lower']} in {claim['column']}:"
                f" paper {claim['paper']}, ours {claim['ours']}"
                + (f" ({claim['note']})" if claim["note"] else "")
                + (f"; the paper: {claim['text']}" if claim["text"] else "")
            )
        lines += ["", *(f"- Note: {note}" for note in table["notes"]), ""]
        if table["provenance"]:
            lines += ["| record | commit | device | steps | seconds |", "| --- | --- | --- | --- | --- |"]
            lines += [
                f"| {p['file']} | {p['commit']} | {p['device']} | {p['steps']} | {p['seconds']} |"
                for p in table["provenance"]
            ]
            lines.append("")
    if networks := values["networks"]:
        lines += [f"## {NETWORKS}", "", networks["about"], "", "| network | input | parameters, M | multiply-adds, G |"]
        lines += ["| --- | --- | --- | --- |"]
        lines += [f"| {name} | {size} | {count} | {cost} |" for name, size, count, cost in networks["rows"]]
        lines += ["", f"Record: {networks['file']}, commit {networks['commit']}.", ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _table_view(
    method: Method,
    table: Table,
    results: Mapping[str, Result],
    judgements: Sequence[Judgement],
    settings: Settings,
    pictures: Path,
) -> dict[str, Any]:
    about = [f"data: {table.split}", table.hardware and f"speed on {table.hardware}", table.schedule, table.source]
    ran = {name: result for name, result in results.items() if result.records}
    return {
        "anchor": file_stem(f"{method.name}-{table.number}"),
        "package": method.name,
        "package_title": method.title.partition(":")[0],
        "title": table.title,
        "caption": table.caption,
        "about": "Paper: " + "; ".join(filter(None, about)) + ".",
        "columns": list(table.columns.items()),
        "rows": [_row_view(method, table, row, results[row.name], settings) for row in table.rows],
        "claims": [_claim_view(judgement, table) for judgement in judgements],
        "notes": table.notes,
        "curves": _curves(ran),
        "pictures": _picture_view(ran, pictures),
        "sizes": _sizes(ran),
        "provenance": [line for name, result in ran.items() for line in _provenance(name, result)],
        "num_runs": sum(len(result.records) for result in ran.values()),
    }


def _row_view(method: Method, table: Table, row: Row, result: Result, settings: Settings) -> dict[str, Any]:
    cells = []
    for column in table.columns:
        paper = row.paper.get(column, "")
        values = list(result.values(column).values())
        if column == "params" and row.config is not None:
            values = [parameters(method, row.config)]
        cell = {"paper": paper or DASH, "ours": DASH, "spread": "", "difference": "", "measured": False}
        if values:
            mean = statistics.fmean(values)
            cell["ours"] = _shown(column, mean)
            cell["measured"] = column != "params"  # of the network at full size
            cell["spread"] = f" ± {_shown(column, statistics.stdev(values))}" if len(values) > 1 else ""
            printed = _number(paper)
            if printed is not None and settings.profile == "full":
                cell["difference"] = _signed(mean - printed, column)
        cells.append(cell)
    facts = [row.schedule, row.hardware, row.split and f"on {row.split}", _stand_in(method, row, settings)]
    return {
        "name": row.name,
        "facts": "; ".join(filter(None, facts)),
        "cells": cells,
        "state": result.state,
        "cited": row.config is None,
        "notes": row.notes,
        "seeds": len(result.records),
    }


def _stand_in(method: Method, row: Row, settings: Settings) -> str:
    """Which trunk, and which size of the image, stand for the row's in the small profile."""
    if settings.profile == "full" or row.config is None or row.measure is not None:
        return ""
    config = config_of(method, row, settings)
    return f"here: {config.backbone.name}, {min(config.input.test_size)} px"


def _claim_view(judgement: Judgement, table: Table) -> dict[str, Any]:
    claim, column = judgement.claim, judgement.claim.column
    ours = DASH if judgement.ours is None else _signed(judgement.ours, column)
    if judgement.half_width is not None:
        ours += f" ± {_shown(column, judgement.half_width)}"
    seeds = f"{judgement.seeds} seeds" if judgement.seeds > 1 else ""
    return {
        "higher": claim.higher,
        "lower": claim.lower,
        "column": table.columns[column],
        "text": claim.text,
        "verdict": judgement.verdict,
        "paper": DASH if judgement.paper is None else _signed(judgement.paper, column),
        "ours": ours,
        "note": "; ".join(filter(None, [judgement.note, seeds])),
    }


def _curves(ran: Mapping[str, Result]) -> list[dict[str, Any]]:
    """One chart of the losses of the table's trainings, first seeds; rows that share one have one line."""
    lines: dict[str, tuple[list[str], list[tuple[float, float]]]] = {}
    for name, result in ran.items():
        record = next(iter(result.records.values()))
        if (record["training"] or {}).get("curve"):
            names, _ = lines.setdefault(record["training_key"], ([], record["training"]["curve"]))
            names.append(name)
    chosen = [Line(" = ".join(names), points) for names, points in list(lines.values())[:MAX_CURVES]]
    if not chosen:
        return []
    left = len(lines) - len(chosen)
    return [chart("Training loss" + (f" ({left} more left out)" if left > 0 else ""), "steps", chosen)]


def _picture_view(ran: Mapping[str, Result], folder: Path) -> list[dict[str, Any]]:
    """The truth, and what each run finds in the same images, in table order; runs that several rows share once."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, result in ran.items():
        files = next(iter(result.records.values()))["pictures"]
        if files and all((folder / file).is_file() for kind in files.values() for file in kind):
            columns.setdefault(tuple(files["truth"]), ["ground truth"])
            columns.setdefault(tuple(files["found"]), []).append(name)
    return [
        {"name": " = ".join(names), "images": [_embedded(folder / file) for file in files]}
        for files, names in list(columns.items())[: MAX_SIDE_BY_SIDE + 1]
    ]


def _embedded(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _sizes(ran: Mapping[str, Result]) -> list[dict[str, Any]]:
    """AP by IoU and by object size of every row, masks or, without them, boxes."""
    rows = []
    for name, result in ran.items():
        for kind, word in (("segm", "mask"), ("bbox", "box")):
            values = {size: list(result.values(f"{kind}/{size}").values()) for size in SIZES}
            if any(values.values()):
                cells = [_shown("x/AP", statistics.fmean(v)) if v else DASH for v in values.values()]
                rows.append({"name": name, "kind": word, "cells": cells})
    return rows


def _provenance(name: str, result: Result) -> list[dict[str, Any]]:
    lines = []
    for seed, record in result.records.items():
        training, code = record["training"] or {}, record["code"]
        lines.append(
            {
                "row": name,
                "seed": seed,
                "file": record.get("file", ""),
                "commit": code["commit"][:12] + (" with changes" if code["dirty"] else ""),
                "command": code["command"],
                "device": record["machine"]["device"],
                "threads": record["machine"]["threads"],
                "steps": training.get("steps", DASH),
                "seconds": round(training.get("seconds", 0) + record["time"]["seconds"]),
                "data": _data_text(record["data"]),
                "weights": training.get("weights_sha256", "")[:12],
                "config": record["config_sha256"][:12],
                "torch": record["machine"]["torch"],
                "asked": f"Table {record['table']}, {record['row']}",
            }
        )
    return lines


def _networks(records: Sequence[Mapping[str, Any]], methods: Mapping[str, Method]) -> dict[str, Any]:
    """Sizes of the packages' networks from the last record that has them; nothing where none has."""
    record = next((record for record in reversed(records) if record.get("kind") == "networks"), None)
    found = [] if record is None else [entry for entry in record["results"] if entry["package"] in methods]
    if record is None or not found:
        return {}
    height, width = record["config"]["protocol"]["image"]
    rows = [
        (
            f"{methods[entry['package']].title.partition(' (')[0]} {entry['variant']}",
            " x ".join(map(str, entry["input"])),
            f"{entry['parameters'] / 1e6:.1f}",
            f"{entry['multiply_adds'] / 1e9:.1f}",
        )
        for entry in found
    ]
    about = (
        f"Of the variants that the packages name, each at its own size of a {width} x {height} image. Counted, not"
        " timed; what follows the dense maps (NMS, assembling masks, decoding them) is left out."
    )
    return {"rows": rows, "about": about, "file": record.get("file", ""), "commit": record["code"]["commit"][:12]}


def _data_text(data: Mapping[str, Any]) -> str:
    size = f", {data['difficulty']}, {data['size']} px" if "difficulty" in data else ""
    return f"{data['name']}{size}; {data['train_images']} + {data['val_images']} images"


def _tiles(views: Sequence[Mapping[str, Any]], counts: Mapping[Verdict, int]) -> list[tuple[str, str]]:
    rows = [row for view in views for row in view["rows"] if not row["cited"]]
    return [
        ("tables", str(len(views))),
        ("rows run, of ours", f"{sum(row['seeds'] > 0 for row in rows)} of {len(rows)}"),
        *((f"claims {word}", str(counts[word])) for word in VERDICTS if counts[word]),
    ]


def _page_title(name: str, settings: Settings) -> str:
    what = "All tables" if name == "all" else name.replace("table", "Table ").replace("figure", "Figure ")
    return f"{what} of the papers, and here" if settings.profile == "full" else f"{what} on generated shapes"


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%").replace(",", "")) if text else None
    except ValueError:
        return None


def _shown(column: str, value: float) -> str:
    return f"{value:.1f}" if "/" in column or abs(value) >= 10 else f"{value:.2f}"


def _signed(value: float, column: str) -> str:
    return ("+" if value > 0 else "-" if value < 0 else "±") + _shown(column, abs(value))
