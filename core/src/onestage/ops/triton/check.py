"""Compiles every kernel for GPUs that need not be there and reads what it takes: `python -m onestage.ops.triton.check`.

A module of this folder lists its kernels in `compile_cases()`. Each must compile for every target, keep everything in
registers (no stack, no local memory), take at most 128 of those and no more shared memory than a program can have. Not
in the interpreter: an interpreted function cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import onestage.ops.triton
from onestage.errors import MachineError
from onestage.ops.dispatch import is_interpreted

TARGETS = {90: 232448, 80: 166912}  # compute capabilities, Hopper and Ampere; shared memory of a program there, bytes
LEAST_SHARED = 65536  # of any other
MAX_REGISTERS = 128


@dataclass(frozen=True)
class KernelCase:
    """A kernel in one configuration.

    Args:
        name: What tells it from the other configurations of this kernel.
        kernel: A `triton.jit` function.
        arguments: For every argument its type ("*fp32", "i32", "fp32", ...), or the value of a constexpr: anything that
            is no string, None for a pointer that is absent. Pointers count as aligned to 16 bytes.
        num_warps: As it is launched.
        num_stages: Likewise, of loops that are pipelined.
        max_registers: Of a thread; more than the usual where a matrix product accumulates in registers.
        fp_fusion: Whether a product and a sum may become one operation that rounds once.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int = MAX_REGISTERS
    fp_fusion: bool = True


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Args:
        registers: Of each thread.
        stack: Of each thread, bytes.
        local: Likewise.
        shared: Memory that the threads of a program share, bytes.
    """

    registers: int
    stack: int
    local: int
    shared: int

    def fits(self, case: KernelCase, target: int) -> bool:
        """Whether `case` may take that on compute capability `target`, and nothing spills."""
        in_registers = self.registers <= case.max_registers and self.stack == 0 and self.local == 0
        return in_registers and self.shared <= TARGETS.get(target, LEAST_SHARED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules of onestage.ops.triton (all)")
    parser.add_argument("--targets", nargs="+", type=int, default=[*TARGETS], help="compute capabilities (90 80)")
    arguments = parser.parse_args()
    if is_interpreted():
        raise MachineError("an interpreted kernel cannot be compiled", "unset TRITON_INTERPRET")
    failed = 0
    for module, cases in modules_with_kernels().items():
        for case in cases if not arguments.modules or module in arguments.modules else ():
            for target in arguments.targets:
                taken = resources(case, target)
                fits = taken.fits(case, target)
                failed += not fits
                kernel = case.kernel.__name__.strip("_")
                used = f"{taken.registers} registers, {taken.stack} stack, {taken.local} local, {taken.shared} shared"
                verdict = "" if fits else "  TOO MUCH"
                print(f"{module:10}{kernel:18}{case.name:26}sm_{target:<4}{used}{verdict}", flush=True)
    return 1 if failed else 0


def modules_with_kernels() -> dict[str, list[KernelCase]]:
    """The modules beside this one and their kernels' configurations."""
    names = [module.name for module in pkgutil.iter_modules(onestage.ops.triton.__path__)]
    modules = {name: importlib.import_module(f"onestage.ops.triton.{name}") for name in names if name != "check"}
    cases = {name: module.compile_cases() for name, module in modules.items()}
    return {name: [*of_module, *_of_ones(of_module)] for name, of_module in cases.items()}


def _of_ones(cases: list[KernelCase]) -> list[KernelCase]:
    """Each kernel once more where those numbers are 1 that Triton makes constants of, which have no methods."""
    first = {case.kernel.__name__: case for case in reversed(cases)}
    return [
        replace(case, name="every size 1", arguments=case.arguments | dict.fromkeys(names, 1))
        for case in first.values()
        if (names := specialised(case))
    ]


def specialised(case: KernelCase) -> list[str]:
    """The whole numbers for which a kernel is compiled anew where they are 1, a multiple of 16, or neither."""
    params = (param for param in case.kernel.params if case.arguments[param.name] == "i32")
    return [param.name for param in params if not param.do_not_specialize]


def resources(case: KernelCase, target: int) -> Resources:
    """Compiles a kernel for compute capability `target`; an error of the compiler travels."""
    arguments = case.arguments
    assert list(arguments) == case.kernel.arg_names, f"{case.kernel.__name__} has {case.kernel.arg_names}"
    source = ASTSource(
        fn=case.kernel,
        signature={name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()},
        constexprs={name: value for name, value in arguments.items() if not isinstance(value, str)},
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, value in enumerate(arguments.values())
            if isinstance(value, str) and value.startswith("*")
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": case.fp_fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run(
            [reader, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], compiled.metadata.shared)


if __name__ == "__main__":
    sys.exit(main())
