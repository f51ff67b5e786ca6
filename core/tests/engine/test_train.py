import copy
import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onestage.engine import train as train_module
from onestage.engine.checkpoint import load_checkpoint, load_weights, save_checkpoint
from onestage.engine.guard import NonFiniteLoss
from onestage.engine.train import Interrupted
from onestage.errors import DatasetError, MachineError, UsageError


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def read_rows(folder, kind=None):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind is None or kind in row]


def without_pace(rows):
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def test_loss_falls_and_the_model_finds_squares(tiny, tmp_path):
    schedule = {"length": 200, "optimizer": "adamw", "lr": 0.03}
    train_set = tiny.TinySet(40)
    run = tiny.run_tiny(tmp_path, {"log_every": 20}, schedule, train_set=train_set, val_set=train_set)
    losses = [row["loss"] for row in read_rows(tmp_path, "loss")]
    assert losses[-1] < 0.5 * losses[0]
    assert run.result.best_metrics["bbox/AP50"] > 0.1
    assert run.result.steps == 200


def test_a_run_leaves_its_files(tiny, tmp_path):
    run = tiny.run_tiny(tmp_path, {"eval_every": 4}, val_set=tiny.TinySet(6))
    assert sorted(os.listdir(tmp_path)) == [
        "best.safetensors", "last.ckpt", "metrics.csv", "metrics.jsonl", "results.json"
    ]  # fmt: skip
    assert [row["step"] for row in read_rows(tmp_path, "loss")] == list(range(1, 13))
    assert [row["step"] for row in read_rows(tmp_path, "segm/AP")] == [4, 8, 12]
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table if row["loss"]] == [r["loss"] for r in read_rows(tmp_path, "loss")]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["category_id"] for entry in results} <= {3, 5}
    state, info = load_weights(tmp_path / "best.safetensors", package="tiny")
    assert info.steps == run.result.best_step
    assert info.metrics == run.result.best_metrics
    assert info.categories == ((3, "left"), (5, "right"))
    assert state.keys() == run.model.state_dict().keys()


def test_how_the_model_is_judged_can_be_given(tiny, tmp_path):
    def judge(model, dataset, **settings):
        return {"segm/AP": 0.25, "identity_switches": 3.0}, [{"video_id": dataset}]

    run = tiny.run_tiny(tmp_path, {"eval_every": 0}, val_set="clips", evaluate=judge)
    assert run.result.best_metrics == {"segm/AP": 0.25, "identity_switches": 3.0}
    assert json.loads((tmp_path / "results.json").read_text()) == [{"video_id": "clips"}]


def test_loss_rows_carry_every_term_and_their_sum(tiny, tmp_path):
    tiny.run_tiny(tmp_path)
    row = read_rows(tmp_path, "loss")[0]
    assert row["loss"] == pytest.approx(row["loss_cls"] + row["loss_box"])
    assert row["lr"] == 0.05
    assert row["grad_norm"] > 0


def test_same_seed_same_weights_other_seed_others(tiny, tmp_path):
    first = tiny.run_tiny(tmp_path / "a").model.state_dict()
    second = tiny.run_tiny(tmp_path / "b", val_set=tiny.TinySet(5)).model.state_dict()  # evaluation draws nothing
    other = tiny.run_tiny(tmp_path / "c", {"seed": 1}).model.state_dict()
    assert_same_weights(first, second)
    assert not torch.equal(first["box.weight"], other["box.weight"])


