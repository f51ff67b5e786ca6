"""What goes wrong while training, made to happen: the run ends with two lines, or goes on, and nothing is lost."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
import zipfile

import pytest
import torch
from torch.utils.data import get_worker_info

from onestage.data.loader import WorkerDied
from onestage.engine.checkpoint import load_checkpoint, load_weights
from onestage.engine.predict import Predictor
from onestage.engine.train import Interrupted
from onestage.errors import MachineError, UsageError, WeightsError

EVERY_THREE = {"save_every": 3, "eval_every": 6}


def assert_same_run(first, second, rows=True):
    """Equal weights, optimiser, metrics (and the number of their rows) and best weights, bit for bit."""
    one, other = (load_checkpoint(folder / "last.ckpt") for folder in (first, second))
    left_out = {} if rows else {"rows": None}
    assert one["state"] | left_out == other["state"] | left_out
    assert_equal(one["model"], other["model"])
    assert_equal(one["optimizer"], other["optimizer"])
    assert_equal(load_weights(first / "best.safetensors")[0], load_weights(second / "best.safetensors")[0])


def assert_equal(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture
def whole(tiny, tmp_path):
    """The folder of a run that nothing happens to."""
    tiny.run_tiny(tmp_path / "whole", EVERY_THREE, val_set=tiny.TinySet(6, first=100))
    return tmp_path / "whole"


def go_on(tiny, folder):
    checkpoint = folder / "last.ckpt"
    resume = {"resume": checkpoint} if checkpoint.exists() else {}
    tiny.run_tiny(folder, {**EVERY_THREE, **resume}, val_set=tiny.TinySet(6, first=100))


def run_and_die_at(tiny, folder, call, number):
    """Trains, and is killed at a certain call of a function of `os`, before it does anything."""
    original, calls = getattr(os, call), 0

    def lethal(*args):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, call, lethal)
    tiny.run_tiny(folder, EVERY_THREE, val_set=tiny.TinySet(6, first=100))


# Files are written, synced, read back, renamed; then the folder is synced. The checkpoints are files 1, 2, 5, 6 and 7.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("call", "number", "saved"),
    [
        ("fsync", 1, None),  # the first checkpoint is written, and not safe
        ("replace", 2, 3),  # the second one has not got its name
        ("fsync", 4, 6),  # it has, and the folder does not know for sure
        ("replace", 3, 6),  # while results of an evaluation are written
        ("fsync", 9, 6),  # while the checkpoint after it is
    ],
)
def test_a_run_killed_while_it_writes_resumes_to_the_same_bits(tiny, fork, tmp_path, whole, call, number, saved):
    folder = tmp_path / "killed"
    assert fork(run_and_die_at, tiny, folder, call, number) == [-signal.SIGKILL]
    assert (load_checkpoint(folder / "last.ckpt")["state"]["step"] if saved else None) == saved
    assert saved or not (folder / "last.ckpt").exists()
    go_on(tiny, folder)
    assert_same_run(whole, folder)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))  # no temporary file stays
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 12 + 2


def test_a_disk_that_fills_up_in_training_leaves_a_checkpoint_to_go_on_from(tiny, tmp_path, whole):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row):
        if row["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))

    try:
        with pytest.raises(MachineError, match=r"no space to write '.*last.ckpt': 12.1 kB needed") as caught:
            tiny.run_tiny(tmp_path / "full", EVERY_THREE, val_set=tiny.TinySet(6, first=100), callback=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 5
    assert caught.value.fix.endswith("what was saved before is untouched")
    assert load_checkpoint(tmp_path / "full" / "last.ckpt")["state"]["step"] == 3
    go_on(tiny, tmp_path / "full")
    assert_same_run(whole, tmp_path / "full")


class DyingSet:
    """A data set whose third image kills the worker that reads it, once."""

    def __init__(self, tiny_set, trace):
        self.set, self.trace = tiny_set, trace

    def __getattr__(self, name):
        return getattr(self.__dict__["set"], name)

    def __len__(self):
        return len(self.set)

    def __getitem__(self, index):
        if index == 2 and get_worker_info() is not None and not self.trace.exists():
            self.trace.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.set[index]


def test_a_killed_loader_worker_is_told_and_the_run_is_saved_at_that_step(tiny, tmp_path, whole):
    folder, val_set = tmp_path / "died", tiny.TinySet(6, first=100)
    train_set = DyingSet(tiny.TinySet(), tmp_path / "trace")
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(WorkerDied) as caught:
        tiny.run_tiny(folder, {**EVERY_THREE, "workers": 1}, train_set=train_set, val_set=val_set)
    assert signal.getsignal(signal.SIGCHLD) == before
    step = load_checkpoint(folder / "last.ckpt")["state"]["step"]
    assert caught.value.what == f"a process that reads images was ended by SIGKILL after step {step}, which is saved"
    assert caught.value.fix == (
        f"memory ran out, if nobody killed it: use fewer --workers; then go on with --resume {folder / 'last.ckpt'}"
    )
    assert caught.value.exit_code == 5
    go_on(tiny, folder)
    assert_same_run(whole, folder)


def test_workers_killed_between_two_epochs_are_told_and_the_run_is_saved(tiny, tmp_path):
    def kill(row):
        if row["step"] == 3:  # the last of an epoch
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(WorkerDied, match="was ended by SIGKILL after step 3, which is saved"):
        tiny.run_tiny(tmp_path, {"workers": 1, "save_every": 0}, callback=kill)
    assert load_checkpoint(tmp_path / "last.ckpt")["state"]["step"] == 3


def train_until_the_group_is_told(tiny, folder):
    """Trains from slow images; all of the run's processes get a SIGTERM, as torchrun and batch systems send it."""

    class Slow(tiny.TinySet):
        def __getitem__(self, index):
            time.sleep(0.1)
            return super().__getitem__(index)

    def stop(row):
        if row["step"] == 2:
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)

    os.setsid()
    options = {"workers": 2, "accumulate": 2, "save_every": 0}
    try:
        tiny.run_tiny(folder, options, train_set=Slow(), callback=stop)
    except Interrupted as stopped:
        raise SystemExit(stopped.exit_code) from stopped


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_sigterm_to_all_processes_leaves_the_loader_its_workers_for_the_step(tiny, fork, tmp_path):
    assert fork(train_until_the_group_is_told, tiny, tmp_path) == [143]
    assert load_checkpoint(tmp_path / "last.ckpt")["state"]["step"] == 3


