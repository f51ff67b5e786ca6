import pytest
import torch

from onestage.errors import MachineError, UsageError
from onestage.ops.dispatch import wants_triton

TENSOR = torch.zeros(1)


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_cpu_tensors_run_in_torch_unless_kernels_are_forced(monkeypatch, choice, interpret):
    monkeypatch.setenv("ONESTAGE_KERNELS", choice)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert not wants_triton(TENSOR)


def test_kernels_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MachineError, match="ONESTAGE_KERNELS is 'triton', but the tensors are on the CPU"):
        wants_triton(TENSOR)


def test_kernels_without_a_gpu_run_in_the_interpreter_if_forced(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert wants_triton(TENSOR)


def test_cuda_tensors_run_kernels_if_torch_is_not_forced(monkeypatch):
    class OnGPU:
        device = torch.device("cuda")

    for choice, wanted in (("auto", True), ("triton", True), ("torch", False)):
        monkeypatch.setenv("ONESTAGE_KERNELS", choice)
        assert wants_triton(OnGPU()) is wanted


def test_a_choice_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "cuda")
    with pytest.raises(UsageError, match="ONESTAGE_KERNELS is 'cuda'"):
        wants_triton(TENSOR)
