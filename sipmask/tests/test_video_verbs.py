"""`train` and `eval` on videos: a written data set of clips, one file for both splits, and results files."""

import json

import pytest

from onestage.cli.app import main
from onestage.data.clips import make_clips
from onestage.data.coco import locate
from onestage.data.ytvis import VideoDataset
from sipmask.method import METHOD

TINY = ["--variant", "video_small", "--size", "64", "--model.track-channels", "16"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(verb, *words) -> dict:
    """The JSON that the verb ends with."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(METHOD, verb, ["-q", "--json", *map(str, words)])
    assert code == 0
    return json.loads(said.getvalue().splitlines()[-1])


def test_training_on_clips_ends_with_weights_that_eval_takes(here):
    make_clips(here / "clips", clips=(2, 2), size=64, num_frames=3)
    words = ["--data", "clips", *TINY, "--steps", 2, "--batch-size", 2, "--optim.lr", "1e-4", "--output", "run"]
    trained = run("train", *words)
    assert trained["steps"] == 2
    assert {"segm/AP", "segm/AP50", "segm/AR10", "identity_switches"} <= trained.keys()
    rows = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    assert any("loss_match" in row for row in rows)

    scored = run("eval", "--data", "clips", "--weights", "run/best.safetensors", "--per-class", "--output", "scored")
    assert scored["videos"] == 2
    for name in ("segm/AP", "segm/AP50", "identity_switches"):
        assert scored[name] == pytest.approx(trained[name])
    assert "segm/AP/ring" in scored

    again = run("eval", "--data", "clips", "--results", "scored/results.json")
    if json.loads((here / "scored/results.json").read_text()):
        assert again["segm/AP"] == pytest.approx(scored["segm/AP"])


def test_the_tracks_of_a_data_set_as_results_file_are_ap_1(here):
    make_clips(here / "clips", clips=(0, 2), size=64, num_frames=3)
    found = locate(here / "clips", "val")
    dataset = VideoDataset(found.json, found.images)
    results = [
        {
            "video_id": video.id,
            "category_id": dataset.categories[track.label][0],
            "score": 0.9,
            "segmentations": [m and {"size": m["size"], "counts": m["counts"].decode()} for m in track.masks],
        }
        for index, video in enumerate(dataset.videos)
        for track in dataset.tracks(index)
    ]
    (here / "r.json").write_text(json.dumps(results))
    metrics = run("eval", "--data", "clips", "--results", "r.json")
    assert metrics["segm/AP"] == pytest.approx(1)
    assert metrics["identity_switches"] == 0


def test_the_root_of_video_data_is_a_variable_of_its_own(here, monkeypatch, capsys):
    monkeypatch.delenv("YTVIS_ROOT", raising=False)
    assert main(METHOD, "eval", ["-q", *TINY]) == 2
    assert "YTVIS_ROOT is not set" in capsys.readouterr().err
    make_clips(here / "clips", clips=(0, 1), size=64, num_frames=2)
    monkeypatch.setenv("YTVIS_ROOT", str(here / "clips"))
    assert run("eval", *TINY, "--dry-run") == {"dry_run": True, "videos": 1}


def test_one_file_of_videos_trains_and_evaluates(here, shared):
    data = shared / "data/ytvis_mini"
    dry = run("train", "--data", data, "--variant", "video_small", "--dry-run")
    assert dry == {"dry_run": True, "train_images": 89, "val_images": 10}
