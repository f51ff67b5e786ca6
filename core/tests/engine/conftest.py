import importlib.util
import multiprocessing
import socket
import sys
from pathlib import Path

import pytest
import torch

# Autograd looks for devices at its first backward. A fake CUDA device of another test would make it start threads, and
# after those no process can be forked any more.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session")
def tiny():
    """The module beside this file."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fork(monkeypatch):
    """Calls a function in new processes, with torchrun's environment if there are several; returns exit codes.

    Forked, because importing torch anew takes seconds.
    """

    def call(function, *args, processes=1, **kwargs):
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            for name, value in {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
                monkeypatch.setenv(name, str(value))
        context = multiprocessing.get_context("fork")
        started = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            started.append(context.Process(target=_in_child, args=(function, args, kwargs)))
            started[-1].start()
        for process in started:
            process.join(60)
            process.kill()
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        return [process.exitcode for process in started]

    return call


def _in_child(function, args, kwargs):
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    function(*args, **kwargs)  # what it raises is printed and becomes exit code 1
