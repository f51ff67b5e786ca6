"""A video model trained for minutes on a CPU: AP over tracks and identity switches on held-out generated clips.

    OMP_NUM_THREADS=2 python benchmarks/clips.py

Three commands that anybody can type, and one record of what they said: `onestage.synth` writes 160 clips to train on
and 40 others, `sipmask.train` trains `video_small` from nothing and keeps the last weights, `sipmask.eval` follows the
objects through the other clips. The numbers say that the method learns to find and to recognise objects that cross,
touch, leave and return; they say nothing about films.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from onestage.tables.record import write_record

RESULTS = Path(__file__).parent / "results" / "accuracy"
COUNTS = ("videos", "videos_with_tracks", "tracks", "objects", "identity_switches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="of 8 pairs of frames (%(default)s)")
    parser.add_argument("--clips", type=int, nargs=2, default=[160, 40], metavar=("TRAIN", "VAL"))
    parser.add_argument("--frames", type=int, default=12, help="of a clip (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="px (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of clips and training (%(default)s)")
    parser.add_argument("--folder", type=Path, help="keep clips, run and weights here")
    parser.add_argument("--output", default=str(RESULTS), help="'' writes no record")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config, body = measure(flags, folder)
    for name, value in body["results"].items():
        print(f"{name}: {value}", file=sys.stderr)
    if flags.output:
        print(write_record(Path(flags.output), "video-clips", config, body))


def measure(flags: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the three commands; the configuration that decided the outcome, and the outcome."""
    commands = commands_of(flags)
    run(commands[0], folder)
    trained, wall, cpu = run(commands[1], folder)
    scored, eval_wall, _ = run(commands[2], folder)
    settings = json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))
    results = {name: round(value, 4) for name, value in scored.items() if name.startswith("segm/") and value >= 0}
    results |= {name: scored[name] for name in COUNTS} | {"frames_followed": round(scored["frames_followed"], 4)}
    results |= {
        "steps": trained["steps"],
        "training_seconds": round(wall, 1),
        "training_cpu_seconds": round(cpu, 1),
        "evaluation_seconds": round(eval_wall, 1),
    }
    data = f"generated clips, not YouTube-VIS: {flags.clips[0]} to train on, {flags.clips[1]} others to evaluate on"
    return (
        {name: getattr(flags, name) for name in ("clips", "frames", "size", "seed")} | {"model": settings["model"]},
        {
            "kind": "accuracy",
            "package": "sipmask",
            "smoke": True,
            "data": data,
            "protocol": {
                "commands": [shlex.join(["python", *command]) for command in commands],
                "weights": "those after the last step; the held-out clips are looked at once, at the end",
                "training_seconds": "wall time of the whole command, start and last evaluation included",
                "training_cpu_seconds": "CPU time of the same, of all its threads",
            },
            "results": results,
        },
    )


def commands_of(flags: argparse.Namespace) -> list[list[str]]:
    """What is run, in the folder that everything lies in."""
    train, val = map(str, flags.clips)
    looks = ["--frames", str(flags.frames), "--size", str(flags.size), "--seed", str(flags.seed)]
    recipe = ["--variant", "video_small", "--steps", str(flags.steps), "--eval-every", "0", "--seed", str(flags.seed)]
    return [
        ["-m", "onestage.synth", "clips", "--video", "--train", train, "--val", val, *looks, "--overwrite", "--json"],
        ["-m", "sipmask.train", "--data", "clips", *recipe, "--output", "run", "--overwrite", "--json"],
        ["-m", "sipmask.eval", "--data", "clips", "--weights", "run/best.safetensors", "--per-class"]
        + ["--output", "scored", "--overwrite", "--json"],
    ]


def run(command: list[str], folder: Path) -> tuple[dict[str, Any], float, float]:
    """The JSON that a command ends with, and its wall and CPU seconds."""
    before, begin = _cpu_of_children(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, env=_environment(), stdout=subprocess.PIPE, text=True)
    wall, cpu = time.perf_counter() - begin, _cpu_of_children() - before
    if done.returncode:
        sys.exit(f"{shlex.join(['python', *command])} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]), wall, cpu


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    """This process's, with the places it imports from made absolute: the commands run elsewhere."""
    paths = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)} if paths else dict(os.environ)


if __name__ == "__main__":
    main()
