import math
import statistics
from dataclasses import replace

import pytest

from onestage.tables.plan import Settings, entry_of
from onestage.tables.render import Result, judge, parameters, scaled, write_report


def record(toy, table, name, settings, seed=0, **ours):
    entry = entry_of(toy, table, table.row(name), settings, seed)
    return {
        "key": entry.key,
        "file": f"{name}-{seed}.json",
        "table": table.number,
        "row": name,
        "ours": ours,
        "training": {"steps": 2, "seconds": 5.0, "curve": [[1, 3.0], [2, 1.5]], "weights_sha256": "ab" * 32},
        "training_key": entry.training,
        "pictures": {},
        "config_sha256": "cd" * 32,
        "data": {"name": "generated", "train_images": 8, "val_images": 4},
        "code": {"commit": "e" * 40, "dirty": False, "command": "nox -s reproduce-table2"},
        "machine": {"device": "a CPU", "threads": 1, "torch": "2"},
        "time": {"started": "2026-01-01", "seconds": 1.0},
    }


def claimed(toy, small, ones, twos):
    """The verdict of "2x2 over 1x1", mask AP of each by seed given as fractions."""
    table = toy.tables()[0]
    results = {
        name: Result({i: record(toy, table, name, small, i, **{"segm/AP": ap}) for i, ap in enumerate(aps)})
        for name, aps in (("1x1", ones), ("2x2", twos))
    }
    return judge(table.claims[0], table, results)


def test_claim_is_held_where_the_interval_lies_on_its_side(toy, small):
    found = claimed(toy, small, [0.40, 0.41, 0.42], [0.45, 0.46, 0.465])
    assert found.verdict == "held"
    assert found.ours == pytest.approx(4.833, abs=1e-3)
    assert found.half_width == pytest.approx(2.920 * 0.28868 / 3**0.5, abs=1e-3)  # by hand: t of 2 degrees
    assert found.paper == pytest.approx(1.7)


def test_claim_is_not_held_where_it_lies_on_the_other(toy, small):
    assert claimed(toy, small, [0.45, 0.46, 0.465], [0.40, 0.41, 0.42]).verdict == "not held"


def test_claim_is_undecided_where_seeds_disagree(toy, small):
    assert claimed(toy, small, [0.40, 0.44], [0.42, 0.43]).verdict == "undecided"


def test_one_seed_decides_nothing_and_shows_its_sign(toy, small):
    found = claimed(toy, small, [0.40], [0.42])
    assert (found.verdict, found.note) == ("undecided", "one seed: sign as claimed")
    assert "against" in claimed(toy, small, [0.42], [0.40]).note


def test_many_seeds_have_no_narrower_interval_than_theirs(toy, small):
    ups = [0.40 + 0.01 * (seed % 3) for seed in range(12)]
    found = claimed(toy, small, ups, [0.40] * 12)
    error = statistics.stdev(100 * value for value in ups) / math.sqrt(12)
    assert found.half_width >= 1.796 * error  # t of 11 degrees of freedom


def test_only_equal_seeds_are_compared(toy, small):
    assert claimed(toy, small, [0.40, 0.40, 0.40], [0.42]).seeds == 1


def test_rows_that_are_one_run_decide_nothing(toy, small):
    table = toy.tables()[0]
    shared = Result({i: record(toy, table, "2x2", small, i, **{"segm/AP": 0.4}) for i in range(3)})
    found = judge(table.claims[0], table, {"2x2": shared, "1x1": shared})
    assert (found.verdict, "same run" in found.note) == ("undecided", True)


def test_what_is_measured_without_training_decides_at_once(toy, small):
    table = toy.tables()[1]
    results = {
        name: Result({0: record(toy, table, name, small, error=value)})
        for name, value in (("coarse", 0.5), ("fine", 0.05))
    }
    assert judge(table.claims[0], table, results).verdict == "held"


def test_claim_without_records_is_not_run(toy):
    table = toy.tables()[0]
    nothing = {row.name: Result({}, "not run") for row in table.rows}
    assert judge(table.claims[0], table, nothing).verdict == "not run"


def test_fractions_are_printed_as_percent_and_other_numbers_as_they_are():
    assert scaled("segm/AP", 0.5) == scaled("error", 0.5) == 50
    assert scaled("fps", 12.0) == 12


def test_nothing_to_find_is_a_dash(toy, small):
    table = toy.tables()[0]
    assert Result({0: record(toy, table, "2x2", small, **{"segm/AP": -1.0})}).values("segm/AP") == {}