def test_within_a_step_of_several_batches_a_dying_loader_leaves_the_checkpoint_before(tiny, tmp_path):
    class Counting(tiny.TinyModel):
        calls = 0

        def forward(self, images, targets):
            self.calls += 1
            return super().forward(images, targets)

    model = Counting(tiny.TinyConfig())

    class Dies(tiny.TinySet):
        def __getitem__(self, index):
            if model.calls == 3:  # a step has two batches: this is the second of the second step
                raise WorkerDied("it died", "do something")
            return super().__getitem__(index)

    with pytest.raises(WorkerDied) as caught:
        tiny.run_tiny(tmp_path, {"accumulate": 2, "save_every": 1}, model=model, train_set=Dies())
    assert caught.value.what == "it died"
    assert load_checkpoint(tmp_path / "last.ckpt")["state"]["step"] == 1


def test_a_run_stopped_where_an_evaluation_is_due_saves_first_and_evaluates_when_it_goes_on(tiny, tmp_path, whole):
    folder, evaluated = tmp_path / "stopped", []

    def stop(row):
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluated.extend([row["step"]] if "segm/AP" in row else [])

    with pytest.raises(Interrupted) as caught:
        tiny.run_tiny(folder, EVERY_THREE, val_set=tiny.TinySet(6, first=100), callback=stop)
    assert (caught.value.step, evaluated) == (6, [])
    go_on(tiny, folder)
    assert_same_run(whole, folder)
    rows = [(folder / "metrics.jsonl").read_text().count('"segm/AP"') for folder in (whole, folder)]
    assert rows == [2, 2]


