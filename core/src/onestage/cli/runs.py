"""Run folders: `runs/<package>/<verb>/<time>/` with what was asked, where it ran, what it said and how it failed."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from onestage.errors import MachineError, UsageError, UserError
from onestage.files import write_atomically

RUNS = Path("runs")
# What a run leaves behind, as patterns: every run, and those of a verb. --overwrite takes these away and nothing else.
OF_EVERY_RUN = ("config.json", "environment.json", "error.json", "log.txt")
OF_TRAINING = ("metrics.csv", "metrics.jsonl", "results.json", "last.ckpt", "best.safetensors", "crash-*.pt")
OWN_FILES: dict[str, tuple[str, ...]] = {
    "demo": (*OF_TRAINING, "metrics.json", "index.html", "images/*.png"),
    "train": (*OF_TRAINING, "tensorboard/events.out.tfevents.*"),
    "eval": ("results.json", "metrics.json"),
    "predict": ("predictions.json", "predictions-*-of-*.json", "predictions.jsonl", "predicted.mp4")
    + ("images/**/*.jpg", "images/**/", "masks/**/*.png", "masks/**/"),
    "track": ("tracks.jsonl", "tracks.json", "tracked.mp4", "results.json", "summary.json"),
    "export": ("network.onnx", "network.pt2", "decode.safetensors", "export.json", "results.json"),
    "benchmark": ("results.json",),
    "explore": ("index.html", "explore.json"),  # its results.json may be what it is to look at
    "report": ("index.html", "report.json"),
}
PACKAGES = ("torch", "torchvision", "triton", "numpy", "pycocotools", "pillow", "tyro", "safetensors", "onestage-core")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "ONESTAGE_KERNELS", "ONESTAGE_OFFLINE")

logger = logging.getLogger("onestage")


class Run:
    """An open run folder; leaving it because of an error writes error.json.

    Args:
        folder: It exists.
        about: Contents of the JSON files that say what the run is, by name.
    """

    def __init__(self, folder: Path, about: Mapping[str, dict[str, Any]] | None = None):
        self.folder = folder
        self.about = about or {}
        self.started = datetime.now(timezone.utc)

    def describe(self) -> None:
        """Writes the files that say what the run is, over those of an earlier part of it."""
        for name, content in self.about.items():
            self.write(name, content)

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Writes JSON to `name` in the folder, whole or not at all."""
        path = self.folder / name
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
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
        overwrite: Take the files of an earlier run of this verb in `output` away.
        keep: Go on in `output`, whatever it holds. config.json and environment.json are then left to `Run.describe`,
            for when it is certain that this goes on with what is there.

    Raises:
        UsageError: `output` is a file, or a folder that is not empty and neither `overwrite` nor `keep` is set, or
            `overwrite` and it holds a run of another verb.
    """
    if output is None:
        folder = _new_folder(package, verb)
    else:
        folder = _given_folder(output, verb, overwrite=overwrite, keep=keep)
    run = Run(folder, {"config.json": config, "environment.json": environment(package, verb)})
    (run.folder / "error.json").unlink(missing_ok=True)
    if not keep:
        run.describe()
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


def _given_folder(folder: Path, verb: str, *, overwrite: bool, keep: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output '{folder}' is a file", "name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not keep:
        if not overwrite:
            raise UsageError(
                f"--output '{folder}' is not empty", "add --overwrite to replace the run in it, or name another folder"
            )
        _take_away(folder, verb)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _take_away(folder: Path, verb: str) -> None:
    """Removes the files of an earlier run of this verb; pictures that are older than it are somebody else's."""
    earlier = _verb_of(folder)
    if earlier not in (None, verb):
        raise UsageError(
            f"--output '{folder}' holds a run of {earlier}, and --overwrite replaces runs of {verb} only",
            "name another folder, or remove that run",
        )
    began = (folder / "config.json").stat().st_mtime if earlier else math.inf
    for pattern in (*OWN_FILES.get(verb, ()), *OF_EVERY_RUN):
        for path in sorted(folder.glob(pattern), reverse=True):
            if path.is_dir():
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path.parent == folder or path.stat().st_mtime >= began:
                path.unlink()


def _verb_of(folder: Path) -> str | None:
    """Whose run a folder holds; None where it holds none."""
    try:
        verb = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("verb")
    except (OSError, ValueError, AttributeError):
        return None
    return verb if isinstance(verb, str) else None


def _write_error(run: Run) -> None:
    kind, error, trace = sys.exc_info()
    assert kind is not None
    lines = _trace(kind, error, trace)
    content: dict[str, Any] = {"type": kind.__name__, "what": str(error), "fix": None, "traceback": lines}
    if isinstance(error, UserError):
        content |= {"what": error.what, "fix": error.fix, "exit_code": error.exit_code}
    try:
        run.write("error.json", content)
    except MachineError as full:  # a full disk must not hide the error that told of it
        logger.warning("error.json could not be written: %s", full.what)


def _trace(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> list[str]:
    return "".join(traceback.format_exception(kind, error, trace)).splitlines()


def _arguments(verb: str) -> list[str]:
    words = sys.argv[1:]
    if verb == "track" and "--track" in words:  # the words were of `predict`
        verb, words = "predict", [word for word in words if word not in ("--track", "--show")]
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
