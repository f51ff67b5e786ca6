"""`python -m onestage.report`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from onestage.report import differences, main, read_run, short_names


def run_folder(folder: Path, lr: float = 0.1, ap: float = 0.25, steps: int = 3) -> Path:
    """What a training leaves, as far as a report reads it."""
    folder.mkdir(parents=True)
    config = {"package": "toy", "verb": "train", "variant": "small", "model": {"schedule": {"lr": lr}, "grid": [2, 2]}}
    machine = {
        "time": "2026-11-21T20:00:00",
        "command": "python -m toy.train",
        "commit": "abc",
        "packages": {"torch": "2"},
    }
    rows = [{"step": step, "loss": 4.0 / step, "loss_mask": 1.0 / step, "lr": lr} for step in range(1, steps + 1)]
    rows.append({"step": steps, "segm/AP": ap, "segm/APl": -1.0, "bbox/AP": 2 * ap})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(machine))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(html: str, first: str) -> list[str]:
    """Texts of the first table row that starts with `first`."""
    row = re.findall(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", html)[0]
    return re.findall(r"<td>(.*?)</td>", row)


def test_two_runs_stand_side_by_side_with_what_differs(here, capsys):
    one, two = run_folder(here / "one"), run_folder(here / "two", lr=0.2, ap=0.5)
    assert main([str(one), str(two), "--output", "out", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["differences"] == {"config": {"model.schedule.lr": ["0.1", "0.2"]}, "environment": {}}
    assert [run["metrics"]["segm/AP"] for run in answer["runs"]] == [0.25, 0.5]
    assert json.loads(Path("out/report.json").read_text())["runs"] == answer["runs"]
    html = Path("out/index.html").read_text()
    assert cells(html, "mask AP") == ["25.0", "<b>50.0</b>"]
    assert cells(html, "model.schedule.lr") == ["0.1", "0.2"]
    assert cells(html, "last loss") == ["1.33", "1.33"]
    assert "mask APl" not in html
    titles = re.findall(r"<svg[^>]*aria-label=\"([^\"]*)\"", html)
    assert titles == ["mask AP", "box AP", "loss", "loss_mask", "learning rate"]
    assert html.count("<polyline") == 2 * len(titles)
    assert not re.findall(r'(?:src|href)="', html)
    assert "<script" not in html


def test_one_run_has_its_losses_in_one_chart_and_no_differences(here):
    assert main([str(run_folder(here / "one")), "--output", "out"]) == 0
    html = Path("out/index.html").read_text()
    titles = re.findall(r"<svg[^>]*aria-label=\"([^\"]*)\"", html)
    assert titles == ["Training loss", "AP on the held-out images", "learning rate"]
    assert "what differs" not in html


def test_more_runs_than_colours_are_several_charts(here):
    folders = [str(run_folder(here / f"run{number}")) for number in range(7)]
    assert main([*folders, "--output", "out"]) == 0
    titles = re.findall(r"<svg[^>]*aria-label=\"([^\"]*)\"", Path("out/index.html").read_text())
    assert titles[:2] == ["mask AP (1 of 2)", "mask AP (2 of 2)"]


def test_pictures_of_a_run_are_in_the_page(here):
    folder = run_folder(here / "one")
    (folder / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (900, 30)).save(folder / "images" / f"{number}.png")
    assert main([str(folder), "--output", "out", "--pictures", "2"]) == 0
    sources = re.findall(r'src="([^"]*)"', Path("out/index.html").read_text())
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_a_run_that_failed_and_one_that_was_cut_off_are_told(here):
    failed, cut = run_folder(here / "failed"), run_folder(here / "cut")
    (failed / "error.json").write_text(json.dumps({"what": "no space left <b>"}))
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.')
    assert read_run(failed, "x").state == "failed: no space left <b>"
    assert read_run(cut, "x").rows[-1]["step"] == 3
    assert main([str(failed), str(cut), "--output", "out"]) == 0
    assert "no space left &lt;b&gt;" in Path("out/index.html").read_text()


def test_metrics_json_goes_before_the_last_evaluation(here):
    folder = run_folder(here / "one", ap=0.25)
    (folder / "metrics.json").write_text(json.dumps({"segm/AP": 0.75, "note": "text"}))
    assert read_run(folder, "x").metrics == {"segm/AP": 0.75}


def test_a_number_that_is_not_finite_is_null_in_the_json(here):
    folder = run_folder(here / "one")
    (folder / "metrics.json").write_text('{"segm/AP": NaN}')
    assert main([str(folder), "--output", "out"]) == 0
    assert json.loads(Path("out/report.json").read_text(), parse_constant=pytest.fail)["runs"][0]["metrics"] == {
        "segm/AP": None
    }


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("runs/a/train/1"), Path("runs/b/train/2")]) == ["1", "2"]
    assert short_names([Path("runs/a/train/1"), Path("runs/b/train/1")]) == ["a/train/1", "b/train/1"]
    assert short_names([Path("/x/1"), Path("/x/1")]) == ["1", "1 (2)"]


def test_long_names_and_values_do_not_widen_the_page(here, page_width):
    folder = run_folder(here / ("x" * 200))
    (folder / "config.json").write_text(json.dumps({"package": "p" * 200, "variant": "v" * 200, "k" * 200: "w" * 200}))
    assert main([str(folder), "--output", "out"]) == 0
    assert 0 < page_width(Path("out/index.html").read_text(), 390) <= 390


def test_what_only_one_run_has_differs_too(here):
    one, two = run_folder(here / "one"), run_folder(here / "two")
    (two / "environment.json").write_text(json.dumps({"packages": {"torch": "2", "av": "3"}}))
    found = differences([read_run(one, "one"), read_run(two, "two")])
    assert found["environment"] == {"commit": ["abc", "-"], "packages.av": ["-", "3"]}


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("config.json", None, 2),
        ("config.json", "[]", 3),
        ("config.json", "{", 3),
        ("metrics.jsonl", '{"loss": 1}\n', 3),
        ("metrics.jsonl", '{"step": NaN}\n', 3),
        ("metrics.jsonl", f'{{"step": 1{"0" * 400}}}\n', 3),
        ("metrics.jsonl", "{x}\n", 3),
        ("environment.json", "<html>", 3),
    ],
)
def test_a_damaged_run_is_told_in_two_lines(here, capsys, file, text, code):
    folder = run_folder(here / "one")
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    assert main([str(folder), "--output", "out"]) == code
    assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["error:", "  fix:"]
    assert not Path("out").exists()


def test_no_run_at_all_is_a_mistake_of_usage(here, capsys):
    assert main([]) == 2
    assert main(["nowhere"]) == 2
    assert main([str(run_folder(here / "one")), "--pictures", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_does_not_load_torch():
    code = "import sys, onestage.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
