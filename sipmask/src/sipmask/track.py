"""`python -m sipmask.track SOURCE`: follows objects through a video, a folder of frames or a camera."""

from __future__ import annotations

import json
import logging
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.config import Precision
from onestage.errors import UsageError, WeightsError

if TYPE_CHECKING:
    from onestage.data.frames import FrameSource
    from onestage.engine.predict import Predictor

logger = logging.getLogger("onestage")


@dataclass(frozen=True, kw_only=True)
class Track(Talk):
    """Follows objects through a video: an annotated video, tracks as JSON, YouTube-VIS results."""

    source: Positional[str | None] = None  # a video file, a folder of frames, or a camera's number (required)
    weights: Path | None = None  # .safetensors or last.ckpt of a video variant (required)
    score_thr: float = 0.3  # leave out detections below this score
    max_dets: int | None = None  # at most so many objects per frame
    max_age: int | None = 100  # forget an object not seen for so many frames; None: never, as in the paper
    max_tracks: int | None = 200  # remember at most so many objects; None: all, as in the paper
    save: tuple[Literal["video", "json", "results"], ...] = ("video", "json", "results")
    rate: float | None = None  # frames per second of the written video; default: the source's
    stride: int = 1  # every n-th frame
    limit: int | None = None  # stop after N frames
    max_pixels: float = 100e6  # refuse larger frames
    output: Path | None = None  # run folder, default runs/sipmask/track/<time>
    overwrite: Switch = False  # write into an --output that is not empty
    device: str = "auto"  # auto, cpu, cuda, cuda:1; auto = a GPU if there is one
    precision: Precision = "fp32"
    dry_run: Switch = False  # check source and weights, and stop


def run(words: list[str]) -> int:
    """Runs the verb with the words after it; returns the exit code."""
    flags = parse_flags(Track, words, "python -m sipmask.track")
    result = track(flags)
    if flags.json:
        print(json.dumps(result))
    return 0


def track(flags: Track) -> dict[str, Any]:
    """Follows objects as the flags say; returns what `--json` prints."""
    _check(flags)
    assert flags.weights is not None
    # The imports are here because these modules load torch.
    from onestage.cli.runs import open_run
    from onestage.data.frames import open_source
    from onestage.engine.predict import Predictor
    from sipmask.method import METHOD

    source = open_source(str(flags.source), package="sipmask", max_pixels=flags.max_pixels)
    predictor = Predictor.from_weights(
        flags.weights,
        method=METHOD,
        device=flags.device,
        precision=flags.precision,
        score_threshold=flags.score_thr,
        max_detections=flags.max_dets,
    )
    if not METHOD.is_video(predictor.model.config):
        raise WeightsError(
            f"weights '{flags.weights}' are of an image model, which cannot follow objects",
            "train a video variant: python -m sipmask.train --variant video_small --data DATA",
        )
    if flags.dry_run:
        return {"dry_run": True, "frames": source.num_frames}
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(flags).items()}
    record = {"package": "sipmask", "verb": "track", "flags": settings, "model": asdict(predictor.model.config)}
    with open_run("sipmask", "track", record, output=flags.output, overwrite=flags.overwrite) as folder:
        result = _track(source, predictor, flags, folder.folder)
        folder.write("summary.json", result)
        if result["interrupted"]:
            raise SystemExit(result["interrupted"])
        return result


def _check(flags: Track) -> None:
    if flags.source is None:
        raise UsageError("no SOURCE", "name a video, a folder of frames, or a camera's number")
    if flags.weights is None:
        raise UsageError(
            "--weights is missing", f"python -m sipmask.track {shlex.quote(flags.source)} --weights best.safetensors"
        )
    for name in ("stride", "limit", "rate"):
        value = getattr(flags, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} is {value}", "give a number above 0")


def _track(source: FrameSource, predictor: Predictor, flags: Track, folder: Path) -> dict[str, Any]:
    """Follows to the end, or until told to stop; what was found until then is complete on disk either way."""
    from onestage.data.frames import DrawnFrames
    from onestage.engine.signals import Signals
    from sipmask.following import TrackFiles, follow

    files = TrackFiles(folder, predictor.categories)
    pictures = None
    if "video" in flags.save:
        pictures = DrawnFrames(folder / "tracked.mp4", source, rate=flags.rate, stride=flags.stride)
    seconds: dict[str, float] = {}
    bar = source.bar("track", stride=flags.stride, limit=flags.limit, quiet=flags.quiet)
    num_tracks, begun = 0, time.perf_counter()
    with bar, Signals() as signals:
        frames = follow(
            source,
            predictor,
            max_age=flags.max_age,
            max_tracks=flags.max_tracks,
            stride=flags.stride,
            limit=flags.limit,
        )
        try:
            for frame in frames:
                files.add(frame)
                if pictures is not None:
                    pictures.add(frame.number, frame.result.draw(frame.image))
                for stage, value in frame.seconds.items():
                    seconds[stage] = seconds.get(stage, 0.0) + value
                bar.update()
                if signals.number is not None:
                    break
        finally:
            if pictures is not None:
                pictures.close()
            pace = files.num_frames / max(time.perf_counter() - begun, 1e-9)
            facts = {"source": source.name, "frames_per_second": source.rate}
            num_tracks = files.finish(facts, by_track="json" in flags.save, results="results" in flags.save)
    logger.info("%d frames, %d tracks, %.2f frames per second: %s", files.num_frames, num_tracks, pace, folder)
    if signals.number is not None:
        logger.info("stopped by signal %d; everything up to that frame is kept", signals.number)
    return {
        "frames": files.num_frames,
        "tracks": num_tracks,
        "frames_per_second": round(pace, 2),
        "milliseconds": {stage: round(1000 * v / max(1, files.num_frames), 2) for stage, v in seconds.items()},
        "interrupted": None if signals.number is None else 128 + signals.number,
        "run": str(folder),
    }


if __name__ == "__main__":
    from sipmask.__main__ import run_verb

    run_verb("track")
