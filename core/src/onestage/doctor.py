"""`python -m onestage.doctor`: whether this machine can run the packages, and what to do where it cannot.

Needs nothing but Python itself: libraries are imported in a process of their own, so that one that is missing, built
for another device or crashing is a line of the report.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any, Literal

from onestage.errors import MachineError
from onestage.machine import usable_cores

CORE = "onestage-core"
GIB = 2**30
PATIENCE = 60.0  # seconds for the imports; they take two or three where nothing is wrong
REINSTALL = "install both from the same index, for example: pip install --force-reinstall torch torchvision"
OPTIONAL = {
    "av": "videos in and out: pip install av",
    "supervision": "Result.to_supervision: pip install supervision",
    "faster-coco-eval": "eval --backend faster-coco-eval: pip install faster-coco-eval",
    "tensorboard": "train --log tensorboard: pip install tensorboard",
    "onnx": "export: pip install onnx onnxscript",
    "onnxruntime": "export checks what it wrote: pip install onnxruntime",
}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: What was looked at.
        status: `ok`; `note` for what may be as it is; `warn` for what will hurt; `fail` for what will not run.
        found: What is there.
        fix: What to do, where something is to be done.
    """

    name: str
    status: Literal["ok", "note", "warn", "fail"]
    found: str
    fix: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 nothing fails, 5 something does.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m onestage.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags = parser.parse_args(argv)
    start = time.monotonic()
    checks = examine()
    failed = sum(check.status == "fail" for check in checks)
    code = MachineError.exit_code if failed else 0
    if flags.json:
        seconds = round(time.monotonic() - start, 1)
        print(json.dumps({"checks": [asdict(check) for check in checks], "seconds": seconds, "exit_code": code}))
        return code
    for check in checks:
        print(f"{check.status:5} {check.name:16} {check.found}")
        if check.fix:
            print(f"{'':24}fix: {check.fix}" if check.status in ("warn", "fail") else f"{'':24}{check.fix}")
    print(f"{failed} of {len(checks)} checks failed" if failed else "everything that is needed is there")
    return code


def examine() -> list[Check]:
    """All checks, in the order in which they are worth mending."""
    answers = probe_apart()
    return [
        python_check(sys.version_info[:2]),
        *requirement_checks(_core_requirements()),
        *pair_checks(),
        *import_checks(answers),
        gpu_check(answers),
        triton_check(answers),
        *package_checks(),
        memory_check(),
        *shared_memory_checks(),
        disk_check(Path.cwd()),
        threads_check(),
        *variable_checks(os.environ),
        *optional_checks(),
    ]


def python_check(found: tuple[int, ...]) -> Check:
    """Whether this Python is one the packages run on."""
    text = f"{platform.python_version()}, {sys.executable}, {platform.system()} {platform.machine()}"
    if found < (3, 10):
        return Check("python", "fail", text, "install Python 3.10 or newer and make the environment with it")
    return Check("python", "ok", text)


def requirement_checks(requirements: Sequence[str]) -> list[Check]:
    """Whether what the core asks for is installed in the versions it asks for.

    Args:
        requirements: As `pip` writes them: `torch>=2.10`, `triton; sys_platform == 'linux'`.
    """
    checks = []
    for requirement in requirements:
        line, _, marker = requirement.partition(";")
        if "extra" in marker or ("sys_platform" in marker and sys.platform not in marker):
            continue
        parsed = re.match(r"\s*([\w.-]+)\s*(?:>=\s*([\d.]+))?", line)
        assert parsed is not None, requirement
        name, least = parsed[1], parsed[2] or ""
        found = installed(name)
        wanted = line.strip()
        if found is None:
            checks.append(Check(name, "fail", "not installed", f"pip install '{wanted}'"))
        elif least and _numbers(found) < _numbers(least):
            checks.append(Check(name, "fail", f"{found}; {least} or newer is needed", f"pip install -U '{wanted}'"))
        else:
            checks.append(Check(name, "ok", found))
    return checks


