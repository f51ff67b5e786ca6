"""`python -m onestage.explore`."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from onestage.data.synth import make_shapes
from onestage.explore import _window, main


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> Path:
    """Four generated images to look at; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COCO_ROOT", raising=False)
    make_shapes(tmp_path / "shapes", images=(0, 4), size=64, seed=0, classes=3, difficulty="easy")
    return tmp_path / "shapes"


def annotations(shapes: Path) -> list[dict]:
    return json.loads((shapes / "annotations/instances_val.json").read_text())["annotations"]


def flawed(shapes: Path) -> list[dict]:
    """The truth as results, but for three of them: one is left out, one of another category, one doubled."""
    results = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9 - number / 100}
        for number, entry in enumerate(annotations(shapes))
    ]
    results[1]["category_id"] = results[1]["category_id"] % 3 + 1
    return [*results[1:], results[2] | {"score": 0.4}]


def written(folder: Path, results: object) -> Path:
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "results.json"


def test_the_page_shows_the_worst_and_the_json_everything(shapes, tmp_path, capsys):
    file = written(tmp_path, flawed(shapes))
    assert main([str(shapes), "--results", str(file), "--output", "out", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    content = json.loads(Path("out/explore.json").read_text())
    assert (answer["missed"], answer["wrong class"], answer["duplicate"]) == (2, 1, 1)
    assert content["counts"]["all"]["found"] == len(annotations(shapes)) - 2
    assert {kind: len(entries) for kind, entries in content["errors"].items() if entries} == {
        "missed": 2,
        "wrong class": 1,
        "duplicate": 1,
    }
    (double,) = content["errors"]["duplicate"]
    assert double["detection"] == len(flawed(shapes)) - 1
    assert re.fullmatch(r"\d+\.jpg", double["file"])
    html = Path("out/index.html").read_text()
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 2 * 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "<script" not in html
    assert json.loads(Path("out/config.json").read_text())["verb"] == "explore"


def test_empty_results_miss_everything(shapes, tmp_path):
    assert main([str(shapes), "--results", str(written(tmp_path, [])), "--output", "out"]) == 0
    content = json.loads(Path("out/explore.json").read_text())
    assert len(content["errors"]["missed"]) == len(annotations(shapes))
    assert content["counts"]["all"]["mask_iou"] is None


def test_boxes_alone_are_matched_by_boxes(shapes, tmp_path, capsys):
    results = flawed(shapes)
    del results[0]["segmentation"]
    assert main([str(shapes), "--results", str(written(tmp_path, results)), "--output", "out"]) == 0
    content = json.loads(Path("out/explore.json").read_text())
    assert content["rules"]["masks"] is False
    assert "mask_iou" not in content["errors"]["missed"][0]
    assert "boxes are matched" in capsys.readouterr().err


def test_a_mask_without_a_sound_box_has_the_box_around_it(shapes, tmp_path):
    results = flawed(shapes)
    assert main([str(shapes), "--results", str(written(tmp_path, results)), "--output", "whole"]) == 0
    results[0]["bbox"] = []
    assert main([str(shapes), "--results", str(written(tmp_path, results)), "--output", "part"]) == 0
    whole, part = (json.loads(Path(output, "explore.json").read_text()) for output in ("whole", "part"))
    assert whole["counts"] == part["counts"]


def test_limit_looks_at_the_first_images_and_keeps_positions_in_the_file(shapes, tmp_path):
    results = [entry | {"category_id": entry["category_id"] % 3 + 1} for entry in flawed(shapes)[::-1]]
    assert main([str(shapes), "--results", str(written(tmp_path, results)), "--output", "out", "--limit", "1"]) == 0
    content = json.loads(Path("out/explore.json").read_text())
    entries = [entry for kind in content["errors"].values() for entry in kind]
    assert {entry["image_id"] for entry in entries} == {1}
    assert content["images"] == 1
    for entry in entries:
        if entry["detection"] is not None:
            assert results[entry["detection"]]["image_id"] == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image_id": 999}, "image_id 999, which the data set does not have"),
        ({"category_id": 77}, "category_id 77; known are 1, 2, 3"),
        ({"score": None}, "score None"),
        ({"segmentation": {"size": [64, 64], "counts": "5"}}, "segmentation"),
        ({"video_id": 1}, "are of videos"),
    ],
)
def test_results_that_do_not_fit_leave_with_3(shapes, tmp_path, capsys, change, why):
    results = flawed(shapes)
    results[0] |= change
    assert main([str(shapes), "--results", str(written(tmp_path, results)), "--output", "out"]) == 3
    err = capsys.readouterr().err
    assert [line[:6] for line in err.splitlines()] == ["error:", "  fix:"]
    assert why in err or why == "segmentation"
    assert not Path("out").exists()


