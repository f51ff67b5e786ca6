"""The table of small runs is what their records say."""

from importlib import import_module
from pathlib import Path

import pytest

from onestage.tables.plan import Settings
from onestage.tables.record import read_records
from onestage.tables.render import write_report

HERE = Path(__file__).parent
PACKAGES = ("meinst", "rdsnet", "sais", "sipmask", "sprnet")
RECORDS = [record for name in ("tables", "networks") for record in read_records(HERE / "results" / name)]


@pytest.fixture(scope="module")
def methods():
    return [import_module(f"{package}.method").METHOD for package in PACKAGES]


def test_table_is_that_of_its_records(methods, tmp_path):
    tables = [(method, table) for method in methods for table in method.tables()]
    page, _ = write_report(tables, RECORDS, Settings(profile="smoke"), range(3), tmp_path, "all")
    again = "python -m onestage.tables all --profile smoke --seeds 3 --report-only --records benchmarks/results/tables"
    assert (HERE / "tables" / "smoke.md").read_text(encoding="utf-8") == page.with_suffix(".md").read_text(
        encoding="utf-8"
    ), f"make it again with: {again} benchmarks/results/networks, and copy runs/tables/smoke/all.md"


def test_records_are_of_clean_trees_and_belong_to_rows_that_are_there(methods):
    text = (HERE / "tables" / "smoke.md").read_text(encoding="utf-8")
    for record in RECORDS:
        assert not record["code"]["dirty"], record["file"]
        assert record["file"] in text, f"{record['file']}: no row has its configuration any more"
