import json
from dataclasses import replace

import pytest
import torch

from onestage.data.ytvis import FramePairs
from onestage.engine.checkpoint import load_weights, save_weights
from onestage.errors import DatasetError
from onestage.tables import reproduce
from onestage.tables.plan import Job, Settings, data_of, entry_of
from onestage.tables.record import read_records
from onestage.tables.reproduce import plan_jobs, run_jobs
from onestage.tables.work import loss_curve, main, open_data, work


def test_job_survives_its_file(tmp_path, small):
    job = Job(package="toy", seed=3, rows=(("2a", "1x1"),), settings=small, output=str(tmp_path), alone=True)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_rows_that_share_a_training_train_once(rows, small, tmp_path, monkeypatch):
    jobs, _ = plan_jobs(rows("2x2*", "1x1"), small, [0], tmp_path)
    assert [job.rows for job in jobs] == [(("2a", "1x1"),), (("2a", "2x2"), ("2a", "2x2 strict"))]
    for job in jobs:
        work(job)
    records = read_records(tmp_path / "records")
    assert len(list((tmp_path / "trainings").iterdir())) == 2
    assert sorted(record["row"] for record in records) == ["1x1", "2x2", "2x2 strict"]
    by_row = {record["row"]: record for record in records}
    assert by_row["2x2"]["training"] == by_row["2x2 strict"]["training"]
    assert by_row["2x2"]["training"]["steps"] == 2
    assert by_row["2x2"]["label"] == "generated shapes, not COCO"
    assert set(by_row["2x2"]["ours"]) >= {"segm/AP", "segm/APs", "bbox/AP", "bbox/AR100"}
    files = by_row["2x2"]["pictures"]
    assert all((tmp_path / "pictures" / name).is_file() for name in files["found"] + files["truth"])
    assert plan_jobs(rows("2x2*", "1x1"), small, [0], tmp_path) == ([], 3)  # finished work is kept


def test_seeds_train_again(rows, small, tmp_path):
    jobs, _ = plan_jobs(rows("1x1"), small, range(3), tmp_path)
    assert [job.seed for job in jobs] == [0, 1, 2]


def test_row_that_measures_by_itself_trains_nothing(rows, small, tmp_path):
    (job,), _ = plan_jobs(rows("fine"), small, range(3), tmp_path)
    work(job)
    (record,) = read_records(tmp_path / "records")
    assert record["ours"] == {"error": 0.05, "images": 4.0}
    assert record["training"] is None
    assert not (tmp_path / "trainings").exists()


def test_interrupted_training_goes_on_where_it_stopped(rows, small, tmp_path, monkeypatch):
    import onestage.tables.work as module

    (job,), _ = plan_jobs(rows("1x1"), replace(small, steps=4), [0], tmp_path)
    whole = tmp_path / "whole"
    work(replace(job, output=str(whole)))

    usual, resumed_from = module.TrainOptions, []

    def stopping(**options):
        resumed_from.append(options["resume"])
        return usual(**options, stop_after=None if options["resume"] else 2)

    monkeypatch.setattr(module, "TrainOptions", stopping)
    monkeypatch.setattr(module, "file_digest", _stop_after_first_call(module.file_digest))
    with pytest.raises(KeyboardInterrupt):  # the first part ends before anything is written down
        work(job)
    assert not read_records(tmp_path / "records")
    work(job)
    assert resumed_from[0] is None
    assert resumed_from[1].name == "last.ckpt"
    (one,), (other,) = read_records(tmp_path / "records"), read_records(whole / "records")
    assert one["ours"] == other["ours"]
    parts = [load_weights(next((where / "trainings").glob("*/best.safetensors")))[0] for where in (tmp_path, whole)]
    for name, weights in parts[0].items():
        torch.testing.assert_close(weights, parts[1][name], rtol=0, atol=0)


