"""`python -m onestage.synth`."""

import json
import subprocess
import sys

from onestage.synth import main


def test_the_command_writes_a_data_set_and_ends_with_json(tmp_path, capsys):
    assert main([str(tmp_path / "shapes"), "--train", "2", "--val", "1", "--size", "64", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"data": str(tmp_path / "shapes"), "train": 2, "val": 1}
    assert len(list((tmp_path / "shapes/train").iterdir())) == 2


def test_a_folder_with_something_in_it_needs_overwrite(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main([str(tmp_path), "--train", "1", "--val", "1"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: '{tmp_path}' is there and not empty",
        "  fix: name another folder, or add --overwrite",
    ]
    assert main([str(tmp_path), "--train", "1", "--val", "1", "--overwrite"]) == 0


def test_a_file_or_a_wrong_number_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file"), "--overwrite"]) == 2
    assert main([str(tmp_path / "new"), "--classes", "40"]) == 2
    assert main([]) == 2


def test_an_unknown_flag_is_refused_with_the_nearest_name(tmp_path, capsys):
    assert main([str(tmp_path / "new"), "--clases", "2"]) == 2
    assert "unknown flag '--clases'; nearest: '--classes'" in capsys.readouterr().err


def test_help_does_not_load_torch():
    code = "import sys, onestage.synth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
