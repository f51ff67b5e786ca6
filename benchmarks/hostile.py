"""Hostile files: thousands of malformed annotation files, images, run lengths, checkpoints and results, one by one.

Each is a sound file that was bent: bytes flipped, cut, repeated, values replaced by what programs choke on, documents
that hypothesis makes up, and a corpus of known attacks (decompression bombs, pickled code, paths out of the folder,
polygons of any size, run lengths that lie). It is read by what a user would read it with, in a process that watches
itself. A case survives if it is read or refused with one of our two-line errors. It is lost with a traceback, a process
that dies, more than ten seconds of processor time (or a hundred by the clock), or a file opened for writing, a command
started or a connection made outside of the output folder. No process gets more than `MEMORY` (2 GiB) above what its
imports need.

    python benchmarks/hostile.py --cases 2400

writes one record to results/hostile/ and leaves with 1 if a case is lost. The same seed makes the same cases.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import math
import os
import pickle  # noqa: TID251  (written here, never read)
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PATIENCE = 10  # seconds of processor time for one file: other programs must not make a hang of it
LONGEST = 10 * PATIENCE  # seconds by the clock
MEMORY = 2 << 30  # bytes of address space above what the process has after its imports
BATCH = 100  # cases of a process
SIZE = 24  # of sound images, pixels
SQUARE = [4.0, 4.0, 20.0, 4.0, 20.0, 16.0, 4.0, 16.0]
MARK = "case: "  # of the lines that a process writes about its cases
LOST = ("traceback", "crash", "hang", "outside")

Bytes = Callable[[random.Random, Path], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2400, help="over all kinds of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "hostile")
    parser.add_argument("--attempt", type=Path, help=argparse.SUPPRESS)  # a batch, in a process of its own
    options = parser.parse_args()
    if options.attempt is not None:
        attempt_batch(options.attempt)
        return
    outcomes, peak = run(options.kinds, options.cases, options.seed)
    counts = {kind: dict(Counter(end for name, end, _ in outcomes if name == kind)) for kind in options.kinds}
    lost = [f"{kind}: {end}: {why}" for kind, end, why in outcomes if end in LOST]
    for kind, count in counts.items():
        print(f"{kind:12} {sum(count.values()):5} tried: {count}")
    print("\n".join(lost[:20]))
    from onestage.tables.record import write_record

    result = {"tried": len(outcomes), "survived": len(outcomes) - len(lost), "lost": len(lost), "counts": counts}
    protocol = {
        "processor_seconds_per_case": PATIENCE,
        "seconds_per_case": LONGEST,
        "memory_mebibytes": MEMORY >> 20,
        "peak_growth_mebibytes": peak,
    }
    config = {"cases": options.cases, "seed": options.seed, "kinds": options.kinds}
    body = {"kind": "hostile", "protocol": protocol, "results": [result | {"examples_of_lost": lost[:20]}]}
    print(f"record: {write_record(options.results, 'hostile', config, body)}")
    sys.exit(bool(lost))


def run(kinds: list[str], cases: int, seed: int) -> tuple[list[tuple[str, str, str]], int]:
    """Makes and tries the cases.

    Returns:
        (kind, how it ended, why) of each, and the most memory a process gained, MiB.
    """
    outcomes: list[tuple[str, str, str]] = []
    peak = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_surroundings(folder)
        waiting = [write_case(folder, kinds[n % len(kinds)], n // len(kinds), seed) for n in range(cases)]
        while waiting:
            batch = folder / "batch.json"
            batch.write_text(json.dumps(waiting[:BATCH]), encoding="utf-8")
            ended, growth = try_batch(batch)
            peak = max(peak, growth)
            outcomes += ended
            assert ended, "a process tried nothing"
            waiting = waiting[len(ended) :]
    return outcomes, peak


def try_batch(batch: Path) -> tuple[list[tuple[str, str, str]], int]:
    """Tries cases in another process, until it is done or dies; the case it dies of is the last one returned."""
    command = [sys.executable, __file__, "--attempt", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=batch.parent)
    ended, begun, growth = [], None, 0
    for line in done.stdout.splitlines():
        if not line.startswith(MARK):
            continue
        word = json.loads(line.removeprefix(MARK))
        growth = max(growth, word.get("growth", 0))
        if word["end"] == "begun":
            begun = word
        else:
            ended.append((word["kind"], word["end"], word["why"]))
            begun = None
    if begun is not None:
        lines = done.stderr.strip().splitlines()
        end = "hang" if "Timeout (" in done.stderr or done.returncode == -signal.SIGXCPU else "crash"
        ended.append((begun["kind"], end, f"{begun['why']}: exit {done.returncode}: {' | '.join(lines[-3:])}"))
    elif done.returncode != 0 and not ended:
        raise RuntimeError(done.stderr)
    return ended, growth


def attempt_batch(batch: Path) -> None:
    """What `try_batch` runs."""
    import contextlib
    import faulthandler

    from onestage.cli.app import guard

    readers = {kind: reader() for kind, (_, reader) in KINDS.items()}
    out = batch.parent / "out"
    violations: list[str] = []
    watching = [False]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching[0]:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            violations.append(f"{event} {arguments[0]!r}")
        writes = event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and not Path(arguments[0]).resolve().is_relative_to(out):
            violations.append(f"write to {arguments[0]!r}")
        if event in ("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.truncate"):
            target = Path(os.fsdecode(arguments[1 if event in ("os.rename", "os.symlink") else 0]))
            if not target.parent.resolve().joinpath(target.name).is_relative_to(out.parent / "out"):
                violations.append(f"{event} {target}")

    sys.addaudithook(watch)
    out.mkdir(exist_ok=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def say(case: list[str], end: str, why: str) -> None:
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        word = {"kind": case[0], "end": end, "why": f"{case[2]}: {why}"[:500], "growth": growth}
        print(MARK + json.dumps(word), flush=True)

    for case in json.loads(batch.read_text(encoding="utf-8")):
        say(case, "begun", "")
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        enough = math.ceil(time.process_time()) + PATIENCE
        resource.setrlimit(resource.RLIMIT_CPU, (enough, resource.RLIM_INFINITY))
        violations.clear()
        said = io.StringIO()
        try:
            watching[0] = True
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                codes = readers[case[0]](Path(case[1]), out, guard)
            end, why = ("read" if 0 in codes else "refused"), ""
            if not set(codes) <= {0, 2, 3, 4, 5} or "Traceback" in said.getvalue():
                end, why = "traceback", f"exit codes {codes}: {said.getvalue()[-200:]}"
        except BaseException as error:  # noqa: BLE001  (whatever it is, it is what is looked for here)
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = "" if where is None else f" in {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
            end, why = "traceback", f"{type(error).__name__}: {error}{place}"
        finally:
            watching[0] = False
            faulthandler.cancel_dump_traceback_later()
        if violations:
            end, why = "outside", "; ".join(violations)
        say(case, end, why)


def write_surroundings(folder: Path) -> None:
    """The images that annotations speak of."""
    images = folder / "in" / "sound"
    images.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (images / name).write_bytes(sound_image("PNG"))


def write_case(folder: Path, kind: str, number: int, seed: int) -> list[str]:
    """Writes one file and returns [kind, path, how it was made]."""
    draw = random.Random(f"{seed}-{kind}-{number}")
    place = folder / "in" / kind
    place.mkdir(parents=True, exist_ok=True)
    makers = KINDS[kind][0]
    name = list(makers)[number % len(makers)]
    suffix = name.rpartition(".")[2] if "." in name else SUFFIX[kind]
    path = place / f"{number}.{suffix}"
    path.write_bytes(makers[name](draw, folder))
    return [kind, str(path), f"{name} {number}"]


def bent(data: bytes, draw: random.Random) -> bytes:
    """Bytes with one to four accidents."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(out) + 1), draw.choice([1, 2, 4, 8, 64, 1000])
        what = draw.choice(["flip", "cut", "drop", "repeat", "zero", "noise", "ones"])
        if what == "flip" and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif what == "cut":
            del out[at:]
        elif what == "drop":
            del out[at : at + length]
        elif what == "repeat":
            out[at:at] = out[at : at + length] * draw.randint(1, 50)
        elif what == "noise":
            out[at : at + length] = draw.randbytes(length)
        else:
            out[at : at + length] = bytes([0 if what == "zero" else 255]) * length
    return bytes(out)