def test_parameters_are_those_of_the_full_size_network(toy):
    assert parameters(toy, toy.tables()[0].row("2x2").config) == pytest.approx((4 + 160) / 1e6)


def report(toy, small, folder, **more):
    tables = [(toy, table) for table in toy.tables()]
    table = toy.tables()[0]
    records = [
        record(toy, table, name, small, seed, **{"segm/AP": value, "bbox/AP": value, "segm/APs": 0.1})
        for seed in (0, 1)
        for name, value in (("1x1", 0.40 + 0.01 * seed), ("2x2", 0.42 + 0.02 * seed))
    ]
    page, counts = write_report(tables, records, small, [0, 1], folder, "table2", **more)
    return page.read_text(), page.with_suffix(".md").read_text(), counts


def test_page_shows_paper_beside_ours_and_labels_what_is_generated(toy, small, tmp_path):
    page, text, counts = report(toy, small, tmp_path)
    assert "| 1x1 | 31.2 / 40.5 ± 0.71 generated | - / 40.5 ± 0.71 generated |" in text.replace("0.7 ", "0.71 ")
    assert "| Other | 28.0 / - | - / - | cited: another system |" in text
    assert "| 2x2 strict | 30.0 / - | - / - | not run. here: resnet18, 32 px |" in text
    assert "| here: resnet18, 32 px. a note |" in text  # of 2x2, which was run
    assert "(2 seeds); the paper: a gain of 1.7 (Sec. 4)" in text
    assert page.count('<small class="mark">generated</small>') == 6  # 1x1, 2x2 and 2x2 large, which is the same run
    assert "generated shapes, not COCO" in page
    assert counts == {"held": 0, "not held": 0, "undecided": 1, "not run": 1}


def test_every_number_names_its_record(toy, small, tmp_path):
    page, text, _ = report(toy, small, tmp_path)
    for word in ("1x1-0.json", "1x1-1.json", "2x2-0.json", "eeeeeeeeeeee", "a CPU"):
        assert word in page, word
        assert word in text, word


def test_page_is_one_file(toy, small, tmp_path):
    page, _, _ = report(toy, small, tmp_path)
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


def test_names_are_escaped(toy, small, tmp_path):
    table = toy.tables()[0]
    strange = replace(table, caption="<b>&", rows=table.rows[-1:], claims=())
    page, _ = write_report([(toy, strange)], [], small, [0], tmp_path, "x")
    assert "&lt;b&gt;&amp;" in page.read_text()


def test_without_data_the_papers_rows_stand_alone(toy, tmp_path):
    tables = [(toy, toy.tables()[0])]
    page, counts = write_report(
        tables, [], Settings(profile="full"), [0], tmp_path, "x", missing={"coco": "needs COCO"}
    )
    assert "| 2x2 | 32.9 / - | 40.0 / - | not run: needs COCO. a note |" in page.with_suffix(".md").read_text()
    assert counts["not run"] == 1


def test_page_fits_phones_and_desktops(toy, small, tmp_path, page_width):
    page, _, _ = report(toy, small, tmp_path)
    assert 0 < page_width(page, 390) <= 390
    assert 390 < page_width(page, 1280) <= 1280


def test_claims_without_numbers_stand_apart(toy, small, tmp_path):
    page, _, _ = report(toy, small, tmp_path)
    shown, _, folded = page.partition("<summary>1 claim not run</summary>")
    assert '<li class="undecided">' in shown
    assert '<li class="not-run">' in folded
    assert '<li class="not-run">' not in shown


def test_sizes_of_networks_come_from_their_record(toy, small, tmp_path):
    sizes = {"variant": "r50", "input": [64, 96], "parameters": 33_140_000, "multiply_adds": 182_450_000_000}
    measured = {
        "kind": "networks",
        "file": "networks-1.json",
        "config": {"protocol": {"image": [480, 640]}},
        "results": [{"package": "toy", **sizes}, {"package": "other", **sizes}],
        "code": {"commit": "f" * 40},
    }
    page, _ = write_report([(toy, toy.tables()[0])], [measured], small, [0], tmp_path, "x")
    text = page.with_suffix(".md").read_text()
    assert text.count("| 64 x 96 | 33.1 | 182.4 |") == 1
    for content in (text, page.read_text()):
        assert "networks-1.json" in content
        assert "640 x 480 image" in content
