"""`python -m onestage.synth FOLDER`: writes a generated data set of images or, with --video, of clips."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from onestage.cli.app import guard
from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.errors import MachineError, UsageError

PROGRAM = "python -m onestage.synth"


@dataclass(frozen=True, kw_only=True)
class SynthFlags(Talk):
    """Writes generated shapes as a data set in COCO format: annotations/instances_{train,val}.json, train/, val/.

    With --video clips of moving shapes in YouTube-VIS format: {train,valid}.json, {train,valid}/JPEGImages/.
    """

    folder: Positional[Path | None] = None  # where to (required)
    video: Switch = False  # clips of moving shapes that cross, touch, leave and return
    train: int | None = None  # images (default 1000) or clips (160) for training
    val: int | None = None  # images (100) or clips (40) for validation; they have nothing in common with the others
    frames: int = 12  # of a clip
    size: int = 128  # height and width, px
    classes: int = 3  # kinds of shapes: ring, star, heart, pair, moon, flower, cross, arrow
    difficulty: Literal["easy", "medium", "hard"] = "easy"  # of images: how many objects, how small, how much overlap
    seed: int = 0  # the same seed gives the same images
    overwrite: Switch = False  # write into a folder that is not empty


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(words, lambda: write(parse_flags(SynthFlags, words, PROGRAM)))


def write(flags: SynthFlags) -> int:
    """Writes the data set, says what to do with it, and returns 0."""
    if flags.folder is None:
        raise UsageError("no FOLDER", f"{PROGRAM} shapes")
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
    if not flags.quiet:
        print(f"{train} + {val} {'clips' if flags.video else 'images'} in {flags.folder}", file=sys.stderr)
    for package in sorted(entry_points(group="onestage.methods").names)[:1]:
        if not flags.video and not flags.quiet:  # which method has a video model is not known here
            print(f"next: python -m {package}.train --small --data {shlex.quote(str(flags.folder))}", file=sys.stderr)
    if flags.json:
        print(json.dumps({"data": str(flags.folder), "train": train, "val": val}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
