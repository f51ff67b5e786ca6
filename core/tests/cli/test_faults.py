"""What goes wrong, as the command line tells it: an exit code, a line that says what, a line that says what to do."""

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onestage.cli import train as verb
from onestage.cli.app import main
from onestage.engine.checkpoint import load_checkpoint

TRAIN = "train --small --device cpu --data shapes --epochs 2"


def told(err):
    """The last two lines, without what they begin with."""
    what, fix = err.splitlines()[-2:]
    assert what.startswith("error: ")
    assert fix.startswith("  fix: ")
    assert "Traceback" not in err
    return what.removeprefix("error: "), fix.removeprefix("  fix: ")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_broken_checkpoint_ends_with_exit_code_4_and_another_way_to_go_on(call, shapes, damage):
    assert call(f"{TRAIN} --output out")[0] == 0
    damage(Path("out/last.ckpt"))
    code, _, err = call("train --resume out/last.ckpt")
    what, fix = told(err)
    assert code == 4
    assert what.startswith("weights 'out/last.ckpt' are ")
    (words,) = [part for part in fix.split(": ") if part.startswith("--weights")]
    assert call(f"{TRAIN} {words}")[0] == 0  # what it says works
    code, _, err = call("eval --data shapes --device cpu --weights out/last.ckpt")
    assert (code, told(err)[0]) == (4, what)
    damage(Path("out/best.safetensors"))
    code, _, err = call("eval --data shapes --device cpu --weights out/best.safetensors")
    assert code == 4
    assert told(err)[0].startswith("weights 'out/best.safetensors' ")


