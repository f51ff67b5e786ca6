"""Objects followed through a video: `follow` yields frame by frame, `TrackFiles` keeps what was found on disk.

Memory does not grow with the length of the video: one frame, and the tracker's memory, which `max_age` and `max_tracks`
bound. Masks go to disk as run lengths as they are found; what is sorted by track is made from that file at the end.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from onestage.data.frames import FrameSource, open_source
from onestage.engine.predict import Predictor, Result
from onestage.files import replacing

MAX_AGE = 100  # frames
MAX_TRACKS = 200


@dataclass(frozen=True)
class TrackedFrame:
    """One frame and the objects in it.

    Args:
        number: From 0, of the frames looked at.
        image: [3, H, W] uint8 RGB.
        result: The objects; `result.track_ids` says who they are.
        seconds: What `read`, `detect` and `associate` took.
    """

    number: int
    image: Tensor
    result: Result
    seconds: dict[str, float] = field(default_factory=dict)


def follow(
    source: str | Path | FrameSource | Iterable[Tensor],
    predictor: Predictor | str | Path,
    *,
    max_age: int | None = MAX_AGE,
    max_tracks: int | None = MAX_TRACKS,
    stride: int = 1,
    limit: int | None = None,
) -> Iterator[TrackedFrame]:
    """Follows objects through one video.

    Args:
        source: A video file, a folder of frames, a camera's number, or frames themselves ([3, H, W] RGB).
        predictor: A predictor with a video model, or its weights file.
        max_age: Frames after which an object that has not been seen again is forgotten; None: never.
        max_tracks: Objects remembered at most, those seen last; None: all.
        stride: Every n-th frame.
        limit: At most so many frames.

    Yields:
        One `TrackedFrame` for each frame, as soon as it is done.
    """
    if not isinstance(predictor, Predictor):
        predictor = Predictor.from_weights(predictor)
    frames = open_source(str(source), package="sipmask") if isinstance(source, (str, Path)) else source
    tracker = predictor.model.tracker(max_age=max_age, max_tracks=max_tracks)
    moments = [time.perf_counter()]
    for number, image in enumerate(islice(frames, 0, None if limit is None else limit * stride, stride)):
        moments.append(time.perf_counter())
        found = predictor(image)
        moments.append(time.perf_counter())
        result = Result(tracker.update(found.detections), found.categories)
        moments.append(time.perf_counter())
        seconds = [after - before for before, after in pairwise(moments)]
        yield TrackedFrame(number, image, result, dict(zip(("read", "detect", "associate"), seconds, strict=True)))
        moments = [time.perf_counter()]


class TrackFiles:
    """What tracking leaves in a folder.

    `tracks.jsonl` has a line for every object in every frame and is complete up to the last frame at any time.
    `finish` makes `tracks.json`, the same by track, and `results.json`, a YouTube-VIS submission with one video.

    Args:
        folder: It exists.
        categories: (id, name) of each label.
    """

    def __init__(self, folder: Path, categories: tuple[tuple[int, str], ...]):
        self.folder = folder
        self.categories = categories
        self.num_frames = 0
        self.size: tuple[int, int] | None = None
        self._lines = (folder / "tracks.jsonl").open("w", encoding="utf-8")

    def add(self, frame: TrackedFrame) -> None:
        """Writes the objects of a frame."""
        result = frame.result
        self.size, self.num_frames = result.image_size, frame.number + 1
        assert result.track_ids is not None
        for track_id, entry in zip(result.track_ids.tolist(), result.to_coco(frame.number), strict=True):
            line = {"track_id": track_id, "frame": entry.pop("image_id")} | entry
            self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def finish(self, facts: dict[str, Any], *, by_track: bool = True, results: bool = True) -> int:
        """Closes the lines and writes the files by track; their number is returned.

        Args:
            facts: What `tracks.json` says about the video besides its tracks.
            by_track: Write tracks.json.
            results: Write results.json.
        """
        self._lines.close()
        names = dict(self.categories)
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as scratch,
            closing(sqlite3.connect(Path(scratch) / "index.db")) as index,
            (self.folder / "tracks.jsonl").open("rb") as lines,
        ):
            _fill(index, lines)
            size = list(self.size or (0, 0))
            head = {"num_frames": self.num_frames, "size": size} | facts
            head["categories"] = [{"id": key, "name": name} for key, name in self.categories]
            if by_track:
                entries = (_track_entry(index, lines, track, names) for track in _tracks(index))
                _write_list(self.folder / "tracks.json", entries, json.dumps(head)[:-1] + ', "tracks": ', "}")
            if results:
                entries_ = (_submission_entry(index, lines, track, self.num_frames) for track in _tracks(index))
                _write_list(self.folder / "results.json", entries_)
            (count,) = index.execute("select count(distinct track) from seen").fetchone()
        return int(count)


def _fill(index: sqlite3.Connection, lines: Any) -> None:
    """An index of the lines on disk, so that they can be read by track whatever their number."""
    index.execute("pragma journal_mode = off")
    index.execute("create table seen (track integer, frame integer, place integer, category integer, score real)")

    def rows() -> Iterator[tuple[int, int, int, int, float]]:
        place = 0
        for line in lines:
            one = json.loads(line)
            yield one["track_id"], one["frame"], place, one["category_id"], one["score"]
            place += len(line)

    index.executemany("insert into seen values (?, ?, ?, ?, ?)", rows())
    index.execute("create index by_track on seen (track, frame)")


def _tracks(index: sqlite3.Connection) -> Iterator[tuple[int, int, float]]:
    """(id, category, score) of each track: the most frequent category, the mean score."""
    for track, score in index.execute("select track, avg(score) from seen group by track order by track"):
        (category,) = index.execute(
            "select category from seen where track = ? group by category order by count(*) desc, category limit 1",
            (track,),
        ).fetchone()
        yield track, category, score


def _lines_of(index: sqlite3.Connection, lines: Any, track: int) -> Iterator[dict[str, Any]]:
    for (place,) in index.execute("select place from seen where track = ? order by frame", (track,)):
        lines.seek(place)
        yield json.loads(lines.readline())


def _track_entry(
    index: sqlite3.Connection, lines: Any, track: tuple[int, int, float], names: dict[int, str]
) -> Iterator[str]:
    key, category, score = track
    first, last = index.execute("select min(frame), max(frame) from seen where track = ?", (key,)).fetchone()
    head = {"id": key, "category_id": category, "category": names[category], "score": score}
    yield json.dumps(head | {"first_frame": first, "last_frame": last})[:-1] + ', "frames": ['
    for number, line in enumerate(_lines_of(index, lines, key)):
        entry = {name: line[name] for name in ("frame", "category_id", "score", "bbox", "segmentation")}
        yield (", " if number else "") + json.dumps(entry)
    yield "]}"


def _submission_entry(
    index: sqlite3.Connection, lines: Any, track: tuple[int, int, float], num_frames: int
) -> Iterator[str]:
    key, category, score = track
    yield json.dumps({"video_id": 1, "category_id": category, "score": score})[:-1] + ', "segmentations": ['
    done = 0
    for line in _lines_of(index, lines, key):
        yield (", " if done else "") + "null, " * (line["frame"] - done) + json.dumps(line["segmentation"])
        done = line["frame"] + 1
    yield ", null" * (num_frames - done) + "]}"


def _write_list(path: Path, entries: Iterable[Iterator[str]], before: str = "", after: str = "") -> None:
    """A JSON list written piece by piece."""
    with replacing(path, text=True) as file:
        file.write(before + "[")
        for number, entry in enumerate(entries):
            file.write(",\n" if number else "\n")
            file.writelines(entry)
        file.write("]" + after + "\n")
