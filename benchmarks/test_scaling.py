"""The scaling model by hand, and that the page shows what the program computes."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", Path(__file__).parent / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_the_program_computes(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.tables(scaling.newest(scaling.NETWORKS), {}) in page


def test_a_measured_step_takes_the_place_of_the_assumed_one(scaling):
    table = scaling.tables(scaling.newest(scaling.NETWORKS), {"sais": 0.2})
    assert "| sais r50_768 | 139 | 200 ms | 40 ms |" in table
    assert table.count("| - |") == 4


def test_exchange_of_two_gpus_and_of_two_machines_by_hand(scaling):
    links = scaling.Links("toy", inside=100e9, between=10e9, latency_inside=0.0, latency_between=1e-3)
    assert links.exchange(1e9, 2) == pytest.approx(0.01)  # each sends half of it twice
    # 16 GPUs: 30/16 of a gigabyte over the slow link, and one hop there and back.
    assert links.exchange(1e9, 16) == pytest.approx(0.1875 + 0.002)


def test_backward_hides_all_but_the_last_bucket(scaling):
    links = scaling.Links("toy", inside=1e9, between=1e9, latency_inside=0.0, latency_between=0.0)
    size = 4 * scaling.BUCKET
    whole = 2 * 7 / 8 * size / 1e9
    long, short = (scaling.step_on(links, size, seconds, 8) for seconds in (10.0, 0.03))
    assert long.exchange == short.exchange == pytest.approx(whole)
    assert long.exposed == pytest.approx(whole / 4)
    assert short.exposed == pytest.approx(whole - 0.02)
    assert short.efficiency == pytest.approx(0.03 / (0.03 + whole - 0.02))