def bent_value(value: Any, draw: random.Random) -> Any:
    """A JSON document with one to three of its values replaced, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = [(parent, key) for parent, key in _places(value) if parent is not None]
        if not places:
            return draw.choice(NASTY)
        parent, key = draw.choice(places)
        what = draw.random()
        if what < 0.75:
            parent[key] = copy.deepcopy(draw.choice(NASTY))
        elif what < 0.85:
            del parent[key]
        elif isinstance(parent, list):
            parent += [copy.deepcopy(parent[key])] * draw.choice([1, 5, 200])
        else:
            parent[f"{key} "] = parent.pop(key)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in keys:
        found.append((value, key))
        found += _places(value[key])
    return found


NASTY: list[Any] = [
    *(None, True, -1, 0, 1, 2, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 10**400),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        "a",
        "\x00",
        "\ud800",
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "a" * 5000,
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        [1, 2, 3],
        [[1, 2, 3, 4, 5, 6]],
        [1e308] * 6,
        [[1e9, -1e9] * 40],
        [[float("nan")] * 6],
    ),
    [[0, 0, 1e18, 0, 1e18, 1e18]],
    [[float(i % 977) for i in range(20_000)]],  # a polygon of ten thousand corners
    {"size": [SIZE, SIZE], "counts": []},
    {"size": [SIZE, SIZE], "counts": [SIZE * SIZE + 1]},
    {"size": [SIZE, SIZE], "counts": [-5, SIZE * SIZE + 5]},
    {"size": [SIZE, SIZE], "counts": [0] * 10_000},
    {"size": [SIZE, SIZE], "counts": "0"},
    {"size": [SIZE, SIZE], "counts": "oooooooooooooooo"},
    {"size": [SIZE, SIZE], "counts": "P" * 50_000},
    {"size": [1 << 20, 1 << 20], "counts": [1 << 40]},
    {"size": "24", "counts": 7},
    {"counts": "11"},
]


def sound_annotations() -> dict[str, Any]:
    """A COCO file of two images and three annotations."""
    images = [{"id": key, "file_name": f"{key}.png", "height": SIZE, "width": SIZE} for key in (1, 2)]
    one = {"category_id": 1, "bbox": [4, 4, 16, 12], "area": 192, "iscrowd": 0, "segmentation": [SQUARE]}
    rle = {"size": [SIZE, SIZE], "counts": [30, 40, SIZE * SIZE - 70]}
    annotations = [
        {"id": 1, "image_id": 1, **one},
        {"id": 2, "image_id": 2, **one},
        {"id": 3, "image_id": 2, **one, "iscrowd": 1, "segmentation": rle},
    ]
    categories = [{"id": 1, "name": "a"}, {"id": 5, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def sound_videos() -> dict[str, Any]:
    """A YouTube-VIS file of one video of two frames."""
    mask = {"size": [SIZE, SIZE], "counts": [30, 40, SIZE * SIZE - 70]}
    track = {"id": 1, "video_id": 1, "category_id": 1, "iscrowd": 0, "segmentations": [[SQUARE], mask]}
    track |= {"bboxes": [[4, 4, 16, 12], [1, 1, 2, 22]], "areas": [192, 40]}
    video = {"id": 1, "file_names": ["1.png", "2.png"], "height": SIZE, "width": SIZE}
    return {"videos": [video], "annotations": [track], "categories": [{"id": 1, "name": "a"}]}


def sound_results() -> list[dict[str, Any]]:
    """COCO results of two detections."""
    rle = {"size": [SIZE, SIZE], "counts": [30, 40, SIZE * SIZE - 70]}
    return [
        {"image_id": key, "category_id": 1, "bbox": [4, 4, 16, 12], "score": 0.5, "segmentation": rle} for key in (1, 2)
    ]


@cache
def sound_image(kind: str) -> bytes:
    """An image of `SIZE` px, as JPEG, PNG and so on, with an orientation tag where the format has one."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@cache