def pair_checks() -> list[Check]:
    """Whether torch and torchvision were made for each other: torchvision names its torch."""
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch is None or torchvision is None:
        return []
    pins = [re.match(r"torch\s*\(?==\s*([\w.+!]+)", line) for line in requires("torchvision") or []]
    wanted = next((pin[1] for pin in pins if pin), None)
    if wanted is not None and wanted.partition("+")[0] != torch.partition("+")[0]:
        found = f"torchvision {torchvision} was built for torch {wanted}, and torch is {torch}"
        return [Check("torch pair", "fail", found, REINSTALL)]
    builds = {name: text.partition("+")[2] for name, text in (("torch", torch), ("torchvision", torchvision))}
    if all(builds.values()) and len(set(builds.values())) > 1:
        found = f"torch {torch} and torchvision {torchvision} were built for different devices"
        return [Check("torch pair", "fail", found, REINSTALL)]
    return [Check("torch pair", "ok", f"torchvision {torchvision} is made for torch {torch}")]


def import_checks(answers: dict[str, dict[str, Any]]) -> list[Check]:
    """Whether the compiled libraries can be imported and do a first piece of work.

    Args:
        answers: What `probe_apart` returned.
    """
    checks = []
    for stage in ("torch", "torchvision", "pycocotools"):
        answer = answers.get(stage)
        if answer is None:
            continue
        error = answer.get("error")
        if error is None:
            checks.append(Check(f"{stage} works", "ok", answer["found"]))
        else:
            checks.append(Check(f"{stage} works", "fail", error, _remedy(stage, error)))
    return checks


def gpu_check(answers: dict[str, dict[str, Any]]) -> Check:
    """The GPUs that torch sees, and why it does not where there is one."""
    answer = answers.get("cuda") or {}
    driver = _driver()
    if answer.get("devices"):
        return Check("gpu", "ok", "; ".join(answer["devices"]) + (f"; driver {driver}" if driver else ""))
    if answer.get("mps"):
        return Check("gpu", "note", "Apple GPU; the packages compute on the CPU here")
    if driver is None:
        return Check("gpu", "note", "none; everything runs on the CPU, training at the papers' sizes takes weeks")
    built = answer.get("built")
    if built is None:
        found = f"there is one (driver {driver}), but this torch was built without CUDA"
        return Check("gpu", "warn", found, "install torch and torchvision for CUDA: https://pytorch.org/get-started")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Check("gpu", "warn", "CUDA_VISIBLE_DEVICES is empty and hides it", "unset CUDA_VISIBLE_DEVICES")
    reason = f": {answer['error']}" if answer.get("error") else ""
    found = f"there is one (driver {driver}), but torch, built for CUDA {built}, cannot use it{reason}"
    return Check("gpu", "warn", found, "update the driver, or install a torch built for an older CUDA")


def triton_check(answers: dict[str, dict[str, Any]]) -> Check:
    """Whether Triton's kernels can be compiled, which matters on a GPU only."""
    answer = answers.get("triton") or {}
    if answer.get("error"):
        status: Literal["warn", "note"] = "warn" if (answers.get("cuda") or {}).get("devices") else "note"
        return Check("triton works", status, answer["error"], "the plain-torch twins run in place of the kernels")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return Check("triton works", "note", "there is no C compiler", "on a GPU Triton needs one: install gcc")
    return Check("triton works", "ok", answer.get("found", "not looked at"))


def package_checks() -> list[Check]:
    """The papers' packages, which are of the core's version."""
    core = installed(CORE)
    names = sorted({entry.name for entry in entry_points(group="onestage.methods")})
    if not names:
        fix = "in the clone: pip install ./<package>"
        return [Check("papers", "note", "no paper's package is installed in this environment", fix)]
    others = [f"{name} {found}" for name in names if (found := installed(f"onestage-{name}")) not in (None, core)]
    if others and core is not None:
        found = f"{', '.join(others)} beside core {core}"
        return [Check("papers", "warn", found, "install all packages from the same checkout")]
    return [Check("papers", "ok", ", ".join(names))]


def memory_check() -> Check:
    """Memory that is left to this process."""
    free = _memory_left()
    if free is None:
        return Check("memory", "note", "unknown on this system")
    text = f"{free / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Check("memory", "warn", text, "close other programs; the demos need 2 GiB, COCO's annotations 4")
    return Check("memory", "ok", text)


