"""Every kernel compiles for GPUs that are not here, keeps to its registers and spills nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import onestage
from onestage.errors import MachineError
from onestage.ops.triton.check import KernelCase, Resources, main

KERNELS = Path(onestage.__file__).parent / "ops" / "triton"
# What a kernel is compiled anew for: of a model, but for strides.
SPECIALISED = {
    "_dot_kernel": ["D", "stride_d", "stride_y"],
    "_deform_kernel": [
        "offset_cell",
        "mask_cell",
        "stride_y",
        "stride_x",
        "padding_y",
        "padding_x",
        "dilation_y",
        "dilation_x",
    ],
    "_walk_kernel": ["columns", "most", "room"],
    "_plan_kernel": ["side"],
    "_tile_kernel": ["side"],
}


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(file.stem for file in KERNELS.glob("[a-z]*.py") if file.stem != "check"))
def test_kernels_compile_without_spills(module):
    lines = compiled("-m", "onestage.ops.triton.check", module).splitlines()
    assert lines
    assert sum(" sm_90" in line for line in lines) == sum(" sm_80" in line for line in lines) > 0


@pytest.mark.slow
def test_images_and_detections_of_other_numbers_compile_nothing_anew():
    program = (
        "import json; from onestage.ops.triton.check import modules_with_kernels, specialised; "
        "cases = [case for module in modules_with_kernels().values() for case in module]; "
        "print(json.dumps([[case.kernel.__name__, specialised(case)] for case in cases]))"
    )
    found = json.loads(compiled("-c", program))
    assert {kernel for kernel, _ in found} > set(SPECIALISED)
    for kernel, names in found:
        assert set(names) <= set(SPECIALISED.get(kernel, ())), kernel


def compiled(*arguments):
    """What a process of its own prints: kernels that were imported for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_spills_or_takes_too_much_does_not_fit():
    case = KernelCase("", None, {})
    good = Resources(registers=128, stack=0, local=0, shared=200_000)
    assert good.fits(case, 90)
    assert not replace(good, registers=129).fits(case, 90)
    assert not replace(good, stack=8).fits(case, 90)
    assert not replace(good, local=8).fits(case, 90)
    assert not good.fits(case, 80)
    assert not replace(good, shared=240_000).fits(case, 90)


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(MachineError, match="an interpreted kernel cannot be compiled"):
        main()
