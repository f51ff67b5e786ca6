import pytest
import torch

from onestage.errors import MachineError, UsageError
from onestage.ops import dispatch
from onestage.ops.dispatch import wants_triton


def test_an_op_without_a_kernel_runs_in_torch(monkeypatch):
    for choice in ("auto", "torch"):
        monkeypatch.setenv("ONESTAGE_KERNELS", choice)
        assert not wants_triton("no_such_op", torch.zeros(1))


def test_kernels_that_are_not_there_cannot_be_forced(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    with pytest.raises(MachineError, match="'no_such_op' has no Triton kernel"):
        wants_triton("no_such_op", torch.zeros(1))


def test_a_kernel_runs_for_cuda_tensors_or_when_forced(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", frozenset({"op"}))
    monkeypatch.delenv("ONESTAGE_KERNELS", raising=False)
    assert not wants_triton("op", torch.zeros(1))
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    assert wants_triton("op", torch.zeros(1))


def test_a_choice_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "cuda")
    with pytest.raises(UsageError, match="ONESTAGE_KERNELS is 'cuda'"):
        wants_triton("op")
