import json
import subprocess

from onestage.tables import record


def test_record_is_named_by_content_and_holds_its_provenance(tmp_path):
    path = record.write_record(tmp_path, "smoke toy, row 2x2", {"b": 1, "a": (2, 3)}, {"kind": "accuracy"}, "nox -s x")
    held = json.loads(path.read_text())
    digest = record.digest({"a": [2, 3], "b": 1})
    assert path.name.startswith(f"smoke-toy-row-2x2-{digest[:12]}-{held['code']['commit'][:7]}")
    assert held["config_sha256"] == digest
    assert (held["kind"], held["code"]["command"]) == ("accuracy", "nox -s x")
    assert {"device", "threads", "torch", "python"} <= held["machine"].keys()


def test_records_are_read_back_with_their_file_names(tmp_path):
    path = record.write_record(tmp_path, "x", {}, {"key": "k"})
    (read,) = record.read_records(tmp_path)
    assert (read["file"], read["key"]) == (path.name, "k")
    assert record.read_records(tmp_path / "nowhere") == []


def test_commit_is_unknown_outside_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "HERE", tmp_path)
    assert record.provenance()["commit"] == "unknown"
    assert record.provenance()["dirty"] is False


def test_commit_of_a_foreign_checkout_is_not_taken(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(record, "HERE", tmp_path)
    assert record.provenance()["commit"] == "unknown"
