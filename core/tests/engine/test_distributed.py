import contextlib
import json

import pytest
import torch

from onestage.engine import distributed
from onestage.errors import MachineError, UsageError


def test_one_process_needs_no_group():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert distributed.reduce_mean(value).tolist() == [1, 2]
    assert not distributed.reduce_mean(value).requires_grad
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.broadcast([1, "x"]) == [1, "x"]
    assert (distributed.rank(), distributed.world_size(), distributed.rank_zero()) == (0, 1, True)
    distributed.share([value])
    distributed.barrier()


def shared_of(rank):
    tensors = [torch.tensor([0.5, float(rank)]), torch.tensor(rank), torch.tensor([rank > 0])]
    distributed.share(tensors)
    return tensors


def write_what_it_sees(folder):
    device = distributed.start("cpu")
    rank = distributed.rank()
    seen = {
        "device": str(device),
        "world": distributed.world_size(),
        "zero": distributed.rank_zero(),
        "mean": distributed.reduce_mean(torch.tensor([float(rank), 4.0])).tolist(),
        "gathered": distributed.gather(["é" * rank * 1000, 0.1 + rank]),
        "broadcast": distributed.broadcast({"from": rank}),
        "shared": [tensor.tolist() for tensor in shared_of(rank)],
    }
    distributed.barrier()
    distributed.stop()
    (folder / f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_on_the_cpu(fork, tmp_path):
    assert fork(write_what_it_sees, tmp_path, processes=2) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["zero"]
    assert not second["zero"]
    for seen in (first, second):
        assert seen["device"] == "cpu"
        assert seen["world"] == 2
        assert seen["mean"] == [0.5, 4.0]
        assert seen["gathered"] == [["", 0.1], ["é" * 1000, 1.1]]
        assert seen["broadcast"] == {"from": 0}
        assert seen["shared"] == [[0.5, 0], 0, [False]]


def test_device_names(monkeypatch):
    assert distributed.pick_device("cpu") == torch.device("cpu")
    assert distributed.pick_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match="device 'gpu' is unknown"):
        distributed.pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MachineError, match="device 'cuda:1' is not there: 1 GPUs found"):
        distributed.pick_device("cuda:1")


def test_nccl_knows_the_gpu_of_each_process(monkeypatch):
    joined = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    group = "init_process_group"
    monkeypatch.setattr(distributed.dist, group, lambda backend, **more: joined.append((backend, more["device_id"])))
    second = torch.device("cuda", 1)
    assert distributed.start("cuda") == second
    assert joined == [second, ("nccl", second)]


@pytest.mark.parametrize(("ends", "left"), [(None, 1), (SystemExit(143), 1), (MachineError("it failed", ""), 0)])
def test_a_group_is_left_together_and_not_by_a_process_that_failed(monkeypatch, ends, left):
    calls = []
    monkeypatch.setattr(distributed, "stop", lambda: calls.append(1))
    with contextlib.suppress(SystemExit, MachineError), distributed.left_together():
        if ends is not None:
            raise ends
    assert len(calls) == left
