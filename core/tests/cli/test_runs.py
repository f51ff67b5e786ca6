import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from onestage.cli.runs import checkpoint_to_resume, environment, open_run
from onestage.errors import DatasetError, UsageError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_folder_is_named_by_package_verb_and_time_and_says_what_and_where():
    with open_run("toy", "train", {"model": {"width": 3}}) as run:
        logging.getLogger("onestage").warning("hello")
    assert run.folder.parts[:3] == ("runs", "toy", "train")
    assert json.loads((run.folder / "config.json").read_text()) == {"model": {"width": 3}}
    assert json.loads((run.folder / "environment.json").read_text())["command"].startswith("python -m toy.train")
    assert "hello" in (run.folder / "log.txt").read_text()


def test_two_runs_of_one_second_get_two_folders():
    with open_run("toy", "train", {}) as first, open_run("toy", "train", {}) as second:
        assert first.folder != second.folder


def test_a_failure_is_told_in_error_json_and_a_later_success_takes_it_away(tmp_path):
    with pytest.raises(DatasetError), open_run("toy", "eval", {}, output=tmp_path / "out"):
        raise DatasetError("a.json is broken", "mend it")
    error = json.loads((tmp_path / "out" / "error.json").read_text())
    assert (error["type"], error["what"], error["fix"], error["exit_code"]) == (
        "DatasetError",
        "a.json is broken",
        "mend it",
        3,
    )
    with open_run("toy", "eval", {}, output=tmp_path / "out", overwrite=True):
        pass
    assert not (tmp_path / "out" / "error.json").exists()


def test_an_error_nobody_expected_is_kept_with_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run("toy", "eval", {}, output=tmp_path / "out") as run:
        1 / 0  # noqa: B018
    error = json.loads((run.folder / "error.json").read_text())
    assert error["type"] == "ZeroDivisionError"
    assert any("test_runs.py" in line for line in error["traceback"])


def test_a_full_disk_does_not_hide_the_error_that_ended_the_run(tmp_path, monkeypatch, caplog):
    with pytest.raises(ZeroDivisionError), open_run("toy", "eval", {}, output=tmp_path / "out"):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        1 / 0  # noqa: B018
    assert "error.json could not be written: no space" in caplog.text


def test_a_folder_that_is_not_empty_is_refused_unless_overwrite_or_keep(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    (out / "metrics.jsonl").write_text("old")
    with pytest.raises(UsageError, match="is not empty"), open_run("toy", "train", {}, output=out):
        pass
    with open_run("toy", "train", {}, output=out, keep=True):
        assert (out / "metrics.jsonl").exists()
    with open_run("toy", "train", {}, output=out, overwrite=True):
        assert not (out / "metrics.jsonl").exists()
        assert (out / "mine.txt").read_text() == "precious"


def test_overwrite_takes_away_what_the_verb_left_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "images" / "mine.jpg").write_text("precious")
    os.utime(out / "images" / "mine.jpg", (1000, 1000))  # was there before the run
    ours = (
        "predictions.json",
        "predictions-1-of-4.json",
        "predicted.mp4",
        "images/a/b.jpg",
        "masks/x/000-cat-0.50.png",
    )
    kept = {"last.ckpt", "predictions.txt", "images/mine.jpg"}
    with open_run("toy", "predict", {"verb": "predict"}, output=out, overwrite=True):
        for name in (*ours, "last.ckpt", "predictions.txt"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("x")
        (out / "masks" / "y").mkdir()  # of an image without instances: --skip-existing would take it for done
    with open_run("toy", "predict", {}, output=out, overwrite=True):
        found = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert found == {*kept, "images", "config.json", "environment.json", "log.txt"}


def test_pictures_of_a_folder_without_a_run_are_not_ours(tmp_path):
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "photos" / "images" / "mine.jpg").write_text("precious")
    with open_run("toy", "predict", {}, output=tmp_path / "photos", overwrite=True):
        pass
    assert (tmp_path / "photos" / "images" / "mine.jpg").exists()


def test_overwrite_never_replaces_a_run_of_another_verb(tmp_path):
    with open_run("toy", "train", {"verb": "train"}, output=tmp_path / "out") as run:
        (run.folder / "last.ckpt").write_text("hours of work")
    with (
        pytest.raises(UsageError, match="holds a run of train, and --overwrite replaces runs of explore only"),
        open_run("onestage", "explore", {"verb": "explore"}, output=tmp_path / "out", overwrite=True),
    ):
        pass
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"verb": "train"}
    with open_run("toy", "train", {"verb": "train"}, output=tmp_path / "out", overwrite=True):
        assert not (tmp_path / "out" / "last.ckpt").exists()


def test_a_file_as_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"), open_run("toy", "train", {}, output=tmp_path / "file"):
        pass


def test_resume_finds_the_newest_checkpoint_or_the_named_one(tmp_path):
    for age, name in ((20, "b"), (10, "a")):
        folder = tmp_path / "runs/toy/train" / name
        folder.mkdir(parents=True)
        (folder / "last.ckpt").write_bytes(b"")
        os.utime(folder / "last.ckpt", (1000 - age, 1000 - age))
    assert checkpoint_to_resume("toy", "auto").parent.name == "a"
    assert checkpoint_to_resume("toy", "runs/toy/train/b").parent.name == "b"
    with pytest.raises(UsageError, match="does not exist"):
        checkpoint_to_resume("toy", "c.ckpt")
    with pytest.raises(UsageError, match="no last.ckpt"):
        checkpoint_to_resume("other", "auto")


def test_environment_names_versions_and_the_machine():
    facts = environment("toy", "train")
    assert facts["packages"]["torch"]
    assert facts["cores"] >= 1
