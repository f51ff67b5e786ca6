"""`python -m onestage.lint DATA`: what is wrong with a data set; with --fix OUT, a clean copy of its annotations."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from onestage.cli.app import guard
from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.errors import CheckFailed, DatasetError, UsageError
from onestage.files import replacing

if TYPE_CHECKING:
    from onestage.data.coco import Split
    from onestage.data.lint import Checked, Report

PROGRAM = "python -m onestage.lint"


@dataclass(frozen=True, kw_only=True)
class Lint(Talk):
    """Finds everything that is wrong with a data set in COCO or YouTube-VIS format, with counts and examples.

    Says of each kind of problem what the loader does about it. The data set itself is never changed. Exit code 0: it
    loads as it is; 3: it does not.
    """

    data: Positional[Path | None] = None  # folder in one of the layouts, or an annotation file; default: COCO_ROOT
    images: Path | None = None  # with an annotation file: the folder of its images; default: look at none
    train_json: Path | None = None  # with --train-images, in place of DATA
    train_images: Path | None = None
    val_json: Path | None = None  # with --val-images, in place of DATA
    val_images: Path | None = None
    look: Literal["none", "header", "decode"] = "header"  # at image files: not at all, their headers, all pixels
    max_pixels: float = 100e6  # largest image, height * width
    fix: Path | None = None  # write a clean copy of the annotations into this folder, with links to the images
    overwrite: Switch = False  # write into a --fix folder that is not empty


@dataclass
class _Run:
    """One split and what became of it."""

    name: str
    split: Split
    checked: Checked
    written: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 the data set loads as it is (or the clean copy does), 2 usage, 3 it does not, 5 the copy cannot be written.

    Args:
        argv: The command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guard(words, lambda: _lint(parse_flags(Lint, words, PROGRAM)))


def _lint(flags: Lint) -> int:
    # The imports are here so that --help does not wait for torch.
    from onestage.data.lint import EFFECTS, Report, compare_splits, lint_split

    splits = _splits(flags)
    if flags.fix is not None:
        _check_output(flags.fix, [split for _, split in splits], overwrite=flags.overwrite)
    runs, both = [], Report()
    for name, split in splits:
        folder = None if split.images == Path() else split.images
        runs.append(_Run(name, split, lint_split(split.json, folder, depth=flags.look, max_pixels=flags.max_pixels)))
        _say(flags, _headline(runs[-1]))
        _say(flags, *_lines(runs[-1].checked.report))
    if len(runs) == 2:
        both = compare_splits(runs[0].checked, runs[1].checked)
        _say(flags, *(["train and val", *_lines(both)] if both.counts else []))
    reports = [*(run.checked.report for run in runs), both]
    if any(report.counts for report in reports):
        _say(flags, "", *(f"{effect}: {meaning}" for effect, meaning in EFFECTS.items()))
    bad = sum(report.with_effect("stops", "skips") for report in reports)
    if flags.fix is not None:
        _write_copy(flags, runs)
    error = _verdict(flags, runs, bad)
    if flags.json:
        result = {
            "data": None if flags.data is None else str(flags.data),
            "splits": {run.name: _record(run) for run in runs},
            "both": both.to_json()["problems"],
            "exit_code": 0 if error is None else error.exit_code,
        }
        print(json.dumps(result | ({} if error is None else {"error": error.what, "fix": error.fix})))
    if error is None:
        _say(flags, "" if flags.quiet else _good_news(flags, bad))
        return 0
    print(f"error: {error.what}\n  fix: {error.fix}", file=sys.stderr)
    return error.exit_code


def _splits(flags: Lint) -> list[tuple[str, Split]]:
    """The annotation files to look at; an image folder of Path() is none."""
    from onestage.data.coco import Split, locate

    if flags.data is not None and flags.data.is_file():
        return [("file", Split(flags.data, flags.images or Path(), "annotation file"))]
    if flags.images is not None:
        raise UsageError("--images goes with an annotation file, not with a folder", f"{PROGRAM} FILE --images FOLDER")
    explicit = {"train": (flags.train_json, flags.train_images), "val": (flags.val_json, flags.val_images)}
    named = any(path is not None for pair in explicit.values() for path in pair)
    found: list[tuple[str, Split]] = []
    failed: DatasetError | None = None
    for name in ("train", "val"):
        files, images = explicit[name]
        if named and files is None and images is None:
            continue
        try:
            found.append((name, locate(flags.data, name, json=files, images=images)))
        except DatasetError as error:
            if named:
                raise
            failed = failed or error
    if not found:
        assert failed is not None
        raise failed
    if len(found) == 2 and found[0][1].json == found[1][1].json:
        return [("train and val", found[0][1])]  # one file serves both
    return found


def _say(flags: Lint, *lines: str) -> None:
    """For people: on stdout, which --json keeps for programs."""
    if not flags.quiet:
        print(*lines, sep="\n", file=sys.stderr if flags.json else sys.stdout)


def _headline(run: _Run) -> str:
    numbers = ", ".join(f"{count} {name}" for name, count in run.checked.report.numbers.items())
    return f"{run.name}: {run.split.json} ({run.split.layout}): {numbers or 'cannot be read'}"


def _lines(report: Report) -> list[str]:
    """Kinds of problems, the worst first, with examples."""
    from onestage.data.lint import KINDS

    lines = []
    for kind, (effect, copy) in KINDS.items():
        if kind in report.counts:
            count, examples = report.counts[kind], report.examples[kind]
            lines.append(f"  {effect} {count:>8}  {kind} (in a clean copy: {copy})")
            lines += [f"{'':18}{example}" for example in examples]
            lines += [f"{'':18}and {count - len(examples)} more"] if count > len(examples) else []
    return lines or ["  nothing to complain of"]


def _record(run: _Run) -> dict[str, Any]:
    where = {"json": str(run.split.json), "images": str(run.split.images), "layout": run.split.layout}
    written = {} if run.written is None else {"written": str(run.written)}
    return where | run.checked.report.to_json() | written


def _verdict(flags: Lint, runs: Sequence[_Run], bad: int) -> DatasetError | None:
    """What keeps the data set, or its clean copy, from being loaded."""
    unusable = [run for run in runs if run.checked.content is None]
    name = str(flags.data if flags.data is not None else runs[0].split.json)
    if unusable:
        return DatasetError(unusable[0].checked.report.examples["unusable file"][0], "correct this file first")
    if bad == 0 or flags.fix is not None:
        return None
    outcomes = [(kind, outcome) for run in runs for kind, outcome in run.checked.report.outcomes.items()]
    repaired, dropped = (sum(outcome[which] for _, outcome in outcomes) for which in ("repaired", "dropped"))
    return DatasetError(
        f"dataset '{name}' has {bad} problems at which the loader stops",
        f"{_command(flags)} --fix cleaned        ({repaired} entries can be repaired, {dropped} dropped)",
    )


def _good_news(flags: Lint, bad: int) -> str:
    if flags.fix is None:
        return "the loader takes this data set as it is"
    lines = [f"clean copy in {flags.fix}; the loader takes it as it is"]
    if flags.data is not None and flags.data.is_dir():
        for package in sorted(entry_points(group="onestage.methods").names)[:1]:
            lines.append(f"next: python -m {package}.train --small --data {shlex.quote(str(flags.fix))}")
    return "\n".join(lines)


def _command(flags: Lint) -> str:
    """This call, to be typed again."""
    words = [] if flags.data is None else [str(flags.data)]
    for name in ("images", "train_json", "train_images", "val_json", "val_images"):
        value = getattr(flags, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(["python", "-m", "onestage.lint", *words])


def _check_output(folder: Path, splits: Sequence[Split], *, overwrite: bool) -> None:
    """Nothing that belongs to the data set may be written to."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--fix '{folder}' is a file", "name a new folder")
    here = folder.resolve()
    for split in splits:
        places = [split.json.resolve().parent, *([] if split.images == Path() else [split.images.resolve()])]
        if any(place.is_relative_to(here) for place in places):
            raise UsageError(f"--fix '{folder}' holds the data set itself, which is never changed", "name a new folder")
        if split.images != Path() and here.is_relative_to(split.images.resolve()):
            raise UsageError(f"--fix '{folder}' lies among the images", "name a folder elsewhere")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"--fix '{folder}' is not empty", "name a new folder, or add --overwrite")


