"""Runs the rows of tables: plans, starts a process per training, tells how far it is, and keeps what is finished.

Everything lies under one folder: `records` (one JSON per row and seed, the evidence), `trainings` (run folders),
`pictures`. Called again with the same settings it takes up what is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onestage.errors import UsageError, some
from onestage.machine import usable_cores
from onestage.method import Method
from onestage.tables.plan import Entry, Job, Settings, entries_of, read_by_training
from onestage.tables.record import digest, read_records
from onestage.tables.spec import KINDS, Row, Table

Say = Callable[[str], None]
INTERRUPTED = (130, 143)
POLL = 0.2  # seconds between two looks at the running processes


@dataclass
class Outcome:
    """What running came to.

    Args:
        finished: Entries that have a record now, reused ones included.
        reused: How many of them had it before.
        failed: (job, why) of those that ended with an error.
        stopped: Exit code of an interruption, or None.
    """

    finished: int = 0
    reused: int = 0
    failed: list[tuple[Job, str]] = field(default_factory=list)
    stopped: int | None = None


def plan_jobs(
    rows: Sequence[tuple[Method, Table, Row]],
    settings: Settings,
    seeds: Sequence[int],
    output: Path,
    *,
    alone: bool = True,
    command: str = "",
) -> tuple[list[Job], int]:
    """What is left to do, one job per training, and how many entries are finished.

    Rows that read the same training are in one job; a second seed starts when the first is through.

    Raises:
        UsageError: one weights file for rows of several trainings.
    """
    finished = {record["key"] for record in read_records(output / "records") if "key" in record}
    entries = list(entries_of(rows, settings, seeds))
    if settings.weights is not None and Path(settings.weights).is_file():
        trained = {(e.method.name, digest(read_by_training(e.config, e.method))) for e in entries}
        if len(trained) > 1:
            raise UsageError(
                f"--weights '{settings.weights}' is one training, and these rows need {len(trained)}",
                "choose with --rows, or give a folder of <package>-<table>-<row>.safetensors",
            )
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.key not in finished:
            groups.setdefault(entry.training, []).append(entry)
    jobs = [
        Job(
            package=group[0].method.name,
            seed=group[0].seed,
            rows=tuple((entry.table.number, entry.row.name) for entry in group),
            settings=settings,
            output=str(output),
            alone=alone,
            command=command,
        )
        for group in groups.values()
    ]
    return jobs, sum(entry.key in finished for entry in entries)


def run_jobs(jobs: Sequence[Job], output: Path, *, at_once: int, reused: int, say: Say) -> Outcome:
    """Runs the jobs in processes, so many at once; a failing one does not stop the others, an interruption does."""
    outcome = Outcome(finished=reused, reused=reused)
    waiting, running = list(enumerate(jobs, 1)), list[_Process]()
    durations: list[float] = []
    for folder in ("records", "jobs"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, job = waiting.pop(0)
                running.append(_start(number, job, output, at_once))
                say(f"[{number}/{len(jobs)}] starts: {title(job)}")
            time.sleep(POLL)
            for process in [process for process in running if process.ended()]:
                running.remove(process)
                durations.append(process.seconds)
                code = process.returncode
                if code in INTERRUPTED:
                    raise KeyboardInterrupt(code)
                if code == 0:
                    outcome.finished += len(process.job.rows)
                    result = found(process.job, output)
                else:
                    outcome.failed.append((process.job, process.why()))
                    result = f"FAILED: {process.why()}"
                left = sum(durations) / len(durations) * len(waiting) / at_once
                ahead = f"; {len(waiting)} left, about {duration(left)}" if waiting else ""
                took = duration(process.seconds)
                say(f"[{process.number}/{len(jobs)}] {title(process.job)}: {result} in {took}{ahead}")
    except KeyboardInterrupt as stop:
        # A terminal sends SIGINT to the children too; under a supervisor they get it from here.
        for process in running:
            process.stop()
        outcome.stopped = stop.args[0] if stop.args else INTERRUPTED[0]
    return outcome


def title(job: Job) -> str:
    """What a job is called in progress lines."""
    rows = [f'Table {number} "{name}"'.replace("Table figure", "Figure ") for number, name in job.rows]
    seed = f", seed {job.seed}" if job.seed else ""
    return f"{job.package} {some(rows, 2)}{seed}"


def found(job: Job, output: Path) -> str:
    """The headline numbers of a finished job."""
    keys = {entry.key for entry in job.entries()}
    records = [record for record in read_records(output / "records") if record.get("key") in keys]
    parts = []
    for ours in [record["ours"] for record in records[:3]]:
        aps = [(word, ours[f"{kind}/AP"]) for kind, word in KINDS.items() if f"{kind}/AP" in ours]
        shown = [f"{word} AP {100 * value:.1f}" for word, value in reversed(aps)]
        parts.append(", ".join(shown or [f"{name} {value:.3g}" for name, value in list(ours.items())[:2]]))
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """A span of time for people."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Process:
    """A running job."""

    def __init__(self, number: int, job: Job, file: Path, log: Path | None, environment: dict[str, str]):
        self.number, self.job, self.file, self.log = number, job, file, log
        module = ["-m", "onestage.tables.work", str(file)]
        if job.settings.processes > 1:
            several = ["--standalone", f"--nproc-per-node={job.settings.processes}"]
            module = ["-m", "torch.distributed.run", *several, *module]
        self.started = time.perf_counter()
        stderr = None if log is None else open(log, "w", encoding="utf-8")  # noqa: SIM115, the process holds it
        self.process = subprocess.Popen([sys.executable, *module], stderr=stderr, env=environment)
        if stderr is not None:
            stderr.close()

    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def returncode(self) -> int:
        return abs(self.process.returncode) + (128 if self.process.returncode < 0 else 0)

    def stop(self) -> None:
        """Has the training saved; waits until it is."""
        if not self.ended():
            self.process.terminate()
            self.process.wait()

    def why(self) -> str:
        """One line on what went wrong."""
        error = self.file.with_suffix(".error")
        if error.is_file():
            return ": ".join(json.loads(error.read_text(encoding="utf-8"))[:1])
        lines = self.log.read_text(encoding="utf-8").strip().splitlines() if self.log is not None else []
        return lines[-1] if lines else f"exit code {self.returncode}"


def _start(number: int, job: Job, output: Path, at_once: int) -> _Process:
    file = output / "jobs" / f"{os.getpid()}-{number:03d}.json"  # another session may be at work in the same folder
    for old in (file.with_suffix(".error"), file.with_suffix(".log")):
        old.unlink(missing_ok=True)
    job.write(file)
    environment = dict(os.environ)
    if at_once > 1:  # each its share of the cores, and its messages in a file
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // at_once)))
    return _Process(number, job, file, file.with_suffix(".log") if at_once > 1 else None, environment)
