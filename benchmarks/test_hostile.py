"""A sample of the hostile files, and that the watch over them sees what it is to see."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def hostile():
    spec = importlib.util.spec_from_file_location("hostile", Path(__file__).parent / "hostile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


def test_a_hundred_hostile_files_are_read_or_refused(hostile):
    outcomes, peak = hostile.run(list(hostile.KINDS), 100, seed=1)
    assert len(outcomes) == 100
    assert [outcome for outcome in outcomes if outcome[1] in hostile.LOST] == []
    assert peak < hostile.MEMORY >> 20


def test_sound_files_are_read(hostile, tmp_path):
    hostile.write_surroundings(tmp_path)
    sound = {
        "annotations": hostile.text(hostile.sound_annotations()),
        "images": hostile.sound_image("JPEG"),
        "rles": hostile.text(hostile.sound_results()[0]["segmentation"]),
        "checkpoints": hostile.sound_checkpoint("training"),
        "results": hostile.text(hostile.sound_results()),
    }
    cases = []
    for kind, content in sound.items():
        path = tmp_path / "in" / kind / f"sound.{hostile.SUFFIX[kind]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        cases.append([kind, str(path), "sound"])
    (tmp_path / "batch.json").write_text(json.dumps(cases))
    outcomes, _ = hostile.try_batch(tmp_path / "batch.json")
    assert [(kind, end) for kind, end, _ in outcomes] == [(kind, "read") for kind in sound]
