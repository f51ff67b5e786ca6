"""How long `python -m onestage.lint` takes on annotations of COCO's size, and how much memory.

Writes a generated file with as many images and annotations as COCO's train2017, and about its bytes; a known number of
annotations is broken in each of several ways. Lint runs in a process of its own, reads no images (there are none) and
must find exactly those. Writes one record to results/lint/ and leaves with 1 above the goal of two minutes of
processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onestage.tables.record import write_record

IMAGES, ANNOTATIONS, CATEGORIES = 118_287, 860_001, 80  # COCO train2017
HEIGHT, WIDTH = 480, 640
CORNERS = 26  # of a polygon
SHAPES = 2003  # different annotations; more than an image has, so that none is there twice
EVERY = 10_000  # annotations hold one of each of these
PLANTED = ("short polygon", "unknown category", "bad RLE", "bad box", "box off its mask", "duplicate annotation")
GOAL = 120.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--annotations", type=int, default=ANNOTATIONS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "lint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "instances.json"
        planted = write_annotations(file, options.images, options.annotations)
        result = measured(file, planted) | {"megabytes": round(file.stat().st_size / 1e6, 1)}
    config = {
        "images": options.images,
        "annotations": options.annotations,
        "corners": CORNERS,
        "planted": dict(planted),
    }
    protocol = {
        "data": "generated annotations, no images",
        "command": "python -m onestage.lint FILE --json, one process",
        "goal_cpu_seconds": GOAL,
        "load_average_before": [round(value, 1) for value in os.getloadavg()],
        "cores": os.cpu_count(),
    }
    path = write_record(options.results, "lint", config, {"kind": "lint", "protocol": protocol, "results": [result]})
    print(
        f"{options.annotations} annotations of {options.images} images, {result['megabytes']} MB: "
        f"{result['cpu_seconds']} s of processor time, {result['wall_seconds']} s in all, "
        f"{result['peak_mebibytes']} MiB at the peak; found {result['found']}"
    )
    print(f"record: {path}")
    sys.exit(result["cpu_seconds"] > GOAL)


def measured(file: Path, planted: Counter[str]) -> dict[str, Any]:
    """Runs lint on the file; its problems must be those that were planted."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "onestage.lint", str(file), "--json"], capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = json.loads(done.stdout)
    problems = answer["splits"]["file"]["problems"]
    found = {kind: problem["count"] for kind, problem in problems.items()}
    assert found == dict(planted), f"planted {dict(planted)}, found {found}"
    assert done.returncode == 3, done.stderr
    return {
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(wall, 1),
        "peak_mebibytes": round(after.ru_maxrss / 1024),
        "found": found,
    }


def write_annotations(file: Path, images: int, annotations: int) -> Counter[str]:
    """Writes the file and returns what was planted in it."""
    planted: Counter[str] = Counter()
    size = {"height": HEIGHT, "width": WIDTH, "license": 1}
    with open(file, "w", encoding="utf-8") as out:
        categories = [{"id": key, "name": f"kind {key}"} for key in range(1, CATEGORIES + 1)]
        out.write(f'{{"categories": {json.dumps(categories)}, "images": [')
        for key in range(images):
            out.write(("," if key else "") + json.dumps({"id": key, "file_name": f"{key:012}.jpg", **size}))
        out.write('], "annotations": [')
        for number, text in enumerate(entries(images, annotations, planted)):
            out.write(("," if number else "") + text)
        out.write("]}")
    return planted


def entries(images: int, annotations: int, planted: Counter[str]) -> Iterator[str]:
    """The annotations as JSON, those of an image one after the other."""
    draw = random.Random(0)
    shapes = [shape(draw) for _ in range(SHAPES)]
    texts = [json.dumps(entry)[1:] for entry in shapes]
    for number in range(annotations):
        image = number * images // annotations
        text = texts[number % SHAPES]
        kind = PLANTED[number % EVERY] if number % EVERY < len(PLANTED) else None
        if kind is not None:
            text = json.dumps(spoilt(shapes[number % SHAPES], kind))[1:]
            planted[kind] += 1
        yield f'{{"id": {number + 1}, "image_id": {image}, {text}'
        if kind == "duplicate annotation":
            yield f'{{"id": {annotations + number + 1}, "image_id": {image}, {text}'


def shape(draw: random.Random) -> dict[str, Any]:
    """One polygon around a centre, of about COCO's number of corners, with its box and area."""
    radius = math.exp(draw.uniform(math.log(8), math.log(150)))
    x, y = draw.uniform(radius, WIDTH - radius), draw.uniform(radius, HEIGHT - radius)
    turns = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    points = [(x + r * math.cos(a), y + r * math.sin(a)) for a in turns for r in [radius * draw.uniform(0.6, 1)]]
    polygon = [round(value, 2) for point in points for value in point]
    left, top, right, bottom = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
    return {
        "category_id": draw.randint(1, CATEGORIES),
        "iscrowd": 0,
        "area": round(2 * radius * radius, 2),
        "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
        "segmentation": [polygon],
    }


def spoilt(entry: dict[str, Any], kind: str) -> dict[str, Any]:
    """The annotation with one mistake; `duplicate annotation` leaves it, to be written twice."""
    x, y, width, height = entry["bbox"]
    changes: dict[str, dict[str, Any]] = {
        "short polygon": {"segmentation": [entry["segmentation"][0][:4]]},
        "unknown category": {"category_id": CATEGORIES + 1},
        "bad RLE": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [7, 5]}},
        "bad box": {"bbox": [x, y, -width, height]},
        "box off its mask": {"bbox": [x, y, 0.25 * width, 0.25 * height]},
        "duplicate annotation": {},
    }
    return entry | changes[kind]


if __name__ == "__main__":
    main()