def shared_memory_checks(place: Path = Path("/dev/shm")) -> list[Check]:
    """Room for what loader workers hand over; containers often have 64 MB."""
    if not place.is_dir():
        return []
    total = shutil.disk_usage(place).total
    if total < GIB:
        fix = "start the container with --shm-size 8g or --ipc=host, or train with --workers 0"
        return [Check("shared memory", "warn", f"{total / 2**20:.0f} MiB for the images of loader workers", fix)]
    return [Check("shared memory", "ok", f"{total / GIB:.1f} GiB")]


def disk_check(folder: Path) -> Check:
    """Room and permission where run folders go."""
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "warn", f"{folder} cannot be written to", "run elsewhere, or give --output FOLDER")
    if free < 2 * GIB:
        return Check("disk", "warn", text, "free some space, or give --output on another disk; a checkpoint is 0.5 GB")
    return Check("disk", "ok", text)


def threads_check() -> Check:
    """Processor cores this process may use, and threads it will."""
    cores = usable_cores()
    share = _processor_share()
    text = f"{cores} cores" + (f", of which this container gets {share:.1f}" if share is not None else "")
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is not None:
        text += f", OMP_NUM_THREADS={wanted}"
    if share is not None and share < cores and wanted is None:
        fix = f"set OMP_NUM_THREADS={max(1, int(share))}: threads that wait for each other make it slower"
        return Check("threads", "warn", text, fix)
    return Check("threads", "ok", text)


def variable_checks(variables: Any) -> list[Check]:
    """Environment variables that the packages read.

    Args:
        variables: Usually `os.environ`.
    """
    checks = []
    kernels = variables.get("ONESTAGE_KERNELS")
    if kernels is not None:
        known = kernels in ("auto", "torch", "triton")
        fix = "" if known else "set it to auto, torch or triton, or unset it"
        checks.append(Check("ONESTAGE_KERNELS", "ok" if known else "fail", kernels, fix))
    for name in ("COCO_ROOT", "YTVIS_ROOT", "ONESTAGE_GOLDEN"):
        place = variables.get(name)
        if place is not None:
            there = Path(place).is_dir()
            fix = "" if there else "name the folder that holds annotations and images, or unset it"
            checks.append(Check(name, "ok" if there else "warn", place + ("" if there else " is no folder"), fix))
    return checks


def optional_checks() -> list[Check]:
    """Libraries that some verbs can use."""
    there = [f"{name} {found}" for name in OPTIONAL if (found := installed(name))]
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if installed(name) is None]
    checks = [Check("optional", "ok", ", ".join(there))] if there else []
    return [*checks, *([Check("optional", "note", f"not installed: {'; '.join(missing)}")] if missing else [])]


def probe_apart(patience: float = PATIENCE) -> dict[str, dict[str, Any]]:
    """Imports the compiled libraries in another process.

    Args:
        patience: Seconds after which it is ended.

    Returns:
        For each stage that was reached, `found`, or `error`: one line. The last one may have killed the process.
    """
    command = [sys.executable, "-c", "from onestage.doctor import probe; probe()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=patience)
        out, ended = done.stdout, f"the process ended with {done.returncode}"
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        ended += f": {last[0].strip()}" if last else ""
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        out = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        ended = f"not done after {patience:g} s"
    answers: dict[str, dict[str, Any]] = {}
    begun = None
    for line in out.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # what a library printed
            answer = json.loads(line)
            stage = answer["stage"]
            begun = stage if answer.get("begun") else None
            if not begun:
                answers[stage] = answer
    if begun is not None:
        answers[begun] = {"stage": begun, "error": f"cannot be imported: {ended}"}
    return answers


def probe() -> None:
    """What `probe_apart` runs: imports one library after the other and prints a JSON line before and after each."""
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "torch": _try_torch,
        "cuda": _try_cuda,
        "torchvision": _try_torchvision,
        "triton": _try_triton,
        "pycocotools": _try_pycocotools,
    }
    for stage, attempt in stages.items():
        print(json.dumps({"stage": stage, "begun": True}), flush=True)
        try:
            answer = attempt()
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError, AssertionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        print(json.dumps({"stage": stage, **answer}), flush=True)


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _try_torch() -> dict[str, Any]:
    import torch

    assert float(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum()) == 8
    return {"found": f"{torch.__version__}, {torch.get_num_threads()} threads"}


