"""Every package in two processes: gradients and AP are those of one process that sees all images."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("processes", Path(__file__).parents[1] / "benchmarks" / "processes.py")
processes = importlib.util.module_from_spec(SPEC)
sys.modules["processes"] = processes
SPEC.loader.exec_module(processes)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.mark.parametrize(
    ("case", "empty"),
    [*(pytest.param(case, (), id=f"{case}-objects everywhere") for case in processes.SMALL),
     *(pytest.param(case, (2, 3), id=f"{case}-a process without objects") for case in processes.CASES)],
)  # fmt: skip
def test_gradients_of_two_processes_are_those_of_one_with_both_batches(case, empty, fork, tmp_path):
    assert fork(processes.learn_from_half, case, empty, tmp_path, processes=2) == [0, 0]
    largest, where = processes.difference(case, empty, tmp_path)
    assert largest <= processes.TOLERANCE, where


@pytest.mark.parametrize("package", processes.PAPERS)
def test_images_without_objects_alone_reach_every_parameter_in_both_processes(package, fork, tmp_path):
    assert fork(processes.learn_from_half, package, range(4), tmp_path, processes=2) == [0, 0]
    first, second = processes.gradients_of_both(tmp_path)
    assert first
    for name, gradient in first.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, second[name]), name


@pytest.mark.parametrize("package", processes.PAPERS)
def test_an_evaluation_shared_by_two_processes_has_the_numbers_of_one(package, fork):
    assert fork(processes.evaluate_half, package, processes=2) == [0, 0]
