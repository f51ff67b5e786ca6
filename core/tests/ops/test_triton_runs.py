"""The kernels that find where masks change, against the plain-torch twin and pycocotools."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from onestage.masks import Masks
from onestage.ops import runs
from onestage.ops.packed import pack_windows, word_capacity
from onestage.ops.runs import mask_changes, mask_changes_torch, split_changes
from onestage.ops.triton.runs import mask_changes_triton


def packed(device, windows, size, seed=0, density=0.5):
    """Windows, random words with room behind them, and the same masks as `Masks` of bool pixels."""
    windows = torch.tensor(windows, dtype=torch.int64).view(-1, 4)
    areas = (windows[:, 2:] - windows[:, :2]).prod(1)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(int(areas.sum()), generator=generator) < density
    words = pack_windows(windows, pixels, word_capacity(len(windows), size))
    return windows.to(device), words.to(device), Masks(size, windows, pixels)


def equal_twin(device, windows, size, **how):
    windows, words, masks = packed(device, windows, size, **how)
    expected, expected_ends = mask_changes_torch(masks.windows, words.cpu(), size, size[0] * size[1] * len(windows))
    capacity = int(expected_ends[-1]) if len(windows) else 0
    changes, ends = mask_changes_triton(windows, words, size, capacity)
    assert ends.cpu().tolist() == expected_ends.tolist()
    assert changes.cpu().tolist() == expected[:capacity].tolist()


def test_changes_by_hand(device):
    # Column 1 holds rows 1 and 2 of 3, column 2 row 0; the second mask fills the second of two columns.
    windows = torch.tensor([[1, 0, 3, 3], [1, 0, 2, 3]], device=device)
    words = torch.tensor([0b110, 0b001, 0b111], dtype=torch.int32, device=device)
    changes, ends = mask_changes_triton(windows, words, (3, 4), 4)
    # The first run goes over the end of a column: positions 4, 5 and 6 are one run.
    assert changes.tolist() == [4, 7, 3, 6]
    assert ends.tolist() == [2, 4]


@pytest.mark.parametrize("height", [1, 31, 32, 65])
def test_windows_of_any_height_equal_the_twin(height, device):
    size = (height + 3, 9)
    windows = [[0, 0, 9, height], [2, 3, 5, height + 3], [8, 1, 9, 2], [4, 4 % size[0], 4, size[0]], [0, 0, 9, size[0]]]
    equal_twin(device, windows, size, seed=height)
    equal_twin(device, [[0, 0, 9, height], [3, 0, 4, height], [8, 0, 9, height]], (height, 9), seed=height)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("height", [32, 40])
def test_empty_and_full_masks_equal_the_twin(density, height, device):
    windows = [[0, 0, 5, height], [1, 2, 4, height], [4, 0, 5, height], [0, 0, 0, 0], [2, 0, 3, height]]
    equal_twin(device, windows, (height, 5), density=density)


@settings(derandomize=True, deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 30)),
    density=st.sampled_from([0.02, 0.5, 0.98]),
    seed=st.integers(0, 2**20),
)
def test_run_lengths_are_those_of_pycocotools_to_the_byte(size, density, seed, device, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    corners = (torch.rand(3, 2, 2, generator=generator) * (torch.tensor(size).flip(0) + 1)).long()
    windows = corners.sort(1).values.flatten(1).tolist() + [[0, 0, size[1], size[0]]]
    windows, words, masks = packed(device, windows, size, seed, density)
    dense = np.asfortranarray(masks.to_bool().numpy().transpose(1, 2, 0).astype(np.uint8))
    expected = [{"size": list(size), "counts": rle["counts"].decode()} for rle in coco_mask.encode(dense)]
    assert Masks(size, windows.cpu(), words.cpu()).to_rle() == expected
    with monkeypatch.context() as patch:
        patch.setenv("ONESTAGE_KERNELS", "triton")
        assert Masks(size, windows, words).to_rle() == expected


@pytest.mark.parametrize("count", [0, 1, 128, 129])
def test_any_number_of_masks(count, device):
    generator = torch.Generator().manual_seed(count)
    corners = (torch.rand(count, 2, 2, generator=generator) * torch.tensor([8, 7])).long()
    empty = torch.arange(count) % 4 > 0  # most: the interpreter takes long over a window
    corners[empty, 1] = corners[empty, 0]
    equal_twin(device, corners.sort(1).values.flatten(1).tolist(), (6, 7), seed=count)


def test_masks_longer_than_a_block(device):
    equal_twin(device, [[3, 5, 3, 9], [1, 0, 1300, 33], [0, 1, 2, 3], [7, 0, 1293, 40]], (40, 1300), density=0.01)


def test_what_has_no_room_is_counted_but_not_written(device):
    windows, words, masks = packed(device, [[0, 0, 9, 30], [2, 3, 9, 20]], (30, 9))
    expected, ends = mask_changes_torch(masks.windows, words.cpu(), masks.size, 270)
    changes, our_ends = mask_changes_triton(windows, words, masks.size, 100)
    assert our_ends.tolist() == ends.tolist()
    assert changes.tolist() == expected[:100].tolist()


def test_more_changes_than_usual_are_found_at_the_second_look(device, monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    windows, words, masks = packed(device, [[0, 0, 9, 30], [2, 3, 9, 20]], (30, 9))
    usual = split_changes(windows, words, masks.size)
    monkeypatch.setattr(runs, "USUAL_CHANGES", 3)
    assert [part.tolist() for part in split_changes(windows, words, masks.size)] == [part.tolist() for part in usual]
    assert sum(map(len, usual)) > 6


def test_windows_of_any_strides(device):
    windows, words, masks = packed(device, [[0, 0, 9, 30], [2, 3, 9, 20]], (30, 9))
    spread = torch.stack((words, words), 1)[:, 0]
    changes, _ = mask_changes_triton(windows.T.contiguous().T, spread, masks.size, 200)
    expected, ends = mask_changes_torch(masks.windows, words.cpu(), masks.size, 200)
    assert changes[: ends[-1]].tolist() == expected[: ends[-1]].tolist()


def test_the_custom_op_is_what_the_compiler_needs():
    windows, words, _ = packed("cpu", [[0, 0, 9, 30], [2, 3, 9, 20]], (30, 9))
    torch.library.opcheck(torch.ops.onestage.mask_changes.default, (windows, words, [30, 9], 200))
    compiled = torch.compile(mask_changes, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        compiled(windows, words, (30, 9), 200), mask_changes(windows, words, (30, 9), 200), strict=True
    ):
        assert torch.equal(ours, theirs)