def sound_checkpoint(kind: str) -> bytes:
    """Weights, a training checkpoint or a numpy pickle of a few numbers."""
    import torch

    from onestage.engine.checkpoint import WeightsInfo, save_checkpoint, save_weights

    info = WeightsInfo(package="toy", variant="v", categories=((1, "a"),))
    state = {"conv.weight": torch.arange(12.0).view(3, 4), "conv.bias": torch.zeros(3)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        if kind == "safetensors":
            save_weights(path, state, info)
        elif kind == "training":
            save_checkpoint(path, {"model": state, "ema": None, "info": info.to_json(), "step": 3})
        elif kind == "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(
                pickle.dumps({"blobs": {name: tensor.numpy() for name, tensor in state.items()}}, protocol=2)
            )
        return path.read_bytes()


class _Payload:
    """Unpickled without care it runs a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def payload_in_zip(draw: random.Random, folder: Path) -> bytes:
    """A torch file whose pickle runs code."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": _Payload(folder / "ran")}, protocol=2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


@cache
def zip_bomb() -> bytes:
    """A torch file whose pickle unpacks to half a gigabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"\x00" * (512 << 20))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def png_bomb(draw: random.Random, folder: Path) -> bytes:
    """A PNG that says it has billions of pixels."""
    side = draw.choice([20_000, 60_000, 2**31 - 1])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(b"\x00" * 10_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@cache
def gzip_bomb() -> bytes:
    """Annotations that unpack to three hundred megabytes of blanks."""
    return gzip.compress(b'{"images": []' + b" " * (300 << 20), 6)


def text(value: Any) -> bytes:
    """JSON, whatever is in it."""
    return json.dumps(value).encode()


def from_hypothesis(draw: random.Random, folder: Path) -> Any:
    """A document that hypothesis makes up around the keys of COCO."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("1.png")
    keys = st.sampled_from(
        ["id", "image_id", "category_id", "bbox", "segmentation", "size", "counts", "area", "height"]
    )
    keys |= st.sampled_from(["file_name", "width", "iscrowd", "name", "score"])
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(keys, inner), max_leaves=25
    )
    entries = st.lists(st.dictionaries(keys, values) | values, max_size=4)
    made: list[Any] = []

    @seed(draw.randrange(2**32))
    @settings(
        max_examples=3, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.fixed_dictionaries({"images": entries, "annotations": entries, "categories": entries}) | values)
    def make(value: Any) -> None:
        made.append(value)

    make()
    return made[-1]


