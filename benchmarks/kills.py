"""Trainings killed with SIGKILL at random moments and resumed: do they end where a run that was left alone ends?

Each run is a package's own command, `python -m PACKAGE.train --small`, on generated shapes and the CPU, in a process
of its own (forked, because importing takes longer than training); the packages take turns. Two of three kills come at a
random fraction of a random step, evaluations included; the third one comes while a checkpoint is being written: once
its temporary file is there, and a random part of the time later that writing takes. A run that has a last.ckpt is
resumed from it, one that was killed before the first is started anew, as its user would. It survives if weights,
averaged weights, optimiser, metrics, results and best weights then equal those of the run left alone, bit for bit.

    python benchmarks/kills.py --kills 20

writes a record to results/faults/ and leaves with 1 if a run is lost. The same seed draws the same moments.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from onestage.cli.app import main as run_verb
from onestage.data.synth import ShapesDataset
from onestage.engine.checkpoint import load_checkpoint, load_weights
from onestage.method import Method
from onestage.tables.record import write_record

PACKAGES = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
STEPS, SAVE_EVERY, EVAL_EVERY = 12, 3, 6
FLAGS = f"--small --size 64 --device cpu --steps {STEPS} --batch-size 2 --no-autoscale --ema 0.9 --quiet"
FLAGS += f" --save-every {SAVE_EVERY} --eval-every {EVAL_EVERY} --log-every 1"
PART = ".last.ckpt.tmp"  # what a checkpoint is called until it is whole
PATIENCE = 1800  # seconds for one run

State = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help="those that take turns")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "faults")
    options = parser.parse_args()
    cases = run(options.packages, options.kills, options.seed)
    lost = [case for case in cases if case["differences"]]
    writing = sum(case["while_writing"] for case in cases)
    print(f"{len(cases)} killed, {writing} of them while a checkpoint was written: {len(lost)} lost")
    config = {"kills": options.kills, "seed": options.seed, "packages": options.packages}
    result = {"tried": len(cases), "survived": len(cases) - len(lost), "lost": len(lost), "while_writing": writing}
    protocol = {"flags": FLAGS, "steps": STEPS, "saved_every": SAVE_EVERY, "evaluated_every": EVAL_EVERY}
    body = {"kind": "faults", "protocol": protocol, "results": [result | {"cases": cases}]}
    print(f"record: {write_record(options.results, 'kills', config, body)}")
    sys.exit(bool(lost))


def run(packages: list[str], kills: int, seed: int) -> list[dict[str, Any]]:
    """Kills and resumes; one dict for each run, whose `differences` is empty if it survived."""
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shapes(folder / "shapes")
        alone: dict[str, tuple[float, float]] = {}
        for number in range(kills):
            package = packages[number % len(packages)]
            if package not in alone:
                alone[package] = train_alone(package, folder)
            draw = random.Random(f"{seed}-{number}")
            aimed = number % 3 == 2
            case = kill_and_resume(package, folder, draw, aimed, alone[package][aimed])
            case["differences"] = differences(folder / package, folder / "killed")
            print(f"{number + 1}: {package}, {json.dumps(case)}", flush=True)
            cases.append({"package": package, **case})
    return cases


def write_shapes(folder: Path) -> None:
    """A data set in COCO layout: 24 images to train on, enough for a code of 60 numbers, 4 to evaluate on, 64 px."""
    (folder / "annotations").mkdir(parents=True)
    for split, number in (("train", 24), ("val", 4)):
        (folder / split).mkdir()
        content = ShapesDataset(number, split=split, size=64).coco_json(folder / split)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def train_alone(package: str, folder: Path) -> tuple[float, float]:
    """The run that is left alone, in `folder / package`; returns how many seconds a step and a checkpoint take."""
    begun, seconds = 0.0, 0.0

    def watch(state: State) -> bool:
        nonlocal begun, seconds
        now = time.perf_counter()
        begun = (begun or now) if state["writing"] else 0.0
        seconds = max(seconds, now - begun if begun else 0.0)
        return False

    assert start(package, folder, folder / package, watch, []) == 0, f"{package}: the run left alone failed"
    rows = [json.loads(line) for line in (folder / package / "metrics.jsonl").read_text().splitlines()]
    return max(2 / row["images_per_second"] for row in rows if "loss" in row), seconds


def kill_and_resume(package: str, folder: Path, draw: random.Random, aimed: bool, seconds: float) -> dict[str, Any]:
    """One run in `folder / "killed"`, killed and then resumed; a moment after its end is drawn again.

    Args:
        package: Whose training.
        folder: Has the data set.
        draw: Of the moment.
        aimed: While a checkpoint is written.
        seconds: How long a step takes; if aimed, a checkpoint.
    """
    killed = folder / "killed"
    while True:
        remove(killed)
        step = draw.randrange(0, STEPS, SAVE_EVERY) if aimed else draw.randrange(STEPS)
        delay = draw.random() * seconds
        moment = 0.0

        def watch(state: State, step: int = step, delay: float = delay) -> bool:
            nonlocal moment
            if not moment and state["step"] >= step and (state["writing"] or not aimed):
                moment = time.perf_counter() + delay
            return bool(moment) and time.perf_counter() >= moment

        code = start(package, folder, killed, watch, ["--overwrite"])
        if code == -signal.SIGKILL:
            break
        assert code == 0, f"{package}: left with {code} before it was killed"
    checkpoint = killed / "last.ckpt"
    case = {
        "aimed_at_writing": aimed,
        "while_writing": (killed / PART).exists(),
        "killed_after_step": steps_done(killed),
        "resumed_after_step": load_checkpoint(checkpoint)["state"]["step"] if checkpoint.exists() else None,
    }
    flags = ["--resume", str(checkpoint)] if checkpoint.exists() else ["--overwrite"]
    code = start(package, folder, killed, lambda state: False, flags)
    return case | ({} if code == 0 else {"exit_code": code})


def start(package: str, folder: Path, output: Path, watch: Callable[[State], bool], flags: list[str]) -> int:
    """Trains in another process, which is killed as soon as `watch` says so; returns its exit code.

    Args:
        package: Whose `train`.
        folder: Has the data set.
        output: The run folder.
        watch: Gets the steps done and whether a checkpoint is being written, a hundred times a second.
        flags: Beside those of every run.
    """
    words = [*shlex.split(FLAGS), "--data", str(folder / "shapes"), "--output", str(output), *flags]
    method = import_module(f"{package}.method").METHOD
    process = multiprocessing.get_context("fork").Process(target=train, args=(method, words, folder / "said.txt"))
    process.start()
    end = time.monotonic() + PATIENCE
    while process.is_alive():
        state = {"step": steps_done(output), "writing": (output / PART).exists()}
        if (output / "metrics.jsonl").exists() and watch(state):
            process.kill()
        assert time.monotonic() < end, f"{package}: a run took more than {PATIENCE} s"
        time.sleep(0.01)
    code = process.exitcode
    assert code is not None
    if code not in (0, -signal.SIGKILL):
        print((folder / "said.txt").read_text(encoding="utf-8"))
    return code


def train(method: Method, words: list[str], said: Path) -> None:
    """What the other process does; all it says goes into a file."""
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    sys.exit(run_verb(method, "train", words))


def steps_done(output: Path) -> int:
    """How many steps the metrics of a run tell of; 0 where there are none."""
    path = output / "metrics.jsonl"
    return sum(b'"loss"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0


def remove(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same in two run folders; nothing at all if they are equal bit for bit."""
    found = []
    for name in ("last.ckpt", "best.safetensors", "results.json", "metrics.jsonl"):
        missing = [str(folder / name) for folder in (first, second) if not (folder / name).is_file()]
        if missing:
            found += [f"{path} is missing" for path in missing]
        else:
            found += unequal(content_of(first / name), content_of(second / name), name)
    return found[:10]


def content_of(path: Path) -> Any:
    """A file of a run as plain values and tensors, without its times."""
    if path.suffix == ".ckpt":
        content = load_checkpoint(path)
        return {key: content[key] for key in ("state", "model", "ema", "ema_updates", "optimizer")}
    if path.suffix == ".safetensors":
        return load_weights(path)[0]
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def unequal(one: Any, other: Any, where: str) -> list[str]:
    """Names of the leaves in which two nested values differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if type(one) is type(other) and isinstance(one, (dict, list, tuple)) and len(one) == len(other):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        if not isinstance(one, dict) or one.keys() == other.keys():
            return [name for key in keys for name in unequal(one[key], other[key], f"{where}[{key!r}]")]
    return [] if type(one) is type(other) and one == other else [where]


if __name__ == "__main__":
    main()
