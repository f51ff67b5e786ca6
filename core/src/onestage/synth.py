"""`python -m onestage.synth FOLDER`: writes a generated data set of images or, with --video, of clips."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import tyro

from onestage.errors import MachineError, UsageError, UserError


@dataclass(frozen=True)
class SynthFlags:
    """Writes generated shapes as a data set in COCO format: annotations/instances_{train,val}.json, train/, val/.

    With --video clips of moving shapes in YouTube-VIS format: {train,valid}.json, {train,valid}/JPEGImages/.
    """

    folder: tyro.conf.Positional[Path]
    """Where to."""
    video: bool = False
    """Clips of moving shapes that cross, touch, leave and return."""
    train: int | None = None
    """Images (default 1000) or clips (160) for training."""
    val: int | None = None
    """Images (100) or clips (40) for validation; they have nothing in common with those for training."""
    frames: int = 12
    """Frames of a clip."""
    size: int = 128
    """Height and width, pixels."""
    classes: int = 3
    """Kinds of shapes: ring, star, heart, pair, moon, flower, cross, arrow."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """How many objects, how small, how much they overlap; of images."""
    seed: int = 0
    """The same seed gives the same images."""
    overwrite: bool = False
    """Write into a folder that is not empty."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    flags = tyro.cli(SynthFlags, args=argv, prog="python -m onestage.synth")
    try:
        write(flags)
    except UserError as error:
        print(f"error: {error.what}\n  fix: {error.fix}", file=sys.stderr)
        return error.exit_code
    return 0


def write(flags: SynthFlags) -> None:
    """Writes the data set and says what to do with it."""
    # The imports are here so that --help does not wait for torch.
    from onestage.data.clips import make_clips
    from onestage.data.synth import make_shapes

    usual = (160, 40) if flags.video else (1000, 100)
    train, val = (given if given is not None else n for given, n in zip((flags.train, flags.val), usual, strict=True))
    looks = {"seed": flags.seed, "size": flags.size, "classes": flags.classes}
    if flags.folder.is_file():
        raise UsageError(f"'{flags.folder}' is a file", "name a folder")
    if flags.folder.is_dir() and any(flags.folder.iterdir()) and not flags.overwrite:
        raise UsageError(f"'{flags.folder}' is there and not empty", "name another folder, or add --overwrite")
    try:
        if flags.video:
            make_clips(flags.folder, clips=(train, val), num_frames=flags.frames, **looks)
        else:
            make_shapes(flags.folder, images=(train, val), difficulty=flags.difficulty, **looks)
    except OSError as error:
        raise MachineError(f"'{flags.folder}' cannot be written: {error.strerror}", "name another folder") from None
    print(f"{train} + {val} {'clips' if flags.video else 'images'} in {flags.folder}", file=sys.stderr)
    for package in sorted(entry_points(group="onestage.methods").names)[:1]:
        if not flags.video:  # which method has a video model is not known here
            print(f"next: python -m {package}.train --small --data {flags.folder}", file=sys.stderr)
    if flags.json:
        print(json.dumps({"data": str(flags.folder), "train": train, "val": val}))


if __name__ == "__main__":
    sys.exit(main())
