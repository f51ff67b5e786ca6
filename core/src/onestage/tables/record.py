"""A run as one JSON file: what ran, on what, and what it found.

Every number that a page or a README shows comes from such a file, written by the program that measured it. Training
and evaluation write them through `reproduce`, benchmarks by themselves.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestage.files import write_atomically

SCHEMA = 1
HERE = Path(__file__).resolve().parent


def write_record(
    folder: Path, name: str, config: Mapping[str, Any], body: Mapping[str, Any], command: str = ""
) -> Path:
    """Writes `folder/<name>-<configuration>-<commit>.json` and returns its path.

    Args:
        folder: Created if it is not there.
        name: What was measured; what a file name cannot hold becomes a dash.
        config: Everything that decides what was measured; its hash is part of the file's name.
        body: Protocol and results; `kind` is "speed" where it does not say.
        command: What the user typed, where it is not this process's command line.
    """
    code = provenance()
    code["command"] = command or code["command"]
    sha256 = digest(config)
    record = {"schema": SCHEMA, "kind": "speed", "name": name, "config": config, "config_sha256": sha256}
    record |= {**body, "code": code, "machine": machine()}
    dirty = "-dirty" if code["dirty"] else ""
    path = folder / f"{file_stem(name)}-{sha256[:12]}-{code['commit'][:7]}{dirty}.json"
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    return path


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, oldest file first, each with its file name as `file`; none where there is no folder."""
    files = sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name))
    return [json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in files]


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_stem(name: str) -> str:
    """`name` with every run of characters that are awkward in file names as one dash."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-")


def provenance() -> dict[str, Any]:
    """Commit of the checkout that this file belongs to, whether files differ from it, and the command.

    The commit is "unknown" outside of a checkout.
    """
    root = _git("rev-parse", "--show-toplevel") if _git("ls-files", "--", __file__) else ""
    program = Path(sys.argv[0]).resolve()
    shown = program.relative_to(root) if root and program.is_relative_to(root) else Path(program.name)
    return {
        "commit": (_git("rev-parse", "HEAD") if root else "") or "unknown",
        "dirty": bool(root and _git("-C", root, "status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", str(shown), *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """The device and the versions that decide a result."""
    import torch  # not above: planning reads records, and the imports take longer than it does
    import torchvision

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