def nested(draw: random.Random, folder: Path) -> bytes:
    """Brackets in brackets."""
    depth = draw.choice([50, 900, 5000, 200_000])
    return b'{"images": ' + b"[" * depth + b"]" * depth + b', "annotations": [], "categories": []}'


def read_as_annotations() -> Callable[..., list[int]]:
    """The loader, strict and lenient, and lint with a copy."""
    from onestage.data.coco import CocoDataset
    from onestage.lint import main as lint

    def read(path: Path, out: Path, guard: Any) -> list[int]:
        images = path.parents[1] / "sound"

        def load(how: Any) -> int:
            dataset = CocoDataset(path, images, on_bad_sample=how)
            for index in range(min(3, len(dataset))):
                dataset[index]
            return 0

        codes = [guard([], lambda how=how: load(how)) for how in ("raise", "skip")]
        return [*codes, lint([str(path), "--json"]), lint([str(path), "--fix", str(out / "clean"), "--overwrite"])]

    return read


def read_as_image() -> Callable[..., list[int]]:
    """As `predict` and as a data set read it."""
    from onestage.data.coco import check_header, read_image

    def read(path: Path, out: Path, guard: Any) -> list[int]:
        codes = [guard([], lambda size=size: int(read_image(path, size=size) is None)) for size in (None, (SIZE, SIZE))]
        return [*codes, guard([], lambda: int(check_header(path, size=(SIZE, SIZE)) == 0))]

    return read


def read_as_rle() -> Callable[..., list[int]]:
    """To masks and back."""
    from onestage.data.validate import read_json
    from onestage.masks import Masks

    def read(path: Path, out: Path, guard: Any) -> list[int]:
        def load() -> int:
            masks = Masks.from_rle([read_json(path)], (SIZE, SIZE))
            return int(len(masks.to_rle()) != 1 or masks.to_bool().shape != (1, SIZE, SIZE))

        return [guard([], load)]

    return read


