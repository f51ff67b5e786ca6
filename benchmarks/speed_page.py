"""The speed records as one page with plots: `python benchmarks/speed_page.py` writes tables/speed.html.

A bar is a ratio of a record, its whisker the least and the largest that the measured times allow, the tick across it
the goal. Where a GPU has no record yet, a dash stands.
"""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from onestage.draw import template
from onestage.tables.record import read_records

HERE = Path(__file__).parent
ROW, LABEL, WIDTH, RIGHT = 24, 330, 900, 70  # pixels: a bar's height, its label's width, the plot's, the value's
# A paper's row with a speed, and the row of Mask R-CNN in the same table: package, table, row, that row, column.
PRINTED = (
    ("sprnet", "1", "R50-FPN 500", "Mask R-CNN R50-FPN", "fps"),
    ("sprnet", "1", "R101-GFPN 800", "Mask R-CNN R101-GFPN", "fps"),
    ("sais", "4", "SAIS-768 R50", "Mask R-CNN", "fps"),
    ("rdsnet", "1", "RDSNet 12 epochs", "Mask R-CNN", "fps"),
    ("sipmask", "1", "R101 1333x800", "Mask R-CNN*", "ms"),
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One ratio: how many times the speed of the other side ours has.

    Args:
        label: What is compared.
        ratio: Of medians.
        low: Fastest other side to slowest ours.
        high: Slowest to fastest.
        goal: 0 where there is none.
    """

    label: str
    ratio: float
    low: float
    high: float
    goal: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE / "results" / "speed")
    parser.add_argument("--output", type=Path, default=HERE / "tables" / "speed.html")
    flags = parser.parse_args()
    flags.output.write_text(page(read_records(flags.records)), encoding="utf-8")
    print(f"wrote {flags.output}")


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page of these records, newest last; of equal name and configuration the newest is shown."""
    newest = {(record["name"], record["config_sha256"]): record for record in records}
    sections = [section(record) for record in newest.values() if bars(record)]
    if not any("cuda" in name for name, _ in newest):
        sections.append(
            "<section><h2>On a GPU</h2><p>-</p><p class='soft'>python benchmarks/gpu.py --part 1</p></section>"
        )
    sections.insert(0, beside_papers(list(newest.values())))
    style = template("onestage", "style.css").render()
    lead = (
        "Ratios of two sides measured in one process, in turns. Bars are logarithmic; the dashed line is equal speed."
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Speed records</title>\n'
        f"<style>{style}</style></head><body><main><h1>Speed records</h1><p>{lead}</p>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def beside_papers(records: Sequence[dict[str, Any]]) -> str:
    """How many times Mask R-CNN's speed each paper prints for its method, and what our records have."""
    rows = []
    for package, number, name, other, column in PRINTED:
        tables = {table.number: table for table in import_module(f"{package}.method").METHOD.tables()}
        row, rival = tables[number].row(name), tables[number].row(other)
        ours, theirs = float(row.paper[column]), float(rival.paper[column])
        ratio = theirs / ours if column == "ms" else ours / theirs
        gpus = [gpu for gpu in dict.fromkeys((row.hardware, rival.hardware)) if gpu] or [tables[number].hardware]
        measured = [measured_ratio(records, package, kind) for kind in ("cpu", "cuda")]
        cells = [
            package,
            f"{tables[number].printed or f'Table {number}'}: {name} against {other}",
            " and ".join(gpus),
            f"{ratio:.2f}",
            *("-" if found is None else f"{found:.2f}" for found in measured),
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("method", "the paper's rows", "measured on", "the paper's ratio", "ours, CPU", "ours, GPU")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return (
        "<section><h2>Whole images: times the speed of Mask R-CNN</h2><p class='soft'>Ours: R-50 with random weights,"
        " to bool masks, against torchvision's Mask R-CNN R-50 in the same run (images.py). MEInst prints no"
        f" speed of Mask R-CNN.</p><table><tr>{head}</tr>{''.join(rows)}</table></section>"
    )


def measured_ratio(records: Sequence[dict[str, Any]], package: str, device: str) -> float | None:
    """Of the newest record of `images.py` on a kind of device that has the package."""
    for record in reversed(records):
        for found in record.get("ratios", ()):
            wanted = (package, "mask_rcnn", "bool")
            if device in record["name"] and (found["model"].split(":")[0], found["peer"], found["form"]) == wanted:
                return float(found["ratio"])
    return None


def section(record: dict[str, Any]) -> str:
    """One record: its plot, and where its numbers are from."""
    machine, code = record["machine"], record["code"]
    protocol = record["protocol"]
    about = (
        f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, commit {code['commit'][:7]}, "
        f"{protocol['rounds']} round(s) {protocol['order']}: {code['command']}"
    )
    title = html.escape(record["name"])
    return (
        f"<section><h2>{title}</h2>{plot(bars(record), title)}<p class='soft'>{html.escape(about)}<br>"
        f"{html.escape(record['file'])}</p></section>"
    )


def bars(record: dict[str, Any]) -> list[Bar]:
    """The ratios of a record of `kernels.py` or `images.py`; none of a record without a second side."""
    results = record.get("results", [])
    if "ratios" in record:
        times = {row["model"]: row["milliseconds"] for row in results}
        return [
            _bar(
                f"{found['model']} to {found['form']}, against {found['peer']}",
                times[found["peer"]][found["form"]],
                times[found["model"]][found["form"]],
            )
            for found in record["ratios"]
        ]
    if isinstance(results, dict):  # one model against Mask R-CNN, by form
        return [
            _bar(f"{record['name']} to {form}, against Mask R-CNN", times["mask_rcnn_ms"], times["ours_ms"])
            for form, times in results.items()
            if isinstance(times, dict) and "mask_rcnn_ms" in times
        ]
    return [
        _bar(row["case"], row["naive_ms"], row.get("ours_graph_ms") or row["ours_ms"], row["goal"])
        for row in results
        if "naive_ms" in row
    ]


def _bar(label: str, other: dict[str, float], ours: dict[str, float], goal: float = 0.0) -> Bar:
    return Bar(
        label, other["median"] / ours["median"], other["min"] / ours["max"], other["max"] / ours["min"], float(goal)
    )


def plot(bars: Sequence[Bar], title: str) -> str:
    """Horizontal bars on a logarithmic axis, as SVG."""
    values = [value for bar in bars for value in (bar.low, bar.high, bar.goal or 1.0)]
    low, high = math.log10(min(0.5, *values)), math.log10(max(2.0, *values))

    def x(value: float) -> float:
        return round(LABEL + (WIDTH - LABEL - RIGHT) * (math.log10(value) - low) / (high - low), 1)

    height = ROW * len(bars) + 8
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">']
    for number, bar in enumerate(bars):
        parts += _drawn(bar, ROW * number + 4, x)
    parts.append(f'<path d="M{x(1.0)} 0V{height}" stroke="var(--soft)" stroke-dasharray="4 4"/>')
    return "".join([*parts, "</svg>"])


def _drawn(bar: Bar, y: int, x: Any) -> Iterable[str]:
    middle = y + ROW // 2
    start, end = sorted((x(1.0), x(bar.ratio)))
    yield f'<text x="{LABEL - 8}" y="{middle + 4}" text-anchor="end">{html.escape(bar.label)}</text>'
    yield f'<rect class="f0" x="{start}" y="{y + 3}" width="{round(end - start, 1)}" height="{ROW - 6}" rx="3"/>'
    yield f'<path d="M{x(bar.low)} {middle}H{x(bar.high)}" stroke="var(--ink)"/>'
    if bar.goal:
        yield f'<path d="M{x(bar.goal)} {y}V{y + ROW}" stroke="var(--c1)" stroke-width="2"/>'
    yield f'<text x="{WIDTH - 4}" y="{middle + 4}" text-anchor="end">{bar.ratio:.2f}</text>'


if __name__ == "__main__":
    main()
