"""The page a demo run leaves: one self-contained HTML file with pictures, curves, the AP table and the settings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onestage.draw import Instances, Line, chart, colour_of, data_uri, draw, template

MAX_LINES = 6  # of a chart: so many colours there are
MAX_POINTS = 400  # of a line; more rows of a journal are averaged


@dataclass(frozen=True)
class Example:
    """One held-out image ([3, H, W] uint8 RGB) with its ground truth and what the model found."""

    image: Tensor
    truth: Instances
    found: Instances


def render(
    *,
    title: str,
    lead: str,
    label: str,
    numbers: Sequence[tuple[str, str]],
    names: Sequence[str],
    examples: Sequence[Example],
    charts: Sequence[dict[str, Any]],
    metrics: dict[str, float],
    commands: Sequence[tuple[str, str]],
    config: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """The page as HTML.

    Args:
        title: First heading.
        lead: One or two sentences below it.
        label: What the data are, shown beside every result.
        numbers: (name, value) of the tiles on top.
        names: Category name of each label.
        examples: Images to show, in this order.
        charts: From `chart`.
        metrics: `segm/AP`, `bbox/AP`, .. and `segm/AP/<category>`; missing ones show a dash.
        commands: (what it does, command) of what to run next.
        config: The resolved configuration.
        environment: Versions, device, commit.
    """
    pictures = [
        {
            "truth": data_uri(draw(e.image, e.truth, names)),
            "found": data_uri(draw(e.image, e.found, names)),
            "num_truth": len(e.truth),
            "num_found": len(e.found),
        }
        for e in examples
    ]
    return template("onestage.cli", "demo.html").render(
        title=title,
        lead=lead,
        label=label,
        numbers=numbers,
        pictures=pictures,
        legend=[(name, "rgb({}, {}, {})".format(*colour_of(k))) for k, name in enumerate(names)],
        charts=charts,
        table=_metric_rows(metrics),
        refined="unrefined_bbox/AP" in metrics,
        classes=[
            (name, _percent(metrics, f"bbox/AP/{name}"), _percent(metrics, f"segm/AP/{name}"))
            for name in names
            if f"segm/AP/{name}" in metrics
        ],
        commands=commands,
        config=flat(config),
        environment=flat(environment),
    )


def run_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The losses of one run, term by term, and its AP on held-out images.

    Args:
        rows: Of its metrics.jsonl.
    """
    terms = [key for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("loss")]
    losses = [Line(name, points_of(rows, name)) for name in terms[:MAX_LINES]]
    scores = [Line(name, points_of(rows, key)) for key, name in (("segm/AP", "mask AP"), ("bbox/AP", "box AP"))]
    return [
        chart("Training loss", "steps", losses),
        chart("AP on the held-out images", "steps", scores, y_max=1.0),
    ]


def compared_charts(
    title: str, key: str, runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
) -> list[dict[str, Any]]:
    """One quantity of several runs, each in its own colour; a chart for every six runs, none where no run has it.

    Args:
        title: Of the chart.
        key: Of the quantity in metrics.jsonl.
        runs: (name, rows of its metrics.jsonl).
    """
    lines = [Line(name, points_of(rows, key)) for name, rows in runs]
    sixes = [lines[start : start + MAX_LINES] for start in range(0, len(lines), MAX_LINES)]
    parts = [six for six in sixes if any(line.points for line in six)]
    numbers = [f" ({number} of {len(parts)})" if len(parts) > 1 else "" for number in range(1, len(parts) + 1)]
    return [chart(title + number, "steps", part) for number, part in zip(numbers, parts, strict=True)]


def points_of(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of one quantity; of a long run means over neighbouring rows."""
    points = [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    size = -(-len(points) // MAX_POINTS)
    if size < 2:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _metric_rows(metrics: dict[str, float]) -> list[tuple[str, ...]]:
    rows = [
        ("AP", "AP", "mean over IoU 0.50 to 0.95"),
        ("AP50", "AP50", "at IoU 0.50"),
        ("AP75", "AP75", "at IoU 0.75"),
        ("APs", "AP small", "area below 32² px"),
        ("APm", "AP medium", "32² to 96² px"),
        ("APl", "AP large", "above 96² px"),
        ("AR100", "AR", "recall with 100 detections"),
    ]
    kinds = ("unrefined_bbox", "bbox", "segm")
    return [(name, what, *(_percent(metrics, f"{kind}/{key}") for kind in kinds)) for key, name, what in rows]


def _percent(metrics: dict[str, float], key: str) -> str:
    value = metrics.get(key, -1.0)
    return f"{100 * value:.1f}" if value >= 0 else "-"  # pycocotools says -1 where there is nothing to find


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value as text) of everything in nested dicts."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + name, shown))
    return rows