def test_a_foreign_checkpoint_is_refused_by_resume_and_eval(call, shapes):
    assert call(f"{TRAIN} --output out")[0] == 0
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 3}, "theirs.pth")
    Path("out/last.ckpt").write_bytes(Path("theirs.pth").read_bytes())
    code, _, err = call("train --resume out/last.ckpt")
    assert (code, told(err)[0]) == (4, "'out/last.ckpt' is not a training checkpoint of this program")
    code, _, err = call("eval --data shapes --weights theirs.pth")
    assert code == 4
    assert "python -m onestage.convert --from theirs.pth" in told(err)[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_in_the_middle_is_named_or_skipped_and_counted(call, shapes, workers):
    cut_image = sorted((shapes / "train").iterdir())[5]
    cut_image.write_bytes(cut_image.read_bytes()[:99])
    code, _, err = call(f"{TRAIN} --workers {workers}")
    assert code == 3
    assert f"'shapes/train/{cut_image.name}' cannot be read" in told(err)[0]
    code, out, err = call(f"{TRAIN} --workers {workers} --on-bad-sample skip --json")
    assert code == 0, err
    assert json.loads(out)["bad_samples"] == 1
    assert f"warning: 1 bad samples were skipped: image 'shapes/train/{cut_image.name}' cannot be read" in err


def test_evaluation_counts_what_it_skipped_and_looks_at_no_image_twice(call, shapes):
    (first, *_, last) = sorted((shapes / "val").iterdir())
    for path in (first, last):
        path.write_bytes(path.read_bytes()[:99])
    words = "eval --small --data shapes --device cpu --score-thr 0 --json"
    assert call(words)[0] == 3
    code, out, err = call(words, "--on-bad-sample", "skip")
    assert code == 0, err
    result = json.loads(out)
    assert (result["bad_samples"], result["images"], result["images_with_detections"]) == (2, 4, 2)


def test_a_loss_that_is_not_finite_is_kept_and_replayed(method, shapes, capsys):
    class Exploding(method.build):
        calls = 0

        def forward(self, images, targets=None):
            self.calls += 1
            if self.calls == 3:
                self.head.weight.data.fill_(torch.nan)
            return super().forward(images, targets)

    exploding = replace(method, build=lambda config: Exploding(config))
    assert main(exploding, "train", shlex.split(TRAIN)[1:] + ["--output", "out"]) == 1
    what, fix = told(capsys.readouterr().err)
    assert "is not finite at step 2 (rank 0, images " in what
    assert what.endswith("; batch saved to out/crash-2.pt")
    assert fix.startswith("add --replay out/crash-2.pt to repeat it; usual causes: learning rate ")
    assert json.loads(Path("out/error.json").read_text())["exit_code"] == 1
    Path("out/crash-2.pt").rename("moved.pt")  # away from its config.json
    code = main(method, "train", ["--device", "cpu", "--replay", "moved.pt", "--json"])
    seen = json.loads(capsys.readouterr().out)
    assert (code, seen["step"]) == (0, 2)
    assert not torch.tensor(float(seen["losses"]["loss_cls"])).isfinite()
    assert seen["first_layer"] == "head"


def test_memory_that_runs_out_is_told_in_every_verb(method, shapes, capsys, monkeypatch):
    class TooLarge(method.build):
        def forward(self, images, targets=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def detect(self, images, masks=True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            self.forward(images)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 6 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 7 << 30)
    large = replace(method, build=TooLarge)
    assert main(large, "train", shlex.split(TRAIN)[1:]) == 5
    what, fix = told(capsys.readouterr().err)
    assert what == "GPU memory ran out: 6.4 GB in use, 7.5 GB at the peak"
    assert "--accumulate 2" in fix
    assert main(large, "eval", ["--small", "--device", "cpu", "--data", "shapes"]) == 5
    what, fix = told(capsys.readouterr().err)
    assert what == (
        "out of memory (GPU: 6.0 GiB now, 7.0 GiB at the peak): CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert "--precision bf16" in fix


def train_two(method, words, told_at=None):
    """Both processes of a run; the second one is told to stop in a certain forward pass."""

    class Stopped(method.build):
        calls = 0

        def forward(self, images, targets=None):
            self.calls += 1
            if self.calls == told_at and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(images, targets)

    raise SystemExit(main(replace(method, build=lambda config: Stopped(config)), "train", shlex.split(words)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_processes_one_told_to_stop_stops_both_and_the_command_it_prints_goes_on(method, shapes, fork):
    words = TRAIN.removeprefix("train ") + " --log-every 1 --output"
    assert fork(train_two, method, f"{words} whole", processes=2) == [0, 0]
    assert fork(train_two, method, f"{words} parts", told_at=2, processes=2) == [143, 143]
    log = Path("parts/log.txt").read_text()
    command = "torchrun --standalone --nproc-per-node 2 -m onestage.train --resume parts/last.ckpt"
    assert f"go on with: {command}\n" in log
    assert "stopped by SIGTERM after step 2; saved to parts/last.ckpt" in log
    assert not Path("parts/error.json").exists()
    assert fork(train_two, method, command.split("onestage.train ")[1], processes=2) == [0, 0]
    whole, parts = (load_checkpoint(Path(run) / "last.ckpt") for run in ("whole", "parts"))
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())


def die_or_wait(method, words):
    class Dying(method.build):
        def forward(self, images, targets=None):
            if os.environ["RANK"] == "1":
                os._exit(9)
            return super().forward(images, targets)

    raise SystemExit(main(replace(method, build=lambda config: Dying(config)), "train", shlex.split(words)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_whose_companion_dies_says_so_without_a_traceback(method, shapes, fork, capfd):
    words = TRAIN.removeprefix("train ") + " --output out"
    assert fork(die_or_wait, method, words, processes=2) == [5, 9]
    what, fix = told(capfd.readouterr().err)
    assert what == "another process of this run has ended and took this one along"
    assert "--resume" in fix


@pytest.mark.parametrize(("name", "verdict", "stops"), [("shapes", 0, [1]), ("nowhere", 3, [])])
def test_a_verb_that_fails_leaves_its_group_to_the_end_of_the_process(call, shapes, monkeypatch, name, verdict, stops):
    for words in ("train --dry-run", "eval --dry-run"):
        calls = []
        monkeypatch.setattr(verb.distributed, "stop", lambda calls=calls: calls.append(1))
        assert call(f"{words} --small --device cpu --data {name}")[0] == verdict
        assert calls == stops


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_full_disk_ends_with_exit_code_5_and_the_checkpoint_before(method, shapes, fork, capfd):
    def fill_up():
        import resource

        from onestage.engine import train as engine

        save, saved = engine.save_checkpoint, []

        def save_on_a_full_disk(*arguments):
            if saved:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
            saved.append(1)
            save(*arguments)

        engine.save_checkpoint = save_on_a_full_disk
        raise SystemExit(main(method, "train", shlex.split(TRAIN)[1:] + ["--save-every", "1", "--output", "out"]))

    assert fork(fill_up) == [5]
    what, fix = told(capfd.readouterr().err)
    assert what.startswith("no space to write 'out/last.ckpt': ")
    assert "what was saved before is untouched" in fix
    assert load_checkpoint("out/last.ckpt")["state"]["step"] == 1


def test_a_log_that_the_disk_has_no_room_for_says_nothing_and_hides_no_error(here, capsys):
    import logging

    from onestage.cli.runs import open_run

    with open("/dev/full", "w") as full, pytest.raises(ZeroDivisionError), open_run("toy", "train", {}):
        logger = logging.getLogger("onestage")
        logger.handlers[-1].setStream(full).close()
        logger.info("a line")
        raise ZeroDivisionError
    assert "Logging error" not in capsys.readouterr().err


def test_launcher_of_several_machines_names_where_they_meet(monkeypatch):
    assert verb.launcher() == "python"
    monkeypatch.setattr(verb.distributed, "world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert verb.launcher() == "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0"
