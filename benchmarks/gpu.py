"""The GPU programme: everything that wants a GPU, in three commands of six minutes each.

    python benchmarks/gpu.py --part 1                      # GPU tests; ceilings of the machine and kernels
    python benchmarks/gpu.py --part 2                      # whole images and training steps of all packages
    python benchmarks/gpu.py --part 3                      # ablations on generated shapes, 256 px, three seeds
    python benchmarks/gpu.py --part 2 --output "$OUT" --limit 300
    python benchmarks/gpu.py --part 1 --plan               # steps, the seconds they may take, what is missing; no GPU

It needs no installation of the packages: it puts the checkout on the path. What they require (REQUIRED) must be there.
Where nothing can be downloaded, carry what is missing, as wheels of that machine's Python and system. Beside PyTorch,
JAX and their usual company that has been pycocotools, and for part 3 tyro and what it needs:

    pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        -d wheels pycocotools tyro docstring-parser typeguard
    python -m pip install --no-index --no-deps --target carried wheels/*.whl          # there, and so is the next
    PYTHONPATH=carried python benchmarks/gpu.py --part 1

Each step is a process of its own, with a share of the time that is left, and records after each model or case: what is
recorded stays if the step is ended or a later one fails. Without a GPU, or without what is required, it leaves at once,
with exit code 5.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 5  # as `onestage.errors.MachineError`
REQUIRED = ("torch", "torchvision", "triton", "numpy", "PIL", "pycocotools", "safetensors", "jinja2", "tqdm")
REQUIRED_FOR = {1: ("pytest", "hypothesis"), 2: (), 3: ("tyro",)}
SOURCES = [path.parent / "src" for path in sorted(ROOT.glob("*/pyproject.toml"))]
SHOWN = 60  # lines of each log
TESTS = ("core/tests/ops", "core/tests/nn/test_deform.py", "tests/test_network_modes.py", "tests/test_waits.py")


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: Of its log.
        command: After `python`, run in the repository's root.
        share: Of the time left when it starts that it may take.
        takes_output: Whether it is told where records go.
    """

    name: str
    command: tuple[str, ...]
    share: float
    takes_output: bool = True


def ablations(package: str, share: float, *tables: str) -> Step:
    """Tables of a package on generated shapes, several trainings side by side; finished rows are kept."""
    profile = ("--profile", "smoke", "--size", "256", "--seeds", "3", "--jobs", str(max(1, (os.cpu_count() or 1) // 2)))
    return Step(package, ("-m", "onestage.tables", *tables, package, *profile), share)


# Other versions of libraries may warn of other things than ours do, which is no failure of a kernel. Slow are tests
# that compile without a GPU. A worker takes half a gigabyte of the GPU.
WORKERS = ("-n", str(min(12, os.cpu_count() or 1))) if find_spec("xdist") else ()
PYTEST = ("-W", "default", "-p", "no:cacheprovider", "-m", "not slow", *WORKERS)
RESULTS = ROOT / "benchmarks" / "results"
OUTPUTS = {1: RESULTS / "speed", 2: RESULTS / "speed", 3: ROOT / "runs" / "tables" / "gpu"}
IMAGES = ("benchmarks/images.py", "--image-size", "800", "1333", "--memory")
PARTS = {
    1: (
        Step("tests", ("-m", "pytest", "-q", *PYTEST, *TESTS), 0.5, takes_output=False),
        Step("kernels", ("benchmarks/kernels.py",), 1.0),
    ),
    2: (
        Step("images-eager", IMAGES, 0.35),
        Step("images-graph", (*IMAGES, "--mode", "graph", "--precision", "bf16", "--channels-last"), 0.5),
        Step("training", ("benchmarks/training_steps.py",), 1.0),
    ),
    3: (
        ablations("sipmask", 0.35, "table4", "table5"),
        ablations("sais", 0.35, "table2", "table3"),
        ablations("rdsnet", 0.45, "table3", "table4"),
        ablations("meinst", 0.6, "table2", "table3", "table4", "table5"),
        ablations("sprnet", 1.0, "table2"),
    ),
}


def main() -> int:
    flags = read_flags()
    missing = [name for name in (*REQUIRED, *REQUIRED_FOR[flags.part]) if find_spec(name) is None]
    if flags.plan:
        for step, seconds in planned(PARTS[flags.part], flags.limit):
            print(f"{step.name:14} at most {seconds:4.0f} s: python {' '.join(step.command)}")
        print(f"missing: {', '.join(missing) or 'nothing'}")
        return 0
    if missing:
        print(f"error: {', '.join(missing)} not installed: see the head of {__file__}", file=sys.stderr)
        return NO_GPU
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device here: the GPU programme needs one", file=sys.stderr)
        return NO_GPU
    output = Path(flags.output or OUTPUTS[flags.part]).resolve()
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + flags.limit
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    failed = 0
    for step in PARTS[flags.part]:
        status = run(step, output, step.share * (end - time.monotonic()))
        failed += status != 0
    return 1 if failed else 0


def planned(steps: Sequence[Step], limit: float) -> list[tuple[Step, float]]:
    """What each step may take where those before it take all they may, seconds."""
    plan = []
    for step in steps:
        plan.append((step, step.share * limit))
        limit -= plan[-1][1]
    return plan


def run(step: Step, output: Path, seconds: float) -> int:
    """Runs a step, its output to a log and the log's end to the terminal; its exit code, 124 after `seconds`."""
    command = [sys.executable, *step.command, *(["--output", str(output)] if step.takes_output else [])]
    log = output / f"gpu-{step.name}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the workers of pytest
                process.wait()
    print(f"== {step.name}: exit code {status} after {time.monotonic() - start:.0f} s, {log}")
    print("\n".join(log.read_text(encoding="utf-8").splitlines()[-SHOWN:]), flush=True)
    return status


def environment() -> dict[str, str]:
    """This process's, with the checkout's packages on the path and kernels compiled, not interpreted."""
    path = os.pathsep.join([*map(str, SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=list(PARTS), required=True)
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--limit", type=float, default=360, help="seconds for the part (%(default)s)")
    parser.add_argument("--output", help="folder for records and logs (benchmarks/results/speed, runs/tables/gpu)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
