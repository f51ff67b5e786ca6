"""The video benchmarks at small sizes: every stage has its time, and the commands of the training exist."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from onestage.cli.flags import parse
from sipmask.config import VIDEO_SMALL
from sipmask.method import METHOD


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_stages_add_up_to_the_loop(monkeypatch):
    pytest.importorskip("av")
    import track

    monkeypatch.setattr(track, "HEIGHT", 48)
    monkeypatch.setattr(track, "WIDTH", 64)
    monkeypatch.setattr(track, "VIDEO", replace(VIDEO_SMALL, num_classes=3))
    _, body = track.speed(3, "cpu")
    results = body["results"]
    assert {"read", "backbone", "fpn", "head", "associate", "run lengths to disk"} <= results["milliseconds"].keys()
    assert all(value > 0 for value in results["milliseconds"].values())
    assert 0 < results["frames_per_second"] < results["frames_per_second_without_pictures"]
    assert results["objects_per_frame"] > 0


def test_memory_is_that_of_as_many_frames_as_asked_for():
    import track

    _, body = track.memory(21, "cpu")  # of two clips
    assert body["results"]["frames"] == 21
    assert body["results"]["tracks"] > 0
    assert len(body["mib"]) == 21


def test_commands_train_the_small_video_model_and_look_at_held_out_clips_once():
    import clips

    flags = SimpleNamespace(steps=70, clips=[3, 2], frames=4, size=64, seed=5)
    _, train, score = clips.commands_of(flags)
    call = parse(METHOD, "train", train[2:])
    assert METHOD.is_video(call.config)
    assert (call.config.schedule.unit, call.config.schedule.length, call.flags.eval_every) == ("steps", 70, 0)
    assert parse(METHOD, "eval", score[2:]).flags.weights == call.flags.output / "best.safetensors"
