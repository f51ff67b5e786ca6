"""`python -m meinst.fit_encoding ANNOTATIONS`: fits a mask encoding and says how well it brings masks back (Fig. 5)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meinst.codec import Encoding
    from meinst.fit import Chunk
    from onestage.data.validate import Annotations


@dataclass(frozen=True, kw_only=True)
class FitEncoding(Talk):
    """Fits the components of the mask encoding on the masks of a data set; images are not needed."""

    annotations: Positional[Path | None] = None  # folder of a data set, or its .json or .json.gz (required)
    length: int = 60  # numbers in a code, N, of the file that is written
    lengths: tuple[int, ...] = (20, 40, 60, 80, 100)  # the reconstruction is reported for these too
    evaluate: Path | None = None  # measure the reconstruction on these annotations; default: the same
    output: Path | None = None  # .safetensors, or .npz as the official ones; default: encoding_<length>.safetensors
    overwrite: Switch = False  # replace an existing file
    mask_size: int = 28  # side of the grid that masks are put in
    noisy_logits: bool = True  # as released; without: plain 0 and 1, as the paper prints it
    class_specific: Switch = False  # components for each class
    batch: int = 1024  # masks that one step of the PCA takes
    seed: int = 0  # of the noise
    limit: int | None = None  # use the first N masks only


def run(words: list[str]) -> int:
    """Runs the verb with the words after it; returns the exit code."""
    flags = parse_flags(FitEncoding, words, "python -m meinst.fit_encoding")
    source = _checked(flags)
    # The imports are here because these modules load torch.
    from meinst.config import MEInstConfig
    from meinst.fit import annotation_masks, fit, reconstruct, with_progress

    annotations = _read(source)
    measured = annotations if flags.evaluate is None else _read(flags.evaluate)
    config = replace(
        MEInstConfig(),
        num_classes=len(annotations.categories),
        mask_size=flags.mask_size,
        noisy_logits=flags.noisy_logits,
        class_agnostic=not flags.class_specific,
    )
    lengths = sorted({flags.length, *flags.lengths})

    def masks_of(source: Annotations, what: str) -> Iterator[Chunk]:
        masks = annotation_masks(source, flags.mask_size, flags.limit)
        return with_progress(masks, what, _count(source, flags), disable=flags.quiet)

    encodings = fit(masks_of(annotations, "fit"), lengths, config, batch=flags.batch, seed=flags.seed)
    values = [encodings[length] for length in lengths]
    ious = reconstruct(masks_of(measured, "reconstruct"), values, config)

    encoding = encodings[flags.length]
    rows = [_row(length, encodings[length], iou) for length, iou in zip(lengths, ious, strict=True)]
    error = next(row["error"] for row in rows if row["length"] == flags.length)
    facts = encoding.facts | {"annotations": source.name, "reconstruction_error": error}
    output = _output(flags)
    replace(encoding, facts=facts).write(output)
    if not flags.quiet:
        print("length  variance kept  reconstruction mIoU  error", file=sys.stderr)
        for row in rows:
            kept, iou = 100 * row["variance"], 100 * row["mean_iou"]
            print(f"{row['length']:6d}  {kept:11.2f} %  {iou:17.2f} %  {100 - iou:4.2f} %", file=sys.stderr)
        print(f"{encoding.facts['masks']} masks; wrote {output}", file=sys.stderr)
        print(f"use it with: python -m meinst.train --model.encoding-file {output}", file=sys.stderr)
    if flags.json:
        print(json.dumps({"encoding": str(output), "masks": encoding.facts["masks"], "lengths": rows}))
    return 0


def _checked(flags: FitEncoding) -> Path:
    """The annotations, if every flag can be used."""
    if flags.annotations is None:
        raise UsageError("no annotations given", "python -m meinst.fit_encoding FOLDER, or a COCO .json or .json.gz")
    for length in (flags.length, *flags.lengths):
        if not 1 <= length <= flags.mask_size**2:
            raise UsageError(
                f"a code of length {length} for masks of {flags.mask_size} x {flags.mask_size}",
                f"use a length of 1 to {flags.mask_size**2}",
            )
    if flags.batch < max(flags.length, *flags.lengths):
        raise UsageError(f"--batch is {flags.batch}, below the longest code", "use a larger --batch or shorter codes")
    output = _output(flags)
    if output.exists() and not flags.overwrite:
        raise UsageError(f"'{output}' exists", "add --overwrite, or name another file with --output")
    return flags.annotations


def _output(flags: FitEncoding) -> Path:
    return flags.output or Path(f"encoding_{flags.length}.safetensors")


def _read(path: Path) -> Annotations:
    from onestage.data.coco import locate
    from onestage.data.validate import read_annotations

    return read_annotations(locate(path, "train").json if path.is_dir() else path)


def _count(annotations: Annotations, flags: FitEncoding) -> int:
    total = int((~annotations.crowds).sum())
    return total if flags.limit is None else min(total, flags.limit)


def _row(length: int, encoding: Encoding, iou: float) -> dict[str, Any]:
    kept = float(encoding.ratio.sum(1).mean())
    return {"length": length, "variance": kept, "mean_iou": iou, "error": 1 - iou}


if __name__ == "__main__":
    from meinst.__main__ import run_verb

    run_verb("fit_encoding")
