"""Every kernel compiles for GPUs that are not here, keeps to its registers and spills nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onestage
from onestage.errors import MachineError
from onestage.ops.triton.check import KernelCase, Resources, main

KERNELS = Path(onestage.__file__).parent / "ops" / "triton"


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(file.stem for file in KERNELS.glob("[a-z]*.py") if file.stem != "check"))
def test_kernels_compile_without_spills(module):
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "onestage.ops.triton.check", module]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    lines = checked.stdout.splitlines()
    assert lines
    assert sum(" sm_90" in line for line in lines) == sum(" sm_80" in line for line in lines) > 0


def test_what_spills_or_takes_too_much_does_not_fit():
    case = KernelCase("", None, {})
    assert Resources(registers=128, stack=0, local=0).fits(case)
    assert not Resources(registers=129, stack=0, local=0).fits(case)
    assert not Resources(registers=20, stack=8, local=0).fits(case)
    assert not Resources(registers=20, stack=0, local=8).fits(case)


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(MachineError, match="an interpreted kernel cannot be compiled"):
        main()
