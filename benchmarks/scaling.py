"""Where the time of a training step would go at 8, 64 and 512 GPUs: on paper, nothing is measured here.

Three quantities make the model, and each says where it is from:

- Bytes that the GPUs exchange: four for each parameter, whose number is in the record of `networks.py`. Parameters
  that are frozen are counted too; they are less than one in a hundred.
- Computing: three times the forward pass' multiply-adds (same record), two FLOP each, on `IMAGES` images, at `SHARE` of
  the GPU's peak. That is an assumption, not a time of this code; `--step sipmask=0.2` puts a measured one in its place.
- Exchange: a ring, 2 (N - 1) / N times the bytes over the slowest link, in buckets of 25 MB (PyTorch's default), each
  with the latency of a tree. Backward takes two thirds of the computing and hides all buckets but the last.

    python benchmarks/scaling.py

prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

NETWORKS = Path(__file__).parent / "results" / "networks"
VARIANTS = {"sipmask": "r50", "meinst": "r50", "sais": "r50_768", "rdsnet": "r50", "sprnet": "r50_800"}
GPUS = (8, 64, 512)
NODE = 8  # GPUs of a machine
IMAGES = 2  # per GPU and step, as in the recipes of MEInst, RDSNet and SipMask
EPOCH = 117_266  # images of train2017 that have annotations
PEAK, SHARE = 156e12, 0.3  # FLOP/s: an A100's TF32 by its data sheet; what of it a detector gets is assumed
BACKWARD = 2 / 3
BUCKET = 25 << 20  # bytes, DistributedDataParallel's default
SYNCHRONISATIONS = 3  # small exchanges of a step: the losses read once, and up to two normalisers


@dataclass(frozen=True)
class Links:
    """What joins the GPUs.

    Args:
        name: For the table.
        inside: Bytes/s between GPUs of a machine.
        between: Bytes/s that a machine sends to others.
        latency_inside: Seconds of one hop in a machine; assumed.
        latency_between: Seconds of one hop between machines; assumed.
    """

    name: str
    inside: float
    between: float
    latency_inside: float = 5e-6
    latency_between: float = 15e-6

    def latency(self, gpus: int) -> float:
        """Seconds that a tree needs there and back."""
        nodes = math.ceil(gpus / NODE)
        hops = math.ceil(math.log2(min(gpus, NODE))) * self.latency_inside
        return 2 * (hops + math.ceil(math.log2(nodes)) * self.latency_between)

    def exchange(self, size: float, gpus: int) -> float:
        """Seconds to add up `size` bytes of every GPU."""
        slowest = self.inside if gpus <= NODE else min(self.inside, self.between)
        return 2 * (gpus - 1) / gpus * size / slowest + self.latency(gpus)


# By data sheet: NVLink 3 has 300 GB/s a direction; eight adapters of 200 Gbit/s a machine, or one of 100.
LINKS = (Links("8 x 200 Gbit/s", 300e9, 200e9), Links("100 Gbit/s", 300e9, 12.5e9))


@dataclass(frozen=True)
class Step:
    """Seconds of one step on so many GPUs."""

    computing: float
    exchange: float
    exposed: float  # of the exchange, what backward does not hide
    small: float  # losses and normalisers

    @property
    def total(self) -> float:
        return self.computing + self.exposed + self.small

    @property
    def efficiency(self) -> float:
        """Images per second and GPU, over those of one GPU alone."""
        return self.computing / self.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", nargs="*", default=[], metavar="PACKAGE=SECONDS", help="measured on one GPU")
    parser.add_argument("--networks", type=Path, default=newest(NETWORKS), help="the record of networks.py")
    options = parser.parse_args()
    measured = {name: float(seconds) for name, _, seconds in (word.partition("=") for word in options.step)}
    print(tables(options.networks, measured))


def newest(folder: Path) -> Path:
    return max(folder.glob("networks-*.json"), key=lambda path: path.stat().st_mtime)


def tables(networks: Path, measured: dict[str, float]) -> str:
    """Both tables of docs/scaling.md, Markdown.

    Args:
        networks: The record of `networks.py`.
        measured: Seconds of a step on one GPU, by package; what is not there is assumed.
    """
    record = json.loads(networks.read_text(encoding="utf-8"))
    found = {(entry["package"], entry["variant"]): entry for entry in record["results"]}
    lines = ["| network | gradients, MB | step on one GPU, measured | computing of a step, assumed |"]
    lines += ["| --- | --- | --- | --- |"]
    rows = []
    for package, variant in VARIANTS.items():
        entry = found[package, variant]
        size, assumed = 4 * entry["parameters"], computing(entry["multiply_adds"])
        seconds = measured.get(package)
        told = "-" if seconds is None else f"{1e3 * seconds:.0f} ms"
        lines.append(f"| {package} {variant} | {size / 1e6:.0f} | {told} | {1e3 * assumed:.0f} ms |")
        rows += [row(f"{package} {variant}", size, seconds or assumed, gpus) for gpus in GPUS]
    names = [f"{links.name}: exchange, waited for | efficiency" for links in LINKS]
    lines += ["", f"| network | GPUs | images a step | steps an epoch | {' | '.join(names)} |"]
    lines += ["|" + " --- |" * (4 + 2 * len(LINKS)), *rows]
    return "\n".join(lines)


def row(name: str, size: float, seconds: float, gpus: int) -> str:
    cells = [name, f"{gpus}", f"{gpus * IMAGES}", f"{math.ceil(EPOCH / (gpus * IMAGES)):,}"]
    for links in LINKS:
        step = step_on(links, size, seconds, gpus)
        cells += [f"{1e3 * step.exchange:.1f} ms, {1e3 * (step.exposed + step.small):.1f} ms"]
        cells += [f"{100 * step.efficiency:.1f} %"]
    return f"| {' | '.join(cells)} |"


def computing(multiply_adds: float) -> float:
    """Seconds of forward and backward of `IMAGES` images, assumed."""
    return 3 * 2 * multiply_adds * IMAGES / (PEAK * SHARE)


def step_on(links: Links, size: float, seconds: float, gpus: int) -> Step:
    """A step that computes `seconds` and exchanges `size` bytes."""
    buckets = math.ceil(size / BUCKET)
    exchange = buckets * links.exchange(size / buckets, gpus)
    exposed = max(exchange / buckets, exchange - BACKWARD * seconds)
    return Step(seconds, exchange, exposed, SYNCHRONISATIONS * links.latency(gpus))


if __name__ == "__main__":
    main()
