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
    "edges": (((64, 64), IMAGE, (47, 70)), "same_masks_and_boxes"),
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


def test_deformable_convolutions_agree_and_dense_masks_too(kernels):
    naive, ours = kernels.deformed((6, 7), torch.float32)(torch.Generator().manual_seed(0))
    assert kernels.same_values(1e-5)(naive(), ours())["relative"] > 0
    naive, ours = kernels.dense(kernels.pasted(IMAGE))(torch.Generator().manual_seed(0))
    kernels.same_dense(naive(), ours())


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


def test_a_case_that_fails_costs_no_other_and_shows_in_the_exit_code(kernels, tmp_path, monkeypatch, capsys):
    def broken(generator, device):
        raise RuntimeError("no kernel image")

    good = kernels.Case("small", "a small paste", 0.0, kernels.pasted(IMAGE), kernels.same_masks)
    monkeypatch.setattr(kernels, "CASES", (kernels.Case("broken", "fails", 0.0, broken, kernels.same_masks), good))
    monkeypatch.setattr(kernels, "fresh_peak", lambda case, which: 1.0)  # another process has no such cases
    monkeypatch.setattr("sys.argv", ["kernels.py", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)])
    assert kernels.main() == 1
    assert "broken                failed: RuntimeError: no kernel image" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    broken_result, result = json.loads(file.read_text())["results"]
    assert broken_result["failed"]
    assert result["equal"]


def test_a_run_that_is_ended_leaves_the_cases_it_has(kernels, tmp_path, monkeypatch):
    def end(generator, device):
        raise KeyboardInterrupt

    good = kernels.Case("small", "a small paste", 0.0, kernels.pasted(IMAGE), kernels.same_masks)
    monkeypatch.setattr(kernels, "CASES", (good, kernels.Case("ended", "is ended", 0.0, end, kernels.same_masks)))
    monkeypatch.setattr(kernels, "fresh_peak", lambda case, which: 1.0)
    monkeypatch.setattr("sys.argv", ["kernels.py", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    (file,) = tmp_path.glob("*.json")
    (result,) = json.loads(file.read_text())["results"]
    assert result["case"] == "small"
