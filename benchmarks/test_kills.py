"""One training killed while it writes a checkpoint, and that a difference between two runs is seen."""

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from onestage.engine.checkpoint import WeightsInfo, save_checkpoint, save_weights


@pytest.fixture(scope="module")
def kills():
    spec = importlib.util.spec_from_file_location("kills", Path(__file__).parent / "kills.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module
    spec.loader.exec_module(module)
    return module


def write_run(folder, weight=1.0, momentum=0.5, loss=0.25, pace=3.0):
    folder.mkdir()
    model = {"w": torch.tensor([weight, 2.0])}
    optimizer = {"state": {0: {"momentum": torch.tensor([momentum])}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    rest = {"state": {"step": 2}, "ema": None, "ema_updates": 0}
    save_checkpoint(folder / "last.ckpt", {"model": model, "optimizer": optimizer, **rest})
    save_weights(folder / "best.safetensors", model, WeightsInfo(package="toy"))
    (folder / "results.json").write_text("[]")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "images_per_second": pace}) + "\n")
    return folder


def test_a_difference_of_the_last_bit_is_seen_and_one_of_time_is_none(kills, tmp_path):
    first = write_run(tmp_path / "first")
    assert kills.differences(first, write_run(tmp_path / "same", pace=7.0)) == []
    other = write_run(tmp_path / "other", weight=1.0 + 2**-23)
    assert kills.differences(first, other) == ["last.ckpt['model']['w']", "best.safetensors['w']"]
    other = write_run(tmp_path / "momentum", momentum=0.5 + 2**-24, loss=0.5)
    found = ["last.ckpt['optimizer']['state'][0]['momentum']", "metrics.jsonl[0]['loss']"]
    assert kills.differences(first, other) == found
    (other / "last.ckpt").unlink()
    assert kills.differences(first, other)[0] == f"{other / 'last.ckpt'} is missing"


def test_the_packages_that_take_turns_have_methods(kills):
    assert len(kills.PACKAGES) == 5
    assert [import_module(f"{package}.method").METHOD.name for package in kills.PACKAGES] == kills.PACKAGES


@pytest.mark.slow
def test_a_training_killed_at_a_random_moment_survives(kills):
    (case,) = kills.run(["sais"], 1, seed=3)
    assert case["differences"] == []
    assert 0 <= case["killed_after_step"] <= kills.STEPS  # after its last step a run still saves and evaluates
    assert (case["resumed_after_step"] or 0) <= case["killed_after_step"]
