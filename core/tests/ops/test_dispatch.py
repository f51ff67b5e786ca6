import pytest
import torch

from onestage.errors import MachineError, UsageError
from onestage.ops.dispatch import refuse_forced_kernel
from onestage.ops.paste import paste_masks


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_an_op_without_a_kernel_runs_in_torch(monkeypatch, choice):
    monkeypatch.setenv("ONESTAGE_KERNELS", choice)
    assert len(paste_masks(torch.ones(1, 4, 4), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), (8, 8))) == 1


def test_kernels_that_are_not_there_cannot_be_forced(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    with pytest.raises(MachineError, match="'paste' has no Triton kernel"):
        paste_masks(torch.ones(1, 4, 4), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), (8, 8))


def test_a_choice_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "cuda")
    with pytest.raises(UsageError, match="ONESTAGE_KERNELS is 'cuda'"):
        refuse_forced_kernel("paste")