def test_loader_workers_change_nothing(tiny, tmp_path):
    first = tiny.run_tiny(tmp_path / "a").model.state_dict()
    second = tiny.run_tiny(tmp_path / "b", {"workers": 2}).model.state_dict()
    assert_same_weights(first, second)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [3, 4, 11])  # an epoch is three batches: within one, near its end, two per step
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_and_resumed_equals_never_stopped(tiny, tmp_path, optimizer, stop, accumulate):
    schedule = {"optimizer": optimizer, "ema": 0.9}
    options = {"accumulate": accumulate, "eval_every": 5}
    val_set = tiny.TinySet(5, first=50)
    whole = tiny.run_tiny(tmp_path / "whole", options, schedule, val_set=val_set)
    tiny.run_tiny(tmp_path / "parts", {**options, "stop_after": stop}, schedule, val_set=val_set)
    resume = tmp_path / "parts" / "last.ckpt"
    parts = tiny.run_tiny(tmp_path / "parts", {**options, "resume": resume}, schedule, val_set=val_set)
    assert_same_weights(whole.model.state_dict(), parts.model.state_dict())
    assert_same_weights(*(load_weights(tmp_path / run / "best.safetensors")[0] for run in ("whole", "parts")))
    assert_same_weights(*(load_checkpoint(tmp_path / run / "last.ckpt")["ema"] for run in ("whole", "parts")))
    assert without_pace(read_rows(tmp_path / "whole")) == without_pace(read_rows(tmp_path / "parts"))


def test_the_seconds_are_those_of_all_calls(tiny, tmp_path):
    first = tiny.run_tiny(tmp_path, {"stop_after": 4})
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert 0 < saved["seconds"] <= first.result.seconds
    saved["seconds"] = 1000.0
    save_checkpoint(tmp_path / "last.ckpt", {key: value for key, value in saved.items() if key != "format"})
    assert 1000 < tiny.run_tiny(tmp_path, {"resume": tmp_path / "last.ckpt", "stop_after": 8}).result.seconds < 1100
    old = {key: value for key, value in load_checkpoint(tmp_path / "last.ckpt").items() if key != "seconds"}
    save_checkpoint(tmp_path / "last.ckpt", {key: value for key, value in old.items() if key != "format"})
    assert tiny.run_tiny(tmp_path, {"resume": tmp_path / "last.ckpt"}).result.seconds < 1000


def test_a_model_without_masks_is_judged_by_its_boxes(tiny, tmp_path):
    class Boxes(tiny.TinyModel):
        def detect(self, images, masks=True):
            return [replace(found, masks=None) for found in super().detect(images)]

    run = tiny.run_tiny(tmp_path, model=Boxes(tiny.TinyConfig()), val_set=tiny.TinySet(5))
    assert "segm/AP" not in run.result.best_metrics
    assert run.result.best_metrics["bbox/AP"] == max(row["bbox/AP"] for row in read_rows(tmp_path, "bbox/AP"))


def test_plateau_schedule_resumes_exactly(tiny, tmp_path):
    schedule = {"policy": "plateau", "length": 30, "lr": 0.5}
    whole = tiny.run_tiny(tmp_path / "whole", {}, schedule)
    tiny.run_tiny(tmp_path / "parts", {"stop_after": 20}, schedule)
    parts = tiny.run_tiny(tmp_path / "parts", {"resume": tmp_path / "parts" / "last.ckpt"}, schedule)
    assert_same_weights(whole.model.state_dict(), parts.model.state_dict())
    assert read_rows(tmp_path / "whole", "lr")[-1]["lr"] < 0.5


def test_a_resumed_run_decays_weights_as_its_own_config_says(tiny, tmp_path):
    tiny.run_tiny(tmp_path, {"stop_after": 3}, {"weight_decay": 1e-4})
    tiny.run_tiny(tmp_path, {"resume": tmp_path / "last.ckpt"}, {"weight_decay": 0.25, "momentum": 0.5})
    (group,) = load_checkpoint(tmp_path / "last.ckpt")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.25, 0.5)