def damaged(data):
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 4
    return {"cut": data[: len(data) // 2], "flipped": bytes(flipped), "empty": b"", "foreign": b"\x80\x02}q\x00."}


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_a_broken_checkpoint_is_told_with_the_weights_to_go_on_from(tiny, tmp_path, whole, how):
    data = (whole / "last.ckpt").read_bytes()
    (whole / "last.ckpt").write_bytes(damaged(data)[how])
    with pytest.raises(WeightsError, match=r"last\.ckpt'") as caught:
        go_on(tiny, whole)
    assert caught.value.exit_code == 4
    if how == "foreign":
        assert "is not a training checkpoint of this program" in caught.value.what
    else:
        step = load_weights(whole / "best.safetensors")[1].steps
        expected = f"train from the best weights of that run, those after step {step}: "
        assert caught.value.fix == f"{expected}--weights {whole / 'best.safetensors'}"
        (whole / "best.safetensors").unlink()
        with pytest.raises(WeightsError) as caught:
            go_on(tiny, whole)
        assert caught.value.fix == "give --resume another checkpoint, or start again without it"


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors"])
def test_a_flipped_bit_is_noticed_wherever_it_matters(whole, tmp_path, name):
    data = (whole / name).read_bytes()
    read = {"last.ckpt": load_checkpoint, "best.safetensors": lambda path: load_weights(path)[0]}[name]
    expected, noticed = read(whole / name), 0
    positions = range(3, len(data), 1 + len(data) // 500)
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (tmp_path / name).write_bytes(flipped)
        try:
            assert_equal(read(tmp_path / name), expected)
        except WeightsError:
            noticed += 1
    assert noticed > len(positions) / 2  # the rest is padding and what nobody reads


def test_flipped_bits_in_the_directory_of_a_checkpoint_are_noticed(whole):
    """torch reads numbers that are marked as a folder from memory that nobody has written."""
    path = whole / "last.ckpt"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first = data.index(b"PK\x01\x02")
        entry = data.index(next(name for name in archive.namelist() if "/data/" in name).encode(), first) - 46
    for position, bit in ((entry + 38, 0x10), (len(data) - 38, 1)):  # attributes; the number of the disk
        flipped = bytearray(data)
        flipped[position] ^= bit
        path.write_bytes(flipped)
        with pytest.raises(WeightsError, match="are damaged"):
            load_checkpoint(path)


def test_a_flipped_bit_in_a_weight_is_noticed(whole):
    path = whole / "best.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # the last number's
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="are damaged: their checksum is another"):
        load_weights(path)


def test_memory_that_runs_out_is_told_with_what_was_in_use_and_what_helps(tiny, tmp_path, monkeypatch):
    class TooLarge(tiny.TinyModel):
        def forward(self, images, targets):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7.25e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9.5e9)
    with pytest.raises(MachineError) as caught:
        tiny.run_tiny(tmp_path, model=TooLarge(tiny.TinyConfig()))
    assert caught.value.what == "GPU memory ran out: 7.2 GB in use, 9.5 GB at the peak"
    for flag in ("--accumulate 2", "--precision bf16", "--size"):
        assert flag in caught.value.fix


def test_memory_that_runs_out_on_an_image_is_told_with_its_size(tiny, monkeypatch):
    class TooLarge(tiny.TinyModel):
        def detect(self, images, masks=True):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7.25e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9.5e9)
    predictor = Predictor(TooLarge(tiny.TinyConfig()), tiny.CATEGORIES, device="cpu")
    with pytest.raises(MachineError) as caught:
        predictor(torch.zeros(3, 60, 80))
    assert caught.value.what == "GPU memory ran out on an image of (60, 80): 7.2 GB in use, 9.5 GB at the peak"
    assert "--precision bf16" in caught.value.fix


