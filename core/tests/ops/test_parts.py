"""A GPU whose memory does not hold the room of all masks at once: the same masks, made in smaller parts."""

import pytest
import torch

import onestage.ops.triton.assemble
import onestage.ops.triton.paste
from onestage.ops.assemble import assemble_masks
from onestage.ops.edges import assemble_with_profiles
from onestage.ops.packed import word_capacity
from onestage.ops.paste import paste_masks

SIZE = (20, 30)
COUNT = 7


def small_memory(monkeypatch, module, holds):
    """Lets `module` reserve room for at most `holds` masks; returns how many it was asked for, one after the other."""
    asked = []

    def capacity(count, size):
        asked.append(count)
        if count > holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return word_capacity(count, size)

    monkeypatch.setattr(module, "word_capacity", capacity)
    return asked


@pytest.fixture
def inputs(device, monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 12, (COUNT, 2), generator=generator)
    windows = torch.cat((corner, corner + torch.randint(0, 9, (COUNT, 2), generator=generator)), 1)
    basis = torch.randn(4, 10, 15, generator=generator)
    coefficients = torch.randn(COUNT, 4, generator=generator)
    maps = torch.rand(COUNT, 5, 5, generator=generator)
    return tuple(value.to(device) for value in (basis, coefficients, windows, maps))


def assembled(basis, coefficients, windows, maps):
    return [assemble_masks(basis, coefficients, windows, order="logits", upsample=2, output_size=SIZE)]


def with_profiles(basis, coefficients, windows, maps):
    masks, profiles = assemble_with_profiles(basis, coefficients, windows, upsample=2, output_size=SIZE)
    return [masks, profiles.columns, profiles.rows]


def pasted(basis, coefficients, windows, maps):
    return [paste_masks(maps, windows.float(), SIZE)]


@pytest.mark.parametrize("holds", [1, 3, 6])
@pytest.mark.parametrize(
    ("make", "module"),
    [
        (assembled, onestage.ops.triton.assemble),
        (with_profiles, onestage.ops.triton.assemble),
        (pasted, onestage.ops.triton.paste),
    ],
)
def test_masks_that_do_not_fit_together_are_made_in_parts(make, module, holds, inputs, monkeypatch):
    expected_masks, *expected = make(*inputs)
    asked = small_memory(monkeypatch, module, holds)
    masks, *others = make(*inputs)
    assert asked[0] == COUNT
    assert max(asked[-2:]) <= holds
    assert masks.is_packed
    assert masks.device == expected_masks.device
    assert torch.equal(masks.windows, expected_masks.windows)
    assert torch.equal(masks.to_bool(), expected_masks.to_bool())
    assert masks.area().sum() > 0
    assert all(torch.equal(value, wanted) for value, wanted in zip(others, expected, strict=True))


def test_where_not_even_one_mask_fits_the_error_is_the_allocators(inputs, monkeypatch):
    small_memory(monkeypatch, onestage.ops.triton.paste, 0)
    with pytest.raises(torch.OutOfMemoryError):
        pasted(*inputs)