@pytest.mark.parametrize("bad", [{3}, {4}, {4, 6}, {1, 2, 3}])  # an epoch is three batches
def test_a_skipped_batch_has_no_part_in_its_epochs_mean_loss(tiny, tmp_path, monkeypatch, bad):
    class Known(tiny.TinyModel):
        calls = 0

        def forward(self, images, targets):
            self.calls += 1
            loss = torch.tensor(torch.nan if self.calls in bad else float(self.calls))
            return {"loss": super().forward(images, targets)["loss_cls"] * 0 + loss}

    seen = []
    monkeypatch.setattr(train_module.Plateau, "observe", lambda plateau, loss, gamma: seen.append(loss))
    options, schedule = {"nan_policy": "skip"}, {"policy": "plateau", "length": 9}
    tiny.run_tiny(tmp_path, options, schedule, model=Known(tiny.TinyConfig()))
    epochs = [[call for call in range(first, first + 3) if call not in bad] for first in (1, 4, 7)]
    assert seen == [sum(calls) / len(calls) for calls in epochs if calls]


def test_the_pace_is_that_of_training_without_what_is_done_between(tiny, tmp_path, monkeypatch):
    clock, slept = train_module.time.perf_counter, []
    monkeypatch.setattr(train_module.time, "perf_counter", lambda: clock() + 1000 * len(slept))

    def judge(model, dataset, **settings):
        slept.append(1)
        return {"segm/AP": 0.5}, []

    tiny.run_tiny(tmp_path, {"eval_every": 1}, {"length": 3}, val_set="clips", evaluate=judge)
    assert all(row["images_per_second"] > 4 / 500 for row in read_rows(tmp_path, "loss"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_resumes_to_the_same_weights(tiny, fork, tmp_path):
    whole = tiny.run_tiny(tmp_path / "whole", {"save_every": 3}, {"ema": 0.9}, val_set=tiny.TinySet(6, first=100))
    killed = fork(tiny.run_as_process, tmp_path / "killed", {"save_every": 3}, {"ema": 0.9}, kill_at=8)
    assert killed == [-signal.SIGKILL]
    assert read_rows(tmp_path / "killed", "loss")[-1]["step"] == 8
    resume = tmp_path / "killed" / "last.ckpt"
    assert load_checkpoint(resume)["state"]["step"] == 6
    val_set = tiny.TinySet(6, first=100)
    resumed = tiny.run_tiny(tmp_path / "killed", {"save_every": 3, "resume": resume}, {"ema": 0.9}, val_set=val_set)
    assert_same_weights(whole.model.state_dict(), resumed.model.state_dict())
    assert without_pace(read_rows(tmp_path / "whole")) == without_pace(read_rows(tmp_path / "killed"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_agree_and_resume_exactly(tiny, fork, tmp_path, accumulate):
    options, schedule = {"eval_every": 6, "accumulate": accumulate}, {"length": 8}
    assert fork(tiny.run_as_process, tmp_path / "whole", options, schedule, processes=2) == [0, 0]
    assert fork(tiny.run_as_process, tmp_path / "parts", {**options, "stop_after": 5}, schedule, processes=2) == [0, 0]
    resume = tmp_path / "parts" / "last.ckpt"
    assert fork(tiny.run_as_process, tmp_path / "parts", {**options, "resume": resume}, schedule, processes=2) == [0, 0]
    assert_same_weights(*(load_checkpoint(tmp_path / run / "last.ckpt")["model"] for run in ("whole", "parts")))
    assert without_pace(read_rows(tmp_path / "whole")) == without_pace(read_rows(tmp_path / "parts"))
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == set(range(100, 106))  # both processes' images
    with pytest.raises(UsageError, match="made with processes 2, this run has 1"):
        tiny.run_tiny(tmp_path / "parts", {**options, "resume": resume}, schedule)


def judge_in_two(tiny, folder, schedule):
    """Trains in two processes; each writes the buffers of the model that it evaluates."""
    from onestage.engine import distributed

    def judge(model, dataset, **settings):
        buffers = {name: buffer.tolist() for name, buffer in model.named_buffers()}
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(buffers))
        return {"segm/AP": 0.5}, []

    distributed.start("cpu")
    tiny.run_tiny(folder, {"eval_every": 0}, schedule, val_set=tiny.TinySet(6), evaluate=judge)
    distributed.stop()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("ema", [None, 0.5])
def test_two_processes_evaluate_the_model_that_is_saved(tiny, fork, tmp_path, ema):
    assert fork(judge_in_two, tiny, tmp_path, {"length": 3, "ema": ema}, processes=2) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    saved = load_weights(tmp_path / "best.safetensors")[0]
    assert first == second == {name: saved[name].tolist() for name in first}
    assert any(value != 0 for value in first["backbone.1.running_mean"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_torchrun_hands_its_sigterm_to_both_processes_which_save_and_can_be_resumed(tiny, fork, tmp_path):
    options, schedule = {"eval_every": 0, "save_every": 0}, {"length": 150}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "parts"), json.dumps(options), json.dumps(schedule), "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(Path(__file__).with_name("tiny.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode != 0
    resume = tmp_path / "parts" / "last.ckpt"
    saved = load_checkpoint(resume)
    assert saved["fingerprint"]["processes"] == 2
    assert 3 < saved["state"]["step"] < 150
    assert fork(tiny.run_as_process, tmp_path / "parts", {**options, "resume": resume}, schedule, processes=2) == [0, 0]
    assert fork(tiny.run_as_process, tmp_path / "whole", options, schedule, processes=2) == [0, 0]
    assert_same_weights(*(load_checkpoint(tmp_path / run / "last.ckpt")["model"] for run in ("whole", "parts")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(tiny, tmp_path, number, code):
    whole, before = tiny.run_tiny(tmp_path / "whole"), signal.getsignal(signal.SIGINT)

    def interrupt(row):
        if row["step"] == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        tiny.run_tiny(tmp_path / "parts", callback=interrupt)
    assert (caught.value.exit_code, caught.value.step) == (code, 5)
    assert signal.getsignal(signal.SIGINT) == before
    parts = tiny.run_tiny(tmp_path / "parts", {"resume": caught.value.checkpoint})
    assert_same_weights(whole.model.state_dict(), parts.model.state_dict())


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny, tmp_path):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(1, 1)

        def forward(self, images, targets):
            brightness = torch.stack([image.float().mean() / 255 for image in images])
            return {"loss": (self.backbone(brightness[:, None])[:, 0] - 1).square().mean()}

    def weights_after(folder, accumulate):
        torch.manual_seed(0)
        run = tiny.run_tiny(
            tmp_path / folder, {"accumulate": accumulate}, {"length": 5}, model=Linear(), train_set=four
        )
        return run.model.backbone.weight.item()

    four = tiny.TinySet(4)
    assert weights_after("one", 1) == pytest.approx(weights_after("two", 2), rel=1e-5)


def test_averaged_weights_are_what_is_kept_as_best(tiny, tmp_path):
    run = tiny.run_tiny(tmp_path, {}, {"ema": 0.5})
    best = load_weights(tmp_path / "best.safetensors")[0]
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert_same_weights(best, saved["ema"])
    assert not torch.equal(best["box.weight"], run.model.state_dict()["box.weight"])
    assert_same_weights(saved["model"], run.model.state_dict())


@pytest.fixture
def networked(tiny):
    """A tiny model whose network is apart from what reads it, as `raw_outputs`."""

    class Networked(tiny.TinyModel):
        def features(self, images):
            pixels = torch.stack([image.float() / 255 for image in images])
            return self.dropout(self.raw_outputs(pixels))

        def raw_outputs(self, pixels):
            return self.backbone(pixels).flatten(1)

    torch.manual_seed(7)
    return Networked(tiny.TinyConfig())


def test_what_is_compiled_is_the_network_that_learns_and_not_its_average(tiny, tmp_path, networked, monkeypatch):
    seen, compiled = [], []

    def watch(network):
        compiled.append(network)
        return lambda pixels: seen.append(len(pixels)) or network(pixels)

    monkeypatch.setattr(torch, "compile", watch)
    options, schedule = {"compile": True, "eval_every": 0}, {"length": 3, "ema": 0.9}
    run = tiny.run_tiny(tmp_path, options, schedule, model=networked, val_set=tiny.TinySet(5))
    assert seen == [4, 4, 4]  # the average is what is evaluated
    assert [network.__self__ for network in compiled] == [run.model]
    assert load_weights(run.result.weights)[0].keys() == run.model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of what the compiler imports
def test_a_compiled_run_learns_the_same(tiny, tmp_path, networked, monkeypatch):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and this machine has none: train --compile is not tested")
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # other tests fork
    eager = tiny.run_tiny(tmp_path / "eager", {}, {"length": 4}, model=copy.deepcopy(networked))
    compiled = tiny.run_tiny(tmp_path / "compiled", {"compile": True}, {"length": 4}, model=networked)
    for name, tensor in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_first_averages_follow_the_weights_quickly():
    average, value = [torch.zeros(1)], [torch.ones(1)]
    train_module._ema(0.999)(average, value, torch.tensor(0))
    assert average[0].item() == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)


def test_without_validation_the_last_weights_are_the_best(tiny, tmp_path):
    run = tiny.run_tiny(tmp_path)
    assert_same_weights(load_weights(run.result.weights)[0], run.model.state_dict())
    assert run.result.metrics == {}


def test_the_run_announces_what_it_will_do(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("ONESTAGE_KERNELS", raising=False)
    with caplog.at_level(logging.INFO, "onestage"):
        tiny.run_tiny(tmp_path, {"accumulate": 2})
    text = caplog.text
    assert "threads), 1 processes, ops in plain torch, fp32, 0 loader workers" in text
    assert "10 images, 2 categories (left, right)" in text
    assert "batch 4 = 2 per process x 1 processes x 2 accumulated; sgd, learning rate 0.05 (cosine)" in text
    assert "12 steps" in text
    assert "disk" in text
    assert "peak memory" in text


def test_batch_that_cannot_be_divided_names_one_that_can(tiny, tmp_path):
    with pytest.raises(UsageError, match="batch size 4 cannot be divided") as caught:
        tiny.run_tiny(tmp_path, {"accumulate": 3})
    assert caught.value.fix == "use --batch-size 3"


def test_resuming_with_another_seed_or_data_set_is_refused(tiny, tmp_path):
    tiny.run_tiny(tmp_path, {"stop_after": 2})
    resume = tmp_path / "last.ckpt"
    with pytest.raises(UsageError, match="made with seed 0, this run has 1"):
        tiny.run_tiny(tmp_path, {"resume": resume, "seed": 1})
    with pytest.raises(UsageError, match="made with training images 10, this run has 9"):
        tiny.run_tiny(tmp_path, {"resume": resume}, train_set=tiny.TinySet(9))
    with pytest.raises(UsageError, match="groups parameters otherwise"):
        tiny.run_tiny(tmp_path, {"resume": resume}, {"bias_lr_factor": 2.0})


def test_an_empty_data_set_and_a_full_disk_end_before_the_first_step(tiny, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="no image is left"):
        tiny.run_tiny(tmp_path, train_set=tiny.TinySet(0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(MachineError, match="no space for checkpoints"):
        tiny.run_tiny(tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


def test_unknown_metric_lists_the_known(tiny, tmp_path):
    with pytest.raises(UsageError, match="metric 'mAP' is unknown"):
        tiny.run_tiny(tmp_path, {"metric": "mAP"}, {"length": 1}, val_set=tiny.TinySet(2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(tiny, tmp_path, precision):
    run = tiny.run_tiny(tmp_path / "half", {"precision": precision})
    tiny.run_tiny(tmp_path / "whole")
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())
    assert run.model.box.weight.dtype == torch.float32
    half, whole = (read_rows(tmp_path / name, "loss") for name in ("half", "whole"))
    assert half[0]["loss"] != whole[0]["loss"]
    assert half[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.01)
    assert half[-1]["loss"] < 0.9 * half[0]["loss"]


@pytest.fixture
def loud(tiny):
    """Builds a tiny model with eight times the loss: at first its gradients overflow in fp16."""

    class Loud(tiny.TinyModel):
        def forward(self, images, targets):
            return {name: 8 * loss for name, loss in super().forward(images, targets).items()}

    def build():
        torch.manual_seed(7)
        return Loud(tiny.TinyConfig())

    return build


def test_a_step_whose_gradients_overflow_in_fp16_is_skipped_and_the_loss_scaled_less(tiny, loud, tmp_path, caplog):
    model = loud()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.INFO, "onestage"):
        tiny.run_tiny(tmp_path, {"precision": "fp16", "stop_after": 1}, {"ema": 0.9}, model=model)
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert (saved["state"]["step"], saved["state"]["skipped"], saved["ema_updates"]) == (1, 1, 0)
    assert saved["scaler"]["scale"] == 2**15
    assert_same_weights(dict(model.named_parameters()), before)
    assert "grad_norm" not in read_rows(tmp_path, "loss")[0]
    assert (
        "gradients are not finite at step 0, of a loss times 65536; step skipped, and the next ones use" in caplog.text
    )
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_resumes_exactly_and_clips_gradients_that_are_not_scaled(tiny, loud, tmp_path, accumulate):
    options, schedule = {"precision": "fp16", "accumulate": accumulate}, {"ema": 0.9}
    whole = tiny.run_tiny(tmp_path / "whole", options, schedule, model=loud())
    tiny.run_tiny(tmp_path / "parts", {**options, "stop_after": 7}, schedule, model=loud())
    resume = tmp_path / "parts" / "last.ckpt"
    assert 0 < load_checkpoint(resume)["state"]["skipped"] < 7
    parts = tiny.run_tiny(tmp_path / "parts", {**options, "resume": resume}, schedule, model=loud())
    assert_same_weights(whole.model.state_dict(), parts.model.state_dict())
    first, second = (load_checkpoint(tmp_path / run / "last.ckpt") for run in ("whole", "parts"))
    assert first["scaler"] == second["scaler"]
    assert first["scaler"]["scale"] == 2.0 ** (16 - first["state"]["skipped"])
    norms = [row["grad_norm"] for row in read_rows(tmp_path / "whole", "grad_norm")]
    assert len(norms) == 12 - first["state"]["skipped"]
    assert 1 < norms[0] < 1000


def test_a_checkpoint_of_another_precision_can_be_resumed_in_fp16_and_back(tiny, tmp_path):
    resume = tmp_path / "last.ckpt"
    tiny.run_tiny(tmp_path, {"stop_after": 3})
    tiny.run_tiny(tmp_path, {"stop_after": 6, "precision": "fp16", "resume": resume})
    assert load_checkpoint(resume)["scaler"]["scale"] > 0
    assert tiny.run_tiny(tmp_path, {"precision": "bf16", "resume": resume}).result.steps == 12


def test_gradients_that_are_never_finite_end_a_run_in_fp16(tiny, tmp_path):
    class Cornered(tiny.TinyModel):
        def forward(self, images, targets):
            losses = super().forward(images, targets)
            return {**losses, "loss_root": (self.box.weight * 0).square().sum().sqrt()}  # 0, of infinite slope

    with pytest.raises(NonFiniteLoss, match="not finite at step 16, of a loss times 1\n") as caught:
        tiny.run_tiny(tmp_path, {"precision": "fp16"}, {"length": 30}, model=Cornered(tiny.TinyConfig()))
    assert "--precision bf16" in caught.value.fix
    assert caught.value.exit_code == 1


@pytest.mark.gpu
def test_the_gpu_trains_too(tiny, tmp_path):
    run = tiny.run_tiny(tmp_path, {"device": "cuda", "deterministic": True}, {"length": 3, "ema": 0.9})
    assert run.model.box.weight.is_cuda
