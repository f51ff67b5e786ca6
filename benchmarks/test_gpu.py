"""The GPU programme without a GPU: it says so, and its steps name files and flags that exist."""

import fcntl
import json
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_leaves_with_the_code_of_machines(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "1", "--output", str(tmp_path / "records")])
    from onestage.errors import MachineError

    assert gpu.main() == MachineError.exit_code
    assert capsys.readouterr().err.splitlines() == ["error: no CUDA device here: the GPU programme needs one"]
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("part", [1, 2, 3])
def test_two_parts_take_less_than_a_session_has_and_say_what_is_missing(gpu, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", str(part), "--plan"])
    monkeypatch.setitem(gpu.REQUIRED_FOR, part, ("no_such_module",))
    assert gpu.main() == 0
    *steps, last = capsys.readouterr().out.splitlines()
    assert len(steps) == len(gpu.PARTS[part])
    # A session has 15 minutes on a GPU, the starts of two machines among them.
    assert sum(float(line.split("at most")[1].split()[0]) for line in steps) <= (15 * 60 - 180) / 2
    assert last.startswith("missing: ")
    assert "no_such_module" in last


def test_what_is_missing_is_named_before_anything_runs(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "1"])
    monkeypatch.setattr(gpu, "REQUIRED", ("torch", "no_such_module"))
    assert gpu.main() == gpu.NO_GPU
    assert capsys.readouterr().err.startswith("error: no_such_module not installed")


def test_every_step_reads_files_and_flags_that_exist(gpu, monkeypatch):
    import images
    import training_steps

    for part in gpu.PARTS.values():
        for step in part:
            files = [word for word in step.command if word.endswith(".py") or "/" in word]
            if step.name == "tests":
                assert step.command[step.command.index("not slow") - 1] == "-m"
            assert files or "onestage.tables" in step.command
            assert all((gpu.ROOT / file).exists() for file in files)
    eager, graph, training = (step.command[1:] for step in gpu.PARTS[2])
    assert images.read_flags([*eager, "--output", ""]).mode == "eager"
    assert images.read_flags(graph).precision == "bf16"
    assert training_steps.read_flags(training).models == training_steps.MODELS


def test_the_ablations_are_tables_that_are_there(gpu, tmp_path, capsys):
    from onestage.cli.tables import main

    for step in gpu.PARTS[3]:
        assert step.command[:2] == ("-m", "onestage.tables")
        assert main([*step.command[2:], "--output", str(tmp_path), "--dry-run"]) == 0
        trainings = capsys.readouterr().out.splitlines()
        # Three seeds of every table, in this order: a first seed of all rows is worth more than three of some.
        seeds = [line.rpartition(", seed ")[2] if ", seed " in line else "0" for line in trainings]
        assert seeds == sorted(seeds)
        assert len(set(seeds)) == 3
        numbers = [word.removeprefix("table") for word in step.command if word.startswith("table")]
        assert all(any(f"Table {number}" in line for line in trainings) for number in numbers)


def test_a_step_that_takes_too_long_is_ended_and_its_log_kept(gpu, tmp_path, capsys):
    sleeper = gpu.Step("sleeper", ("-uc", "print('begun'); import time; time.sleep(60)"), 1.0, takes_output=False)
    assert gpu.run(sleeper, tmp_path, 3.0) == 124
    assert "begun" in capsys.readouterr().out
    assert (tmp_path / "gpu-sleeper.log").read_text() == "begun\n"


def test_training_steps_that_are_ended_leave_the_models_they_have(gpu, tmp_path, monkeypatch):
    import training_steps

    def measure(name, precision, *_):
        if precision == "bf16":
            raise KeyboardInterrupt
        return {"model": name, "milliseconds": {"median": 1.0}, "peak_mb": 1.0}

    monkeypatch.setattr(training_steps, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["training_steps.py", "--models", "a:b", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        training_steps.main()
    (file,) = tmp_path.glob("*.json")
    assert [result["model"] for result in json.loads(file.read_text())["results"]] == ["a:b"]


def test_what_a_step_has_started_ends_with_it(gpu, tmp_path):
    code = (
        "import fcntl, subprocess, time; file = open('held', 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "subprocess.Popen(['sleep', '60'], pass_fds=[file.fileno()]); time.sleep(60)"
    )
    held = tmp_path / "held"
    sleeper = gpu.Step("sleeper", ("-c", code.replace("'held'", repr(str(held)))), 1.0, takes_output=False)
    assert gpu.run(sleeper, tmp_path, 3.0) == 124
    with held.open() as file:
        for _ in range(100):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # the kernel takes a moment
                time.sleep(0.05)
        else:
            pytest.fail("the process that the step has started goes on")


def test_steps_see_the_checkout_and_compile_kernels(gpu, tmp_path, capsys):
    code = "import onestage, os; print(onestage.__file__, os.environ['TRITON_INTERPRET'])"
    step = gpu.Step("sees", ("-c", code), 1.0, takes_output=False)
    assert gpu.run(step, tmp_path, 60.0) == 0
    assert f"{gpu.ROOT}/core/src/onestage/__init__.py 0" in capsys.readouterr().out