def read_as_checkpoint() -> Callable[..., list[int]]:
    """As weights, as an official checkpoint, and to resume from."""
    from onestage.engine.checkpoint import load_checkpoint, load_weights, read_state_dict

    def read(path: Path, out: Path, guard: Any) -> list[int]:
        return [
            guard([], lambda load=load: int(load(path) is None))
            for load in (load_weights, read_state_dict, load_checkpoint)
        ]

    return read


def read_as_results() -> Callable[..., list[int]]:
    """Evaluated against sound annotations."""
    from onestage.data.coco import coco_object
    from onestage.engine.coco_eval import evaluate_results_file

    sound = sound_annotations()
    gt = coco_object(sound["images"], [{**a, "iscrowd": 0} for a in sound["annotations"][:2]], [(1, "a"), (5, "b")])

    def read(path: Path, out: Path, guard: Any) -> list[int]:
        return [guard([], lambda: int(not evaluate_results_file(path, gt)))]

    return read


def _json_makers(sound: Callable[[], Any]) -> dict[str, Bytes]:
    return {
        "values": lambda draw, folder: text(bent_value(sound(), draw)),
        "bytes": lambda draw, folder: bent(text(sound()), draw),
        "hypothesis": lambda draw, folder: text(from_hypothesis(draw, folder)),
        "more values": lambda draw, folder: text(bent_value(bent_value(sound(), draw), draw)),
    }


def _rle(draw: random.Random) -> Any:
    counts: Any = [draw.choice([0, 1, 5, 300, 576, -1, 2**40]) for _ in range(draw.randrange(9))]
    if draw.random() < 0.5:
        counts = "".join(chr(draw.randint(40, 120)) for _ in range(draw.randrange(30)))
    return {"size": draw.choice([[SIZE, SIZE], [SIZE, SIZE], [1, 576], [SIZE], "x"]), "counts": counts}


SUFFIX = {"annotations": "json", "images": "png", "rles": "json", "checkpoints": "pth", "results": "json"}
KINDS: dict[str, tuple[dict[str, Bytes], Callable[[], Callable[..., list[int]]]]] = {
    "annotations": (
        {
            **_json_makers(sound_annotations),
            **{f"video {name}": maker for name, maker in _json_makers(sound_videos).items()},
            "bomb.json.gz": lambda draw, folder: gzip_bomb(),
            "bent.json.gz": lambda draw, folder: bent(gzip.compress(text(sound_annotations())), draw),
            "nested": nested,
        },
        read_as_annotations,
    ),
    "images": (
        {
            **{
                f"bytes.{kind.lower()}": lambda draw, folder, kind=kind: bent(sound_image(kind), draw)
                for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
            },
            "bomb": png_bomb,
            "postscript.jpg": lambda draw, folder: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
            "noise": lambda draw, folder: draw.randbytes(draw.randrange(3000)),
        },
        read_as_image,
    ),
    "rles": (
        {
            "drawn": lambda draw, folder: text(_rle(draw)),
            "values": lambda draw, folder: text(bent_value(sound_results()[0]["segmentation"], draw)),
            "nasty": lambda draw, folder: text(draw.choice(NASTY)),
        },
        read_as_rle,
    ),
    "checkpoints": (
        {
            **{
                f"bytes of {kind}": lambda draw, folder, kind=kind: bent(sound_checkpoint(kind), draw)
                for kind in ("safetensors", "training", "legacy", "numpy")
            },
            "payload": lambda draw, folder: pickle.dumps({"model": _Payload(folder / "ran")}, protocol=2),
            "payload in zip": payload_in_zip,
            "bomb": lambda draw, folder: zip_bomb(),
            "header": lambda draw, folder: (
                (len(body := text(bent_value({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, draw))))
                .to_bytes(8, "little") + body + bytes(16)
            ),
        },
        read_as_checkpoint,
    ),
    "results": (_json_makers(sound_results), read_as_results),
}  # fmt: skip


if __name__ == "__main__":
    main()
