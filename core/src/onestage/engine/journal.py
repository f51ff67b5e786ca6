"""metrics.jsonl and metrics.csv of a run: one row per report, whatever columns a run turns out to have."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from onestage.files import write_atomically


class Journal:
    """Appends rows to both files as they come.

    Args:
        folder: The run folder.
        keep: So many rows of an earlier part of the run stay, later ones go; 0 starts anew.
        writes: False keeps quiet, as all processes but the first do.
    """

    def __init__(self, folder: Path, keep: int = 0, writes: bool = True):
        self.writes = writes
        self.lines = folder / "metrics.jsonl"
        self.table = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if writes:
            if keep and self.lines.exists():
                self.rows = read_rows(self.lines)[:keep]
                write_atomically(self.lines, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
            else:
                self.lines.write_text("")
            self._write_table()

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row; it has a "step"."""
        self.rows.append(row)
        if not self.writes:
            return
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row.keys() <= set(self.columns):
            with open(self.table, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._write_table()

    def _write_table(self) -> None:
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with open(self.table, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, whose last line may have been cut by a crash."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            rows.append(json.loads(line))
    return rows
