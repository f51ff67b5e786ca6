"""A paper's tables as data: rows with the numbers as printed, the configuration that repeats each, and what it claims.

Nothing here imports torch. A package's `tables.py` holds `TABLES`; `Method.tables` hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from onestage.config import with_field

# Columns that every evaluation fills: fractions inside the program, percent in print.
KINDS = {"bbox": "box", "segm": "mask", "vis": "video"}
# What the small profile takes from the method's demo: sizes, trunk and recipe. Everything else is a row's switch.
OF_THE_DEMO = {"num_classes", "width", "tower_depth", "backbone", "input", "schedule"}
SWITCHES_OF_TRUNK = ("deformable_stages", "deformable_interval", "modulated")

# COCO's summaries, in the order papers print them.
AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
AR = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a printed table.

    Exactly one of `config` and `why_not` is given: a row is repeated, or it says why it is not.

    Args:
        name: The paper's label; unique within the table.
        paper: Column to the number as printed, "31.2"; columns without a number are left out and show a dash.
        config: The configuration at the paper's size that repeats this row.
        why_not: Why there is none: "cited: another system", "not in the released code", ...
        split: Where it differs from the table's.
        hardware: What the paper measured speed or memory on, where it says so.
        schedule: As the paper describes it, "1x", "72 epochs".
        source: Where the numbers stand in the paper's text: "Table 4" with the line, or "Sec. 4.2".
        finish: The row needs the method's second stage (`Method.finish`) after training.
        small: Dotted field to value, set on the configuration for generated shapes besides the switches carried over
            (`small_config`): what stands for a larger trunk or another input size there.
        measure: For a row whose numbers come from no trained network: (config, training data, validation data) to
            column to value, as fractions where print has percent. Takes the place of training and evaluation.
        notes: What a reader should know: inconsistencies of the paper, choices of ours.
    """

    name: str
    paper: Mapping[str, str]
    config: Any | None = None
    why_not: str = ""
    split: str = ""
    hardware: str = ""
    schedule: str = ""
    source: str = ""
    finish: bool = False
    small: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[Any, Any, Any], Mapping[str, float]] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.config is None) == (not self.why_not):
            raise ValueError(f"row '{self.name}': give either a config or the reason why there is none")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A direction the paper states or its numbers show: `higher` has the larger number than `lower` in `column`.

    Args:
        higher: Name of a row.
        lower: Name of another row of the same table.
        column: Column that is compared.
        text: The paper's words or their sense, with the section; empty where only the numbers say so.
    """

    higher: str
    lower: str
    column: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table, or one figure with numbers.

    Args:
        number: As in "4", "2a", "figure5"; Roman numerals become digits.
        caption: What it shows, in a few words.
        columns: Column to heading, in print order. `segm/AP`, `bbox/AP50`, `bbox/AR100`, `vis/AR10`: measured by
            evaluation; `fps`, `params` (M), `memory` (of training, GB), `hours` (of training), `error` (%): measured
            beside it; others: the paper's alone, or a row's `measure`.
        rows: In print order.
        split: Data the paper evaluates on, "val2017".
        claims: Directions to check.
        printed: What the paper calls it where that is not "Table <number>" or "Figure <number>": "Table IV".
        data: Format of the data that rows are trained and evaluated on.
        hardware: Of all rows, as for `Row`.
        schedule: Of all rows, as for `Row`.
        source: Of all rows, as for `Row`.
        notes: As for `Row`.
    """

    number: str
    caption: str
    columns: Mapping[str, str]
    rows: tuple[Row, ...]
    split: str
    claims: tuple[Claim, ...] = ()
    printed: str = ""
    data: Literal["coco", "ytvis"] = "coco"
    hardware: str = ""
    schedule: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.title}: row names are not unique")
        for row in self.rows:
            if unknown := set(row.paper) - set(self.columns):
                raise ValueError(f"{self.title}, row '{row.name}': no columns {sorted(unknown)}")
        for claim in self.claims:
            if claim.column not in self.columns or not {claim.higher, claim.lower} <= set(names):
                raise ValueError(f"{self.title}: claim '{claim.higher}' over '{claim.lower}' names what is not there")

    @property
    def title(self) -> str:
        """What the paper calls it."""
        if self.printed:
            return self.printed
        kind = "Figure" if self.number.startswith("figure") else "Table"
        return f"{kind} {self.number.removeprefix('figure')}"

    @property
    def session(self) -> str:
        """Name of the session that runs it: `table2` for "2a", `figure5` for "figure5"."""
        digits = "".join(c for c in self.number.removeprefix("figure") if c.isdigit())
        return ("figure" if self.number.startswith("figure") else "table") + digits

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


def columns(kind: str, names: Sequence[str]) -> dict[str, str]:
    """Columns of one kind with their headings: `columns("bbox", AP)` is {"bbox/AP": "box AP", ...}."""
    return {f"{kind}/{name}": f"{KINDS[kind]} {name}" for name in names}


def printed(columns: Sequence[str] | Mapping[str, str], line: str) -> dict[str, str]:
    """The numbers of a printed line, "29.2 49.5 -", by column; a dash is left out.

    Raises:
        ValueError: there are more or fewer numbers than columns.
    """
    return {column: number for column, number in zip(columns, line.split(), strict=True) if number != "-"}


def cited(
    name: str,
    source: str,
    columns: Sequence[str] | Mapping[str, str],
    line: str,
    why_not: str = "cited: another system",
    **rest: Any,
) -> Row:
    """A row that is not repeated here, from its printed line; `rest` are further fields of `Row`."""
    return Row(name=name, source=source, paper=printed(columns, line), why_not=why_not, **rest)


def higher(better: str, worse: str, columns: Sequence[str] | Mapping[str, str], text: str = "") -> tuple[Claim, ...]:
    """A claim for each column: `better` has the larger number."""
    return tuple(Claim(higher=better, lower=worse, column=column, text=text) for column in columns)


def small_config(row: Row, base: Any, demo: Any) -> Any:
    """The configuration that stands for a row on generated shapes.

    It is `demo` with the switches by which the row differs from `base`; trunk, sizes and recipe stay the demo's. Rows
    that differ in those alone come out equal and share one training.

    Args:
        row: With a config.
        base: The method's default configuration.
        demo: The method's demo configuration.
    """
    full: Any = row.config
    config = _carried(full, base, demo, OF_THE_DEMO)
    trunk = {name: getattr(full.backbone, name) for name in SWITCHES_OF_TRUNK}
    trunk = {name: value for name, value in trunk.items() if value != getattr(base.backbone, name)}
    config = replace(config, backbone=replace(config.backbone, **trunk))
    for name, value in row.small.items():
        config = with_field(config, name, value)
    return config


def _carried(config: Any, base: Any, demo: Any, left_out: set[str]) -> Any:
    """`demo` with every field in which `config` differs from `base`."""
    changes = {}
    for entry in fields(config):
        ours, usual, small = (getattr(value, entry.name) for value in (config, base, demo))
        if entry.name in left_out or ours == usual:
            continue
        changes[entry.name] = _carried(ours, usual, small, set()) if is_dataclass(ours) else ours
    return replace(demo, **changes)
