"""The page a demo run leaves: one self-contained HTML file with pictures, curves, the AP table and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onestage.draw import Instances, colour_of, data_uri, draw, template


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
        config=_flat(config),
        environment=_flat(environment),
    )


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


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + name, shown))
    return rows
