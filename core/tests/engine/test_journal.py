import csv
import json
import resource

import pytest

from onestage.engine.journal import Journal
from onestage.errors import MachineError


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_both_files_hold_every_row_and_every_column(tmp_path):
    journal = Journal(tmp_path)
    journal.add({"step": 1, "loss": 0.5})
    journal.add({"step": 1, "segm/AP": 0.25})
    journal.add({"step": 2, "loss": 0.125})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 1, "segm/AP": 0.25}, {"step": 2, "loss": 0.125}]
    assert table(tmp_path) == [
        {"step": "1", "loss": "0.5", "segm/AP": ""},
        {"step": "1", "loss": "", "segm/AP": "0.25"},
        {"step": "2", "loss": "0.125", "segm/AP": ""},
    ]


def test_a_resumed_run_drops_rows_after_the_checkpoint_and_a_cut_line(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.add({"step": step, "loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    Journal(tmp_path, keep=2).add({"step": 3, "loss": 7})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in lines] == [1, 2, 7]
    assert [row["loss"] for row in table(tmp_path)] == ["1", "2", "7"]


def test_a_new_run_starts_empty_and_other_processes_write_nothing(tmp_path):
    Journal(tmp_path).add({"step": 1})
    Journal(tmp_path, writes=False).add({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    Journal(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_at_the_start_of_a_resumed_run_leaves_the_rows_before(tmp_path):
    journal = Journal(tmp_path)
    journal.add({"step": 1})
    before = journal.lines.read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        with pytest.raises((MachineError, OSError)):
            Journal(tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert journal.lines.read_text() == before
