"""`python -m onestage.lint`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onestage.data.clips import make_clips
from onestage.data.coco import CocoDataset, locate
from onestage.data.synth import make_shapes
from onestage.data.ytvis import VideoDataset
from onestage.lint import main


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Four and two generated images in COCO layout."""
    make_shapes(tmp_path / "shapes", images=(4, 2), size=64, seed=0, classes=3, difficulty="easy")
    return tmp_path / "shapes"


def edited(path: Path, change) -> bytes:
    """Changes an annotation file and returns what is in it then."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path.read_bytes()


def shorten(content) -> None:
    content["annotations"][0]["segmentation"] = [[1, 2, 3]]


def test_a_clean_data_set_leaves_with_0(shapes, capsys):
    assert main([str(shapes)]) == 0
    out, err = capsys.readouterr()
    assert "train: " in out
    assert "val: " in out
    assert "nothing to complain of" in out
    assert err == ""


def test_a_broken_one_leaves_with_3_and_the_command_that_mends_it(shapes, capsys):
    edited(shapes / "annotations/instances_train.json", shorten)
    assert main([str(shapes)]) == 3
    out, err = capsys.readouterr()
    assert "skips        1  short polygon" in out
    assert err.splitlines() == [
        f"error: dataset '{shapes}' has 1 problems at which the loader stops",
        f"  fix: python -m onestage.lint {shapes} --fix cleaned        (0 entries can be repaired, 1 dropped)",
    ]


def test_fix_writes_a_copy_that_loads_and_leaves_the_original_alone(shapes, tmp_path):
    before = edited(shapes / "annotations/instances_train.json", shorten)
    listing = sorted(shapes.rglob("*"))
    assert main([str(shapes), "--fix", str(tmp_path / "cleaned")]) == 0
    assert (shapes / "annotations/instances_train.json").read_bytes() == before
    assert sorted(shapes.rglob("*")) == listing
    for split, count in (("train", 4), ("val", 2)):
        found = locate(tmp_path / "cleaned", split)
        dataset = CocoDataset(found.json, found.images)
        assert [image.shape for image, _ in (dataset[i] for i in range(count))] == [(3, 64, 64)] * count
    assert main([str(tmp_path / "cleaned")]) == 0


def test_fix_refuses_the_data_set_itself_and_what_is_not_empty(shapes, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    for folder in (shapes, tmp_path, shapes / "train", shapes / "annotations", tmp_path / "full"):
        assert main([str(shapes), "--fix", str(folder)]) == 2
    assert main([str(shapes), "--fix", str(shapes), "--overwrite"]) == 2
    assert "which is never changed" in capsys.readouterr().err


def test_overwrite_does_not_write_through_a_link_into_the_data_set(shapes, tmp_path):
    before = edited(shapes / "annotations/instances_train.json", shorten)
    (tmp_path / "cleaned").mkdir()
    (tmp_path / "cleaned/annotations").symlink_to(shapes / "annotations")
    assert main([str(shapes), "--fix", str(tmp_path / "cleaned"), "--overwrite"]) == 2
    assert (shapes / "annotations/instances_train.json").read_bytes() == before


def test_json_is_the_last_line_of_stdout(shapes, capsys):
    edited(shapes / "annotations/instances_val.json", shorten)
    assert main([str(shapes), "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == 3
    assert result["splits"]["train"]["problems"] == {}
    assert result["splits"]["val"]["problems"]["short polygon"]["count"] == 1
    assert result["splits"]["val"]["problems"]["short polygon"]["effect"] == "skips"


def test_an_annotation_file_alone_and_with_its_images(shapes, tmp_path, capsys):
    file = shapes / "annotations/instances_val.json"
    assert main([str(file)]) == 0
    (shapes / "val" / json.loads(file.read_text())["images"][0]["file_name"]).unlink()
    assert main([str(file)]) == 0
    assert main([str(file), "--images", str(shapes / "val")]) == 3
    assert "image missing" in capsys.readouterr().out
    assert main([str(file), "--images", str(shapes / "val"), "--fix", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out/instances_val.json").read_text())["images"]) == 1


def test_the_four_flags_name_files_in_no_layout(shapes, capsys):
    train = ["--train-json", str(shapes / "annotations/instances_train.json"), "--train-images", str(shapes / "train")]
    assert main(train) == 0
    assert "explicit files" in capsys.readouterr().out
    assert main(train[:2]) == 2
    assert main([str(shapes), "--images", str(shapes)]) == 2


def test_videos_are_checked_and_their_copy_loads(tmp_path, capsys):
    make_clips(tmp_path / "clips", clips=(2, 1), num_frames=3, seed=0, size=64, classes=3)

    def cut(content):
        content["annotations"][0]["segmentations"][0] = {"size": [64, 64], "counts": [5]}

    edited(tmp_path / "clips/train.json", cut)
    assert main([str(tmp_path / "clips")]) == 3
    assert "bad RLE" in capsys.readouterr().out
    assert main([str(tmp_path / "clips"), "--fix", str(tmp_path / "cleaned")]) == 0
    found = locate(tmp_path / "cleaned", "train")
    assert len(VideoDataset(found.json, found.images)) == 2


def test_a_coco_file_that_lists_videos_is_copied_as_one(shapes, tmp_path):
    edited(shapes / "annotations/instances_train.json", lambda content: content.update(videos=[{"id": 1}]))
    assert main([str(shapes), "--fix", str(tmp_path / "cleaned")]) == 0
    assert locate(tmp_path / "cleaned", "train").layout == "COCO"


def test_no_data_set_at_all_is_said_in_two_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COCO_ROOT", raising=False)
    assert main([]) == 2
    assert main([str(tmp_path)]) == 3
    (tmp_path / "page.json").write_text("<html>")
    assert main([str(tmp_path / "page.json")]) == 3
    assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["error:", "  fix:"] * 3


def test_help_does_not_load_torch():
    code = "import sys, onestage.lint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