def test_mistakes_of_the_command_line_leave_with_2(shapes, tmp_path, capsys):
    file = str(written(tmp_path, []))
    for words in (
        [str(shapes)],
        [str(shapes), "--results", file, "--weights", file],
        ["--results", file],
        [str(shapes), "--results", file, "--iou-thr", "0.05"],
        [str(shapes), "--results", file, "--gap", "0"],
        [str(shapes), "--results", file, "--limit", "0"],
        [str(shapes), "--results", file, "--top", "-1"],
        [str(shapes), "--result", file],
    ):
        assert main(words) == 2, words
    assert main([str(shapes), "--results", "none.json"]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_names_of_categories_and_files_cannot_become_markup(shapes, tmp_path):
    file = shapes / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "<script>alert(1)</script>"
    for entry in content["annotations"]:
        entry["category_id"] = 1
    file.write_text(json.dumps(content))
    assert main([str(shapes), "--results", str(written(tmp_path, [])), "--output", "out"]) == 0
    assert "<script" not in Path("out/index.html").read_text()


def test_long_names_do_not_widen_the_page(shapes, tmp_path, page_width):
    file = shapes / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "x" * 200
    file.write_text(json.dumps(content))
    assert main([str(shapes), "--results", str(written(tmp_path, flawed(shapes))), "--output", "out"]) == 0
    assert 0 < page_width(Path("out/index.html").read_text(), 390) <= 390


def test_an_object_of_any_proportion_is_shown(shapes, tmp_path):
    file = shapes / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    image = content["images"][0] | {"height": 9000, "width": 12}
    box = [0, 0, 12, 9000]
    outline = [0, 0, 12, 0, 12, 9000, 0, 9000]
    thing = content["annotations"][0] | {"bbox": box, "area": 12 * 9000, "segmentation": [outline]}
    file.write_text(json.dumps(content | {"images": [image], "annotations": [thing | {"image_id": image["id"]}]}))
    Image.new("RGB", (12, 9000)).save(shapes / "val" / image["file_name"])
    assert main([str(shapes), "--results", str(written(tmp_path, [])), "--output", "out"]) == 0
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]*)', Path("out/index.html").read_text())
    assert [Image.open(io.BytesIO(base64.b64decode(text))).size for text in pictures] == [(1, 960)] * 2


def test_a_window_is_square_and_inside_the_image():
    assert _window([(10, 10, 100, 20)], (300, 400)) == (0, 0, 150, 150)
    assert _window([(390, 290, 10, 10)], (300, 400)) == (352, 252, 400, 300)
    assert _window([(0, 0, 400, 300)], (300, 400)) == (0, 0, 400, 300)
    assert _window([(500, 500, 0, 0)], (20, 30)) == (0, 0, 30, 20)


def test_the_largest_image_is_for_the_user_to_say(shapes, tmp_path, capsys):
    words = [str(shapes), "--results", str(written(tmp_path, [])), "--output", "out", "--max-pixels"]
    assert main([*words, "4095"]) == 3
    assert "has 64 x 64 px" in capsys.readouterr().err
    assert main([*words, "4096"]) == 0


def test_help_does_not_load_torch():
    code = "import sys, onestage.explore; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
