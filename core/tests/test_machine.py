import math
import sys

import pytest
import torch

from onestage import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize(("cores", "on_cpu", "on_gpu"), [(1, 0, 0), (4, 0, 2), (5, 2, 2), (64, 4, 4)])
def test_a_small_cpu_gets_no_workers_unless_a_gpu_does_the_work(monkeypatch, cores, on_cpu, on_gpu):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    assert machine.default_workers(CPU) == on_cpu
    assert machine.default_workers(torch.device("cuda")) == on_gpu


@pytest.mark.skipif(sys.platform != "linux", reason="the others stand for another system")
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch):
    here = machine.peak_memory(CPU)
    assert 2**24 < here < 2**40  # torch alone takes more than 16 MiB
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts in bytes
    assert machine.peak_memory() == pytest.approx(here / 1024, rel=0.1)
    monkeypatch.setattr(sys, "platform", "win32")  # which has no `resource`
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(machine.peak_memory())