def _stop_after_first_call(function):
    calls = []

    def once(path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(path)

    return once


def test_real_data_and_their_weights_again(rows, coco, tmp_path):
    settings = Settings(profile="full", data=str(coco), steps=2, batch_size=2, size=32, device="cpu")
    (job,), _ = plan_jobs(rows("1x1"), settings, [0], tmp_path / "a", alone=True)
    work(job)
    (record,) = read_records(tmp_path / "a" / "records")
    assert record["departures"] == list(settings.departures)
    assert record["data"]["train_images"] == 8
    assert record["ours"]["fps"] == pytest.approx(1000 / record["ours"]["ms"])
    found = json.loads((tmp_path / "a" / "results" / f"{record['key'][:12]}.json").read_text())
    assert {entry["image_id"] for entry in found} <= set(open_data(job.entries()[0], settings)[1].image_ids)
    assert all("segmentation" in entry for entry in found)

    weights = next((tmp_path / "a" / "trainings").glob("*/best.safetensors"))
    given = Settings(profile="full", data=str(coco), weights=str(weights), size=32, device="cpu")
    (job,), _ = plan_jobs(rows("1x1"), given, [0], tmp_path / "b")
    work(job)
    (again,) = read_records(tmp_path / "b" / "records")
    assert again["training"]["weights_sha256"] == record["training"]["weights_sha256"]
    assert again["ours"]["segm/AP"] == record["ours"]["segm/AP"]

    state, info = load_weights(weights)  # with the same configuration and commit, other weights are another record
    save_weights(tmp_path / "other.safetensors", {name: value + 1 for name, value in state.items()}, info)
    other = replace(given, weights=str(tmp_path / "other.safetensors"))
    (job,), _ = plan_jobs(rows("1x1"), other, [0], tmp_path / "b")
    work(job)
    assert len(read_records(tmp_path / "b" / "records")) == 2


def test_rows_on_videos_train_on_pairs_of_frames_of_generated_clips(toy, small):
    table = replace(toy.tables()[0], data="ytvis")
    entry = entry_of(replace(toy, is_video=lambda config: True), table, table.row("1x1"), small, 0)
    train_set, val_set = open_data(entry, small)
    assert isinstance(train_set, FramePairs)
    assert len(train_set) == 4 * train_set.own_videos().videos[0].num_frames  # clips, as many as `limit` says
    assert len(val_set.videos) == 4
    assert val_set.videos[0].size == (32, 32)
    assert train_set[0][1].reference is not None


def test_table_on_videos_refuses_a_folder_of_images(toy, coco):
    table = replace(toy.tables()[0], data="ytvis")
    with pytest.raises(DatasetError, match="layout of images"):
        data_of(table, Settings(profile="full", data=str(coco)))


def test_error_is_left_for_the_one_who_started_the_process(tmp_path, small, toy, capsys):
    settings = Settings(profile="full", data=str(tmp_path / "nowhere"))
    job = Job(package="toy", seed=0, rows=(("2a", "1x1"),), settings=settings, output=str(tmp_path))
    job.write(tmp_path / "job.json")
    assert main([str(tmp_path / "job.json")]) == 3
    assert "does not exist" in json.loads((tmp_path / "job.error").read_text())[0]
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_processes_side_by_side_report_progress_and_failures(rows, small, tmp_path):
    jobs, _ = plan_jobs(rows("1x1", "fine"), small, [0], tmp_path, alone=False)
    broken = replace(jobs[1], settings=replace(small, profile="full", data=str(tmp_path / "nowhere")))
    said = []
    outcome = run_jobs([jobs[0], jobs[1], broken], tmp_path, at_once=2, reused=0, say=said.append)
    assert outcome.finished == 2
    assert [(job, "does not exist" in why) for job, why in outcome.failed] == [(broken, True)]
    assert any(line.startswith("[1/3]") and "mask AP" in line for line in said)
    assert any("FAILED" in line for line in said)
    assert any("1 left, about" in line for line in said)


def test_sessions_in_one_folder_leave_each_others_jobs_alone(rows, small, tmp_path, monkeypatch):
    class Done:
        returncode = 0

        def __init__(self, *command, **how):
            pass

        def poll(self):
            return 0

    monkeypatch.setattr(reproduce.subprocess, "Popen", Done)
    for process, name in ((11, "1x1"), (12, "fine")):
        monkeypatch.setattr(reproduce.os, "getpid", lambda process=process: process)
        jobs, _ = plan_jobs(rows(name), small, [0], tmp_path, alone=False)
        run_jobs(jobs, tmp_path, at_once=2, reused=0, say=lambda line: None)
    chosen = {file.name: Job.read(file).rows for file in (tmp_path / "jobs").glob("*.json")}
    assert {name: [row for _, row in chosen[name]] for name in chosen} == {
        "11-001.json": ["1x1"],
        "12-001.json": ["fine"],
    }


def test_curves_are_thinned_and_end_with_the_last_step(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 201)] + [json.dumps({"step": 200})]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    curve = loss_curve(tmp_path / "m.jsonl")
    assert curve[-1] == (200, 0.005)
    assert len(curve) <= 60