def _try_cuda() -> dict[str, Any]:
    import torch

    answer: dict[str, Any] = {"built": torch.version.cuda or torch.version.hip, "devices": []}
    answer["mps"] = torch.backends.mps.is_available()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / GIB:.0f} GiB, capability {about.major}.{about.minor}"
        answer["devices"].append(f"{text}, CUDA {answer['built']}")
    return answer


def _try_torchvision() -> dict[str, Any]:
    """Runs an operator of torchvision's compiled library, which is what breaks.

    The package itself is not imported: with torch's compiler, which it loads, that takes longer than all the rest.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise ImportError("No module named 'torchvision'")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    libraries = [
        file for folder in folders for suffix in ("so", "pyd") for file in sorted(folder.glob(f"_C*.{suffix}"))
    ]
    missing = "operator torchvision::nms does not exist"
    if not libraries:
        raise RuntimeError(f"{missing}: there is no compiled library in {', '.join(map(str, folders))}")
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        raise RuntimeError(f"{missing}: {str(error.__cause__ or error).splitlines()[0]}") from error
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    assert torch.ops.torchvision.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]
    return {"found": f"{installed('torchvision')}, its operators run"}


def _try_triton() -> dict[str, Any]:
    import triton

    return {"found": str(triton.__version__)}


def _try_pycocotools() -> dict[str, Any]:
    import numpy as np
    from pycocotools import mask

    rle = mask.encode(np.asfortranarray(np.eye(3, dtype=np.uint8)))
    assert int(mask.area(rle)) == 3
    return {"found": f"{installed('pycocotools')} with numpy {np.__version__}"}


def _remedy(stage: str, error: str) -> str:
    if "torchvision::nms" in error or (stage == "torchvision" and "undefined symbol" in error):
        return REINSTALL
    if "No module named" in error:
        return f"pip install {error.split(chr(39))[1] if chr(39) in error else stage}"
    if "numpy" in error.lower() or "_ARRAY_API" in error:
        return f"{stage} was built for another numpy: pip install --force-reinstall --no-cache-dir {stage} numpy"
    if "cannot open shared object file" in error or "DLL" in error:
        return f"a library it needs is not there: pip install --force-reinstall {stage}"
    return f"pip install --force-reinstall {stage}"


def _core_requirements() -> list[str]:
    """What the core's metadata asks for; without an installed core, what it cannot do without."""
    try:
        return requires(CORE) or []
    except PackageNotFoundError:
        names = ["torch", "torchvision", "numpy", "pycocotools", "pillow", "jinja2", "tyro", "safetensors", "tqdm"]
        return [*names, "triton; sys_platform == 'linux'"]


def _numbers(text: str) -> tuple[int, ...]:
    """`2.10.1+cpu` as (2, 10, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _driver() -> str | None:
    """Version of NVIDIA's driver, None where there is no GPU of theirs."""
    place = Path("/proc/driver/nvidia/version")
    if place.is_file():
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", place.read_text(encoding="utf-8", errors="replace"))
        return found[1] if found else "of unknown version"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _memory_left() -> int | None:
    """Bytes: what the system has free, or what the container's limit leaves."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _number_in("/sys/fs/cgroup/memory.max"), _number_in("/sys/fs/cgroup/memory.current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _processor_share() -> float | None:
    """Cores that a container's quota allows, None without one."""
    place = Path("/sys/fs/cgroup/cpu.max")
    words = place.read_text(encoding="utf-8").split() if place.is_file() else []
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _number_in(file: str) -> int | None:
    text = Path(file).read_text(encoding="utf-8").strip() if Path(file).is_file() else ""
    return int(text) if text.isdigit() else None


if __name__ == "__main__":
    sys.exit(main())