def train_synchronised(tiny, folder, monkeypatch):
    from onestage.engine import distributed, train

    distributed.start("cpu")
    with pytest.raises(UsageError, match="--sync-bn works between GPUs only"):
        tiny.run_tiny(folder, {"sync_bn": True})
    # What a GPU would get, as far as the CPU goes: the layers are replaced, names and numbers stay.
    monkeypatch.setattr(train, "_device", lambda options: torch.device("cuda"))
    torch.manual_seed(0)
    model = tiny.TinyModel(tiny.TinyConfig())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = train._synchronised(model, train.TrainOptions(sync_bn=True))
    assert isinstance(model.backbone[1], torch.nn.SyncBatchNorm)
    assert_equal(dict(model.state_dict()), state)
    distributed.stop()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batch_norms_are_synchronised_between_gpus_and_refused_between_cpus(tiny, fork, tmp_path, monkeypatch):
    assert fork(train_synchronised, tiny, tmp_path, monkeypatch, processes=2) == [0, 0]
    run = tiny.run_tiny(tmp_path, {"sync_bn": True}, {"length": 1})  # alone there is nothing to synchronise
    assert type(run.model.backbone[1]) is torch.nn.BatchNorm2d


@pytest.fixture
def part(tiny, tmp_path):
    """The folder of a run like `whole` that was stopped after its first evaluation."""
    options = {**EVERY_THREE, "stop_after": 6}
    tiny.run_tiny(tmp_path / "part", options, val_set=tiny.TinySet(6, first=100))
    return tmp_path / "part"


def judged(*values):
    """An evaluation that finds these, one after the other."""
    left = list(values)
    return lambda model, dataset, **settings: ({"segm/AP": left.pop(0)}, [])


def test_a_checkpoint_copied_from_another_run_folder_is_resumed_there(tiny, tmp_path, whole, part):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(part / "last.ckpt", tmp_path / "elsewhere")
    go_on(tiny, tmp_path / "elsewhere")
    assert_same_run(whole, tmp_path / "elsewhere", rows=False)  # the rows before are not there
    go_on(tiny, tmp_path / "elsewhere")  # nothing is left to do, and nothing lost by that
    assert_same_run(whole, tmp_path / "elsewhere", rows=False)


def test_a_run_that_goes_on_in_another_folder_takes_its_best_weights_and_metrics_along(tiny, tmp_path, whole, part):
    settings = {"val_set": "clips", "evaluate": judged(0.5)}
    tiny.run_tiny(tmp_path / "better", {**EVERY_THREE, "stop_after": 6}, **settings)
    for earlier in ("part", "better"):
        options = {**EVERY_THREE, "resume": tmp_path / earlier / "last.ckpt"}
        more = {"val_set": "clips", "evaluate": judged(0.25)} if earlier == "better" else {}
        more = more or {"val_set": tiny.TinySet(6, first=100)}
        result = tiny.run_tiny(tmp_path / f"from {earlier}", options, **more).result
        assert result.weights.parent == tmp_path / f"from {earlier}"
    assert_same_run(whole, tmp_path / "from part")
    assert sorted(os.listdir(whole)) == sorted(os.listdir(tmp_path / "from part"))
    rows = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, tmp_path / "from part")]
    assert len(rows[0]) == len(rows[1]) == 12 + 2
    state, info = load_weights(result.weights)  # worse ones came later
    assert (info.steps, result.best_step) == (6, 6)
    assert_equal(state, load_weights(tmp_path / "better" / "best.safetensors")[0])


def test_best_weights_that_are_lost_are_made_up_for(tiny, tmp_path):
    settings = {"val_set": "clips", "evaluate": judged(0.5, 0.4, 0.4)}
    tiny.run_tiny(tmp_path, EVERY_THREE, **settings)
    (tmp_path / "best.safetensors").unlink()
    result = tiny.run_tiny(tmp_path, {**EVERY_THREE, "resume": tmp_path / "last.ckpt"}, **settings).result
    assert (result.best_step, load_weights(result.weights)[1].steps) == (12, 12)
