"""Run folders: `runs/<package>/<verb>/<time>/` with what was asked, where it ran, what it said and how it failed."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from onestage.errors import UsageError, UserError

RUNS = Path("runs")
# What a run may leave behind; --overwrite takes these away and nothing else.
OWN_FILES = ["config.json", "environment.json", "error.json", "log.txt", "results.json", "metrics.json"]
OWN_FILES += ["metrics.csv", "metrics.jsonl", "last.ckpt", "best.safetensors", "predictions.json", "index.html"]
OWN_FILES += ["tracks.jsonl", "tracks.json", "tracked.mp4", "summary.json", "explore.json", "report.json"]
OWN_FILES += ["network.onnx", "network.pt2", "decode.safetensors", "export.json"]
PACKAGES = ("torch", "torchvision", "triton", "numpy", "pycocotools", "pillow", "tyro", "safetensors", "onestage-core")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "ONESTAGE_KERNELS", "ONESTAGE_OFFLINE")

logger = logging.getLogger("onestage")


class Run:
    """An open run folder; leaving it because of an error writes error.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = datetime.now(timezone.utc)

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Writes JSON to `name` in the folder, whole or not at all."""
        path = self.folder / name
        part = path.with_name(f".{name}.part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @property
    def seconds(self) -> float:
        """Wall time since the folder was opened."""
        return (datetime.now(timezone.utc) - self.started).total_seconds()


@contextmanager
def open_run(
    package: str,
    verb: str,
    config: dict[str, Any],
    *,
    output: Path | None = None,
    overwrite: bool = False,
    keep: bool = False,
) -> Iterator[Run]:
    """Opens the folder of a run and writes config.json, environment.json and, while it is open, log.txt.

    Args:
        package: Import name of the paper package.
        verb: Name of the verb.
        config: What config.json holds.
        output: The folder, in place of `runs/<package>/<verb>/<time>`.
        overwrite: Take the files of an earlier run in `output` away.
        keep: Go on in `output`, whatever it holds.

    Raises:
        UsageError: `output` is a file, or a folder that is not empty and neither `overwrite` nor `keep` is set.
    """
    run = Run(_new_folder(package, verb) if output is None else _given_folder(output, overwrite=overwrite, keep=keep))
    (run.folder / "error.json").unlink(missing_ok=True)
    run.write("config.json", config)
    run.write("environment.json", environment(package, verb))
    handler = _LogFile(run.folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.info("run folder: %s", run.folder)
    try:
        yield run
    except SystemExit:  # an interrupted run was saved: nothing failed
        raise
    except BaseException:
        _write_error(run)
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short without a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def environment(package: str, verb: str) -> dict[str, Any]:
    """Where a run takes place: versions, device, commit, command."""
    facts: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"{package}.{verb}", *_arguments(verb)]),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: found for name in (*PACKAGES, f"onestage-{package}") if (found := _version(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
            facts["cuda"] = torch.version.cuda
    return facts


def checkpoint_to_resume(package: str, resume: str, output: Path | None = None) -> Path:
    """The last.ckpt that `--resume` means.

    Args:
        package: Import name of the paper package.
        resume: `auto` for the newest run (or the one in `output`), a run folder, or a checkpoint.
        output: The run folder that was named beside it.

    Raises:
        UsageError: there is none.
    """
    if resume != "auto":
        path = Path(resume)
        path = path / "last.ckpt" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(
                f"checkpoint '{path}' does not exist",
                "give a last.ckpt of a run folder, or --resume auto for the newest",
            )
        return path
    if output is not None:
        found = [output / "last.ckpt"] if (output / "last.ckpt").is_file() else []
    else:
        found = sorted((RUNS / package / "train").glob("*/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        where = output if output is not None else RUNS / package / "train"
        raise UsageError(f"no last.ckpt to resume under '{where}'", "start without --resume, or name the checkpoint")
    return found[-1]


def _new_folder(package: str, verb: str) -> Path:
    stem = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        folder = RUNS / package / verb / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UsageError(f"'{RUNS / package / verb}' has a thousand runs of this second", "name a folder with --output")


def _given_folder(folder: Path, *, overwrite: bool, keep: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output '{folder}' is a file", "name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not keep:
        if not overwrite:
            raise UsageError(
                f"--output '{folder}' is not empty", "add --overwrite to replace the run in it, or name another folder"
            )
        for name in OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_error(run: Run) -> None:
    kind, error, trace = sys.exc_info()
    assert kind is not None
    lines = _trace(kind, error, trace)
    content: dict[str, Any] = {"type": kind.__name__, "what": str(error), "fix": None, "traceback": lines}
    if isinstance(error, UserError):
        content |= {"what": error.what, "fix": error.fix, "exit_code": error.exit_code}
    try:
        run.write("error.json", content)
    except OSError as full:  # a full disk must not hide the error that told of it
        logger.warning("error.json could not be written: %s", full)


def _trace(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> list[str]:
    return "".join(traceback.format_exception(kind, error, trace)).splitlines()


def _arguments(verb: str) -> list[str]:
    words = sys.argv[1:]
    return words[1:] if words[:1] == [verb] else words


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this file lies in, with + if files differ from it; None outside of one."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5
        )
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD", "--", "."], cwd=here, capture_output=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "") if head.returncode == 0 else None
