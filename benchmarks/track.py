"""The video loop: frames per second by stage at 640 x 360, and memory over ten thousand frames.

`python benchmarks/track.py speed` reads a generated video file, finds and follows objects with the paper's video model,
writes run lengths and an annotated video. `python benchmarks/track.py memory` feeds generated clips of 128 px to a
ResNet-18 model and watches the process. Parameters are random in both, made to find as many objects as allowed: neither
time nor memory depends on what was learned, except through the size of the masks, which is recorded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from onestage.data.clips import ClipsDataset
from onestage.data.frames import VideoWriter, open_source
from onestage.engine.predict import Predictor
from onestage.tables.record import write_record
from sipmask.config import PUBLISHED_ASSOCIATION, VIDEO, VIDEO_SMALL, SipMaskConfig
from sipmask.following import TrackFiles, follow
from sipmask.method import METHOD

RESULTS = Path(__file__).parent / "results"
HEIGHT, WIDTH = 360, 640
WARM_UP = 3  # frames
PAGE = 4096  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--frames", type=int, help="default: 40 for speed, 10000 for memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="what the record should say about this run")
    parser.add_argument("--output", default=str(RESULTS), help="'' writes no record")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    if flags.what == "speed":
        config, body = speed(flags.frames or 40, flags.device)
        folder, name = "speed", f"track-{flags.device.partition(':')[0]}"
    else:
        config, body = memory(flags.frames or 10_000, flags.device)
        folder, name = "memory", "track-memory"
    for key, value in body["results"].items():
        print(f"{key}: {value}", file=sys.stderr)
    if flags.output:
        config |= {"threads": flags.threads, "device": flags.device}
        body |= {"note": flags.note} if flags.note else {}
        print(write_record(Path(flags.output) / folder, name, config, body))


def speed(num_frames: int, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Milliseconds of each stage, medians over the frames, and frames per second of all of it."""
    predictor = _predictor(VIDEO, device)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, _Stages(predictor.model, torch.device(device)) as stages:
        clip = _write_clip(Path(scratch) / "clip.mp4", num_frames + WARM_UP)
        files = TrackFiles(Path(scratch), predictor.categories)
        writer = VideoWriter(Path(scratch) / "out.mp4", (HEIGHT, WIDTH), 30)
        found, pixels, totals, cpu = [], [], [], []
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for frame in follow(open_source(str(clip), package="sipmask"), predictor, max_age=100, max_tracks=200):
            row = {"read": frame.seconds["read"], **stages.take()}
            row["resize, decode, masks"] = frame.seconds["detect"] - sum(row[part] for part in stages.parts)
            row["associate"] = frame.seconds["associate"]
            row["run lengths to disk"] = _timed(lambda frame=frame: files.add(frame))
            row["draw"], picture = _timed_value(lambda frame=frame: frame.result.draw(frame.image))
            row["write video"] = _timed(lambda picture=picture: writer.write(picture))
            now, now_cpu = time.perf_counter(), time.process_time()
            if frame.number >= WARM_UP:
                for stage, seconds in row.items():
                    times.setdefault(stage, []).append(seconds)
                totals.append(now - begin)
                cpu.append(now_cpu - begin_cpu)
                found.append(len(frame.result))
                pixels.append(int(frame.result.masks.area().sum()) / (HEIGHT * WIDTH))
            begin, begin_cpu = now, now_cpu
        writer.close()
        files.finish({})
    loop = median(totals)
    analysis = loop - median(times["draw"]) - median(times["write video"])
    results = {
        "milliseconds": {stage: round(1000 * median(values), 2) for stage, values in times.items()},
        "milliseconds_of_cpu_time": round(1000 * median(cpu), 2),
        "frames_per_second": round(1 / loop, 3),
        "frames_per_second_without_pictures": round(1 / analysis, 3),
        "objects_per_frame": sum(found) / len(found),
        "mask_area_in_images": round(sum(pixels) / len(pixels), 3),
    }
    protocol = (
        f"medians over {len(totals)} frames after {WARM_UP}, one at a time; wall time, and CPU time of all threads"
    )
    config = {"model": asdict(predictor.model.config), "frame": [HEIGHT, WIDTH], "frames": num_frames}
    return config, {"protocol": protocol, "paper": {"frames_per_second": 30, "source": "Sec. 4.4"}, "results": results}


