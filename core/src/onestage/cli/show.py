"""`--show`: what is done, in the viewer that the system opens such files with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onestage.errors import MachineError

MOST = 5  # files opened one by one; of more it is their folder


def viewer() -> str:
    """The program that opens a file as a double click would.

    Raises:
        MachineError: there is no display, or no such program.
    """
    if sys.platform in ("darwin", "win32"):
        return "open" if sys.platform == "darwin" else "explorer"
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise MachineError(
            "--show needs a display, and there is none (neither DISPLAY nor WAYLAND_DISPLAY is set)",
            "leave --show away; the pictures are in the run folder",
        )
    program = shutil.which("xdg-open")
    if program is None:
        raise MachineError("--show needs 'xdg-open', which is not installed", "install xdg-utils, or leave --show away")
    return program


def show(paths: Sequence[Path]) -> None:
    """Opens files, or the folder of many, and does not wait for the viewer."""
    for path in paths if len(paths) <= MOST else [Path(os.path.commonpath([path.parent for path in paths]))]:
        subprocess.Popen(
            [viewer(), str(path.resolve())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
