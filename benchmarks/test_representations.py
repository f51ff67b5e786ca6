"""The generated table is what its record says, and the contour representations do what their names say."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RECORDS = sorted((HERE / "results" / "accuracy").glob("representations-*.json"))


@pytest.fixture
def representations(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))  # it imports record.py beside it
    spec = importlib.util.spec_from_file_location("representations", HERE / "representations.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "representations", module)
    spec.loader.exec_module(module)
    return module


def test_table_and_chart_are_those_of_the_one_record(representations):
    (path,) = RECORDS
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (HERE / "tables" / "representations.md").read_text(encoding="utf-8") == representations.table(
        record["config"], record
    )
    chart = (HERE / "tables" / "representations.svg").read_text(encoding="utf-8")
    assert chart == representations.chart(record["reconstruction_error"])


def test_objects_are_told_apart_by_parts_and_holes(representations):
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[2:20, 2:20] = 1
    assert representations._kind(mask) == "one part, no hole"
    mask[30:36, 30:36] = 1
    assert representations._kind(mask) == "several parts"
    mask[8:14, 8:14] = 0
    assert representations._kind(mask) == "holes"


def test_a_contour_keeps_one_part_and_loses_its_hole(representations):
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[2:20, 2:20] = 1
    mask[8:14, 8:14] = 0
    mask[30:36, 30:36] = 1
    truth = representations.Truth(1, (40, 40), torch.zeros(1, 4), torch.zeros(1), mask[None], (None,))
    exact = representations._redrawn(truth, representations._outline).to_bool()[0]
    assert exact[2:20, 2:20].all()
    assert exact.sum() == 18 * 18


def test_rays_come_close_to_a_disc_and_fill_a_star_shaped_object(representations):
    y, x = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    disc = ((y - 40) ** 2 + (x - 40) ** 2 < 30**2).byte()
    truth = representations.Truth(1, (80, 80), torch.zeros(1, 4), torch.zeros(1), disc[None], (None,))
    drawn = representations._redrawn(truth, representations._rays)
    assert representations.overlaps(drawn, truth).item() > 0.95