def memory(num_frames: int, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Resident memory of the process while it tracks new objects in every frame; the first tenth is warm-up."""
    predictor = _predictor(replace(VIDEO_SMALL, num_classes=3), device)
    length = 20
    clips = ClipsDataset(-(-num_frames // length), num_frames=length)
    images = (clips.frame(index, number) for index in range(len(clips)) for number in range(length))
    every = max(1, num_frames // 100)
    resident: list[float] = []
    tracks = 0
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        files = TrackFiles(Path(scratch), predictor.categories)
        for frame in follow(islice(images, num_frames), predictor, max_age=100, max_tracks=200):
            files.add(frame)
            if (frame.number + 1) % every == 0:
                resident.append(_resident_mib())
        seconds = time.perf_counter() - begin
        before_files = _resident_mib()
        tracks = files.finish({})
        on_disk = sum(path.stat().st_size for path in Path(scratch).iterdir()) / 2**20
    settled = resident[len(resident) // 10 :]
    results = {
        "frames": num_frames,
        "tracks": tracks,
        "mib_after_a_tenth": round(settled[0], 1),
        "mib_at_the_end": round(settled[-1], 1),
        "mib_most_after_a_tenth": round(max(settled), 1),
        "mib_growth_of_writing_by_track": round(_resident_mib() - before_files, 1),
        "mib_on_disk": round(on_disk, 1),
        "frames_per_second": round(num_frames / seconds, 2),
    }
    config = {"model": asdict(predictor.model.config), "frames": num_frames, "max_age": 100, "max_tracks": 200}
    protocol = f"resident memory of the process every {every} frames (Linux); clips follow each other as one video"
    return config, {"protocol": protocol, "results": results, "mib": [round(value, 1) for value in resident]}


def _predictor(config: SipMaskConfig, device: str) -> Predictor:
    """A model with random parameters that finds `max_detections` objects of 6 strides in every frame.

    All look alike to its tracking branch, and what is where something was is taken for something new, so that none is
    dropped and the tracker's memory is always full.
    """
    torch.manual_seed(0)
    rules = replace(config.inference, score_threshold=0.0)
    association = replace(PUBLISHED_ASSOCIATION, iou_weight=-1000.0)
    model: Any = METHOD.build(replace(config, inference=rules, association=association))
    for layer in (model.head.logits, model.head.coefficients):
        nn.init.normal_(layer.weight, std=0.05)
    nn.init.zeros_(model.head.distances.weight)
    nn.init.constant_(model.head.distances.bias, 3.0)
    nn.init.zeros_(model.head.tracking.mix.weight)
    nn.init.zeros_(model.head.tracking.mix.bias)
    categories = [(label + 1, str(label)) for label in range(config.num_classes)]
    return Predictor(model, categories, device=device)


def _write_clip(path: Path, num_frames: int) -> Path:
    clips = ClipsDataset(1, size=WIDTH, num_frames=num_frames)
    writer, top = VideoWriter(path, (HEIGHT, WIDTH), 30), (WIDTH - HEIGHT) // 2
    for number in range(num_frames):
        writer.write(clips.frame(0, number)[:, top : top + HEIGHT])
    writer.close()
    return path


class _Stages:
    """Seconds that the direct parts of a model spend in their forward."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.parts = [name for name, _ in model.named_children()]
        self.seconds = dict.fromkeys(self.parts, 0.0)
        self._model, self._device = model, device
        self._hooks: list[Any] = []
        self._begin = 0.0

    def __enter__(self) -> _Stages:
        for name, part in self._model.named_children():
            self._hooks += [part.register_forward_pre_hook(self._start), part.register_forward_hook(self._stop(name))]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        taken, self.seconds = self.seconds, dict.fromkeys(self.parts, 0.0)
        return taken

    def _start(self, *_: object) -> None:
        self._wait()
        self._begin = time.perf_counter()

    def _stop(self, name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            self._wait()
            self.seconds[name] += time.perf_counter() - self._begin

        return note

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _timed(run: Callable[[], Any]) -> float:
    return _timed_value(run)[0]


def _timed_value(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = run()
    return time.perf_counter() - begin, value


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * PAGE / 2**20


if __name__ == "__main__":
    main()