def _write_copy(flags: Lint, runs: Sequence[_Run]) -> None:
    """Writes the clean annotations in a layout that --data knows, with links to the image folders."""
    from onestage.data.validate import read_annotations

    assert flags.fix is not None
    for run in runs:
        if run.checked.content is None:
            continue
        target, images = _places(flags.fix, run)
        for place in (target, images):
            if place is not None and not place.parent.resolve().is_relative_to(flags.fix.resolve()):
                raise UsageError(f"'{place.parent}' is a link out of --fix '{flags.fix}'", "name a new folder")
        _write_json(target, run.checked.content)
        run.checked.content.clear()  # there is no memory for what the reader makes of it too
        try:
            read_annotations(target, max_pixels=flags.max_pixels)
        except DatasetError as error:
            raise CheckFailed(f"the clean copy is not clean: {error.what}", "report this, with the file") from error
        run.written = target
        linked = images is not None and _link(images, run.split.images)
        counts: dict[str, int] = {"repaired": 0, "dropped": 0}
        for outcome in run.checked.report.outcomes.values():
            counts = {name: counts[name] + outcome[name] for name in counts}
        where = "" if images is None else f"; images: {images if linked else run.split.images}"
        _say(flags, f"written: {target} ({counts['repaired']} repaired, {counts['dropped']} dropped{where})")


def _places(folder: Path, run: _Run) -> tuple[Path, Path | None]:
    """Where a clean annotation file goes, and where its images are linked to."""
    from onestage.data.validate import is_of_videos

    if run.name == "file":
        return folder / f"{run.split.json.name.removesuffix('.gz')}", None
    if run.name == "train and val":
        return folder / "annotations" / "instances_all.json", folder / "JPEGImages"
    assert run.checked.content is not None
    if is_of_videos(run.checked.content):
        part = "train" if run.name == "train" else "valid"
        return folder / f"{part}.json", folder / part / "JPEGImages"
    return folder / "annotations" / f"instances_{run.name}.json", folder / run.name


def _link(link: Path, images: Path) -> bool:
    """Links to the images, where the system allows it."""
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        os.symlink(images.resolve(), link, target_is_directory=True)
    except OSError:
        return False
    return True


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Entry by entry: as one text the file would not fit into memory twice."""
    from onestage.data.lint import as_json

    with replacing(path, text=True) as file:
        for number, (key, value) in enumerate(content.items()):
            file.write(f"{',' if number else '{'}\n{json.dumps(key)}: ")
            if not isinstance(value, list):
                file.write(json.dumps(value, default=as_json))
                continue
            for position, entry in enumerate(value):
                file.write(("," if position else "[") + "\n" + json.dumps(entry, default=as_json))
            file.write("\n]" if value else "[]")
        file.write("\n}\n" if content else "{}\n")


if __name__ == "__main__":
    sys.exit(main())
