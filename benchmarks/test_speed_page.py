"""The page of speed records: every ratio of every kind of record, the newest of equal ones, a dash without a GPU."""

import re
from pathlib import Path

import pytest


@pytest.fixture
def speed_page(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import speed_page

    return speed_page


def times(median):
    return {"median": median, "min": median / 2, "max": median * 2}


def record(name, results, **more):
    return {
        "name": name,
        "config_sha256": "c",
        "file": f"{name}.json",
        "protocol": {"rounds": 5, "order": "A B B A"},
        "code": {"commit": "0123456789", "command": "python benchmarks/x.py"},
        "machine": {"device": "A <chip>", "threads": 1, "torch": "2"},
        "results": results,
    } | more


def test_ratios_of_both_benchmarks_become_bars(speed_page):
    kernels = record("masks-cpu", [{"case": "paste", "naive_ms": times(9.0), "ours_ms": times(2.0), "goal": 4}])
    (bar,) = speed_page.bars(kernels)
    assert (bar.label, bar.ratio, bar.low, bar.high, bar.goal) == ("paste", 4.5, 9 / 8, 18.0, 4.0)
    rows = [{"model": name, "milliseconds": {"rle": times(ms)}} for name, ms in (("sais:r50", 4.0), ("mask_rcnn", 6.0))]
    ratios = [{"model": "sais:r50", "peer": "mask_rcnn", "form": "rle", "ratio": 1.5}]
    (bar,) = speed_page.bars(record("images-cpu", rows, ratios=ratios))
    assert (bar.label, bar.ratio) == ("sais:r50 to rle, against mask_rcnn", 1.5)


def test_a_record_without_a_second_side_has_no_bars(speed_page):
    assert speed_page.bars(record("track-cpu", {"total": {"ms": 3.0}, "frames": 40})) == []
    assert speed_page.bars(record("training-cpu", [{"model": "sais:r50", "milliseconds": times(3.0)}])) == []
    other = record("other", None)
    del other["results"]
    assert speed_page.bars(other) == []


def test_a_replayed_graph_is_what_a_gpu_record_shows(speed_page):
    row = {"case": "paste", "naive_ms": times(9.0), "ours_ms": times(3.0), "ours_graph_ms": times(1.0), "goal": 0.0}
    assert speed_page.bars(record("masks-cuda", [row]))[0].ratio == 9.0


def test_the_newest_of_equal_records_is_shown_and_a_missing_gpu_is_a_dash(speed_page):
    row = {"case": "paste", "naive_ms": times(9.0), "ours_ms": times(3.0), "goal": 0}
    old, new = record("masks-cpu", [row]), record("masks-cpu", [row | {"ours_ms": times(1.0)}])
    text = speed_page.page([old, new])
    assert re.findall(r">(\d+\.\d\d)</text>", text) == ["9.00"]
    assert "<h2>On a GPU</h2><p>-</p>" in text
    assert "A &lt;chip&gt;" in text
    assert "<p>-</p>" not in speed_page.page([record("masks-cuda", [row])])


def test_papers_ratios_stand_beside_the_newest_measured_one(speed_page):
    rows = [{"model": name, "milliseconds": {"bool": times(4.0)}} for name in ("sais:r50", "mask_rcnn")]
    ratio = {"model": "sais:r50", "peer": "mask_rcnn", "form": "bool", "ratio": 1.375}
    old, new = (record("images-cpu", rows, ratios=[ratio | {"ratio": value}]) for value in (9.0, 1.375))
    text = speed_page.beside_papers([old, new])
    (sais,) = re.findall(r"<tr><td>sais</td>(.*?)</tr>", text)
    assert re.findall(r"<td>([^<]*)</td>", sais) == [
        "Table IV: SAIS-768 R50 against Mask R-CNN", "Titan X and Titan Xp", "3.13", "1.38", "-",
    ]  # fmt: skip
    (sipmask,) = re.findall(r"<tr><td>sipmask</td>(.*?)</tr>", text)
    assert re.findall(r"<td>([^<]*)</td>", sipmask)[2:] == ["1.30", "-", "-"]
