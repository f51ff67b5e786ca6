"""SipMask's commands: three spellings of one program, quick to answer, and the paper's switches as flags."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from onestage.cli.app import main
from onestage.cli.flags import VERBS
from sipmask.config import ABLATION, R50, SMALL
from sipmask.method import METHOD

NEARLY_ABLATION = replace(ABLATION, weighting=R50.weighting)

# Runs a module as `python -m` does and fails if that has loaded torch.
WITHOUT_TORCH = """
import runpy, sys
module, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    assert not {"torch", "torchvision", "numpy", "PIL"} & set(sys.modules), "heavy imports"
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    source = Path(__file__).parents[1] / "src"
    core = Path(__file__).parents[2] / "core" / "src"
    path = os.pathsep.join(filter(None, (str(source), str(core), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_is_quick_and_loads_no_torch(verb):
    # Processor time, not wall time: other processes may be busy. The least of three: a busy core's twin is slow, too.
    seconds = []
    while not seconds or (seconds[-1] >= 1 and len(seconds) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("-W", "ignore::RuntimeWarning", "-c", WITHOUT_TORCH, f"sipmask.{verb}", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert f"usage: python -m sipmask.{verb}" in done.stdout
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert seconds[-1] < 1


def test_version_loads_no_torch():
    done = run("-c", WITHOUT_TORCH, "sipmask", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sipmask 0.")


def test_the_spellings_are_one_program():
    first = run("-m", "sipmask.train", "--small", "--print-config")
    second = run("-m", "sipmask", "train", "--small", "--print-config")
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert run("-m", "sipmask", "trian").returncode == 2


def test_config_can_be_imported_without_torch():
    assert run("-c", "import sys, sipmask, sipmask.config; assert 'torch' not in sys.modules").returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], R50),
        (["--small"], SMALL),
        (["--model.grid", "1", "1", "--model.no-align-features", "--model.basis-levels", "P3"], NEARLY_ABLATION),
        (["--variant", "ablation"], ABLATION),
    ],
)
def test_variants_and_table_rows_are_flags(capsys, words, expected):
    from onestage.config import config_from_dict
    from sipmask.config import SipMaskConfig

    assert main(METHOD, "train", [*words, "--print-config"]) == 0
    assert config_from_dict(SipMaskConfig, json.loads(capsys.readouterr().out)["model"]) == expected
