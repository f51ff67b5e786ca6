"""A benchmark run as one JSON file: what ran, on what, and what it found. See README.md beside this."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision

ROOT = Path(__file__).parents[1]


def write_record(folder: Path, name: str, config: dict[str, Any], body: dict[str, Any]) -> Path:
    """Writes `folder/<name>-<configuration>-<commit>.json` and returns its path.

    Args:
        folder: Created if it is not there.
        name: What was measured.
        config: Everything that decides what was measured; its hash is part of the file's name.
        body: Protocol, results and equality.
    """
    text = json.dumps(config, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    code = _code()
    record = {"schema": 1, "kind": "speed", "name": name, "config": config, "config_sha256": digest}
    record |= body | {"code": code, "machine": _machine()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{digest[:12]}-{code['commit'][:7]}{'-dirty' if code['dirty'] else ''}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _code() -> dict[str, Any]:
    program = Path(sys.argv[0]).resolve()
    program = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", str(program), *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
