import json
import sys
from pathlib import Path

import pytest

from onestage.cli.tables import main

TOY = str(Path(__file__).parents[1] / "tables")
QUICK = ["--profile", "smoke", "--steps", "2", "--limit", "4", "--size", "32", "--device", "cpu"]


@pytest.fixture
def tables(tmp_path, monkeypatch, capsys):
    """Runs `python -m onestage.tables` -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.setenv("PYTHONPATH", ":".join([TOY, *filter(None, sys.path)]))
    monkeypatch.delenv("COCO_ROOT", raising=False)

    def run(*words):
        code = main([*words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_without_data_the_page_is_written_and_the_exit_code_is_3(tables, tmp_path):
    code, out, err = tables("table2", "toy", "--json")
    assert code == 3
    assert "COCO_ROOT" in err
    page = Path(json.loads(out)["page"])
    assert "not run: needs a data set" in page.read_text()
    assert "32.9" in page.with_suffix(".md").read_text()


def test_data_that_was_named_and_is_not_there_is_an_error(tables):
    code, _, err = tables("table2", "toy", "--data", "nowhere")
    assert (code, "nowhere" in err) == (3, True)


def test_dry_run_names_the_trainings(tables):
    code, out, _ = tables("table2", "toy", *QUICK, "--dry-run")
    assert code == 0
    assert len(out.splitlines()) == 4  # two trainings, two measurements
    assert 'toy Table 2a "2x2", Table 2a "2x2 strict"' in out


@pytest.mark.slow
def test_rows_are_run_kept_and_shown(tables):
    code, _, err = tables("table2", "toy", *QUICK, "--rows", "fine", "coarse")
    assert code == 0, err
    assert "2 trainings to go" in err
    code, out, err = tables("table2", "toy", *QUICK, "--rows", "fine", "coarse", "--json")
    assert "2 runs are there already, 0 trainings to go" in err
    assert json.loads(out)["claims"]["held"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table9", "toy"], "no table9"),
        (["table2", "toy", "--rows", "x"], "no row fits"),
        (["table2", "toy", "--profile", "smoke", "--data", "x"], "exclude each other"),
        (["table2", "toy", "--weights", "nowhere.safetensors"], "does not exist"),
        (["table2", "toy", "--seeds", "0"], "count from 1"),
        (["table2", "no_such_paper"], "not installed"),
    ],
)
def test_what_cannot_be_used_is_said_with_exit_code_2(tables, words, said):
    if "--rows" in words:
        words = [*words, "--profile", "smoke"]
    code, _, err = tables(*words)
    assert (code, said in err) == (2, True), err
