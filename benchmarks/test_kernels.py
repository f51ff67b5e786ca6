"""The benchmark's cases at small sizes: both sides run and agree, and a difference would be noticed."""

import json
from pathlib import Path

import pytest
import torch

IMAGE = (50, 60)
SMALL = {
    "sub_regions": (((64, 64), IMAGE, IMAGE), "same_masks"),
    "prototypes": (((16, 18), IMAGE), "same_masks"),
    "two_classes": (((64, 64), IMAGE, (47, 70)), "same_masks"),
    "pasted": ((IMAGE,), "same_masks"),
    "loss": (((20, 24), (2, 2)), "same_gradients"),
}


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import kernels

    return kernels


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_of_a_small_case_agree(kernels, name):
    arguments, check = SMALL[name]
    naive, ours = getattr(kernels, name)(*arguments)(torch.Generator().manual_seed(0))
    getattr(kernels, check)(naive(), ours())


def test_run_lengths_of_both_sides_agree(kernels):
    naive, ours = kernels.sub_regions((64, 64), IMAGE, IMAGE, rle=True)(torch.Generator().manual_seed(0))
    assert kernels.same_runs(naive(), ours()) == {"masks_of_100": 0}


def test_a_wrong_mask_stops_the_benchmark(kernels):
    naive, ours = kernels.pasted(IMAGE)(torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="of a million differ"):
        kernels.same_masks(naive().roll(1, 2), ours())


def test_the_record_says_what_ran(kernels, tmp_path):
    path = kernels.write_record(tmp_path / "speed", "masks", {"cases": ["a"]}, {"results": [1]})
    record = json.loads(path.read_text())
    assert record["config_sha256"][:12] in path.name
    assert record["results"] == [1]
    assert record["machine"]["torch"] == torch.__version__
    assert record["code"]["commit"][:7] in path.name
