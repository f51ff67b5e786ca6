"""The training loop: plain PyTorch, one process or several, resumable bit for bit.

`train` is the story; the rest of the file is its parts in order. What a resumed run needs besides tensors is the
position (step, epoch, batch): random generators are set from it before each batch (`guard.seed_step`), the sampler
continues from it, the learning rate is a function of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from onestage.config import Precision, ScheduleConfig
from onestage.data.loader import InstanceDataset, ResumableSampler, WorkerDied, make_loader
from onestage.engine import distributed
from onestage.engine.checkpoint import WeightsInfo, load_checkpoint, load_into, save_checkpoint, save_weights
from onestage.engine.evaluate import evaluate
from onestage.engine.guard import NonFiniteLoss, Suspect, autocast, seed_step
from onestage.engine.journal import Journal
from onestage.engine.network import prepare_network
from onestage.engine.schedule import Plateau, lr_at, make_optimizer, set_lr, total_steps
from onestage.engine.signals import Signals
from onestage.errors import DatasetError, MachineError, UsageError, some
from onestage.files import write_atomically
from onestage.machine import default_workers, peak_memory
from onestage.ops.dispatch import wants_triton
from onestage.structures import Target

LOG = logging.getLogger("onestage")
MAX_SKIPPED = 10  # steps in a row that `nan_policy` "skip" leaves out
HEADLINE = ("bbox/AP", "segm/AP", "segm/AP50")  # metrics that are said after each evaluation


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to run, as opposed to what to train (the config).

    Args:
        device: auto, cpu, cuda, cuda:N.
        precision: bf16 and fp16 run the model under autocast; fp16 scales the loss.
        seed: Order of the data, augmentation and every draw while training; the model is built before.
        deterministic: Ask the GPU for deterministic algorithms too; the CPU always uses them.
        compile: Run the network by `torch.compile`, compiled anew for a new input size; losses stay as they are.
        sync_bn: Batch norms that learn take their statistics from all processes; on GPUs only.
        workers: Processes that load data; None: none on a small CPU, where they would compete with the model.
        accumulate: Batches per step; the schedule's batch size is divided among them and the processes.
        eval_every: Steps between evaluations; None: each epoch, or a tenth of a schedule in steps; 0: at the end only.
        save_every: Steps between checkpoints; None and 0 as above.
        log_every: Steps between rows of metrics.
        resume: A last.ckpt to go on from.
        stop_after: Stop, saved and resumable, once this many steps are done.
        nan_policy: What a loss that is not finite does: stop the run, or skip the step, up to MAX_SKIPPED in a row. In
            fp16 a step whose gradients alone are not is skipped anyway, until the loss is not scaled up any more.
        metric: The number that decides which weights are the best; of a model without masks that of its boxes.
        eval_batch: Images per forward pass of an evaluation.
        progress: Show bars on stderr.
    """

    device: str = "auto"
    precision: Precision = "fp32"
    seed: int = 0
    deterministic: bool = False
    compile: bool = False
    sync_bn: bool = False
    workers: int | None = None
    accumulate: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 20
    resume: Path | None = None
    stop_after: int | None = None
    nan_policy: Literal["stop", "skip"] = "stop"
    metric: str = "segm/AP"
    eval_batch: int = 1
    progress: bool = True


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        steps: Updates done.
        metrics: Of the last evaluation; empty without one.
        best_metrics: Of the evaluation whose weights are in `weights`.
        best_step: When that was.
        seconds: It took, over all calls that had a part in it; what was computed after the checkpoint that another
            one went on from is not counted.
        weights: best.safetensors.
        checkpoint: last.ckpt.
    """

    steps: int
    metrics: dict[str, float]
    best_metrics: dict[str, float]
    best_step: int
    seconds: float
    weights: Path
    checkpoint: Path


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the step was finished and saved.

    Args:
        signal_number: Which.
        checkpoint: Where to go on from.
        step: Updates done.
    """

    def __init__(self, signal_number: int, checkpoint: Path, step: int):
        self.signal = signal.Signals(signal_number).name
        self.exit_code = 128 + signal_number
        self.checkpoint = checkpoint
        self.step = step
        super().__init__(f"stopped by {self.signal} after step {step}; saved to {checkpoint}")


def train(
    model: nn.Module,
    config: Any,
    train_set: InstanceDataset,
    val_set: Any | None,
    options: TrainOptions,
    folder: Path,
    *,
    info: WeightsInfo,
    callback: Callable[[dict[str, Any]], None] | None = None,
    evaluate: Callable[..., tuple[dict[str, float], list[dict[str, Any]]]] = evaluate,
    resumed: Callable[[], None] | None = None,
) -> TrainResult:
    """Trains `model` by `config.schedule` and leaves metrics, checkpoint and best weights in `folder`.

    With torchrun's environment, call `distributed.start` first and `train` in every process.

    Args:
        model: In train mode `model(images, targets)` gives a dict of scalar losses, in eval mode `model.detect`.
        config: The method's config, of which `schedule` and `input` count here.
        train_set: As CocoDataset.
        val_set: The same, or what `evaluate` takes; None to go without evaluation; then the last weights are the best.
        options: How to run.
        folder: For metrics.csv, metrics.jsonl, last.ckpt, best.safetensors, results.json and crash files.
        info: What the weights are; steps and metrics are filled in.
        callback: Gets each row of metrics, in process 0.
        evaluate: Scores the model on `val_set`; `evaluate_videos` where that is a set of videos.
        resumed: Called once `options.resume` has been taken up, before anything is written to `folder`.

    Raises:
        Interrupted: a signal ended the run early, saved.
        NonFiniteLoss: a loss was not finite and `nan_policy` is "stop", MAX_SKIPPED were not in a row, or weights that
            are to be saved are not.
        UsageError, MachineError, WeightsError, DatasetError: as their texts say.
    """
    run = _Run(model, config, train_set, val_set, options, folder, info, callback, evaluate, resumed)
    run.announce()
    run.loop()
    state = run.state
    return TrainResult(
        state.step, state.metrics, state.best_metrics, state.best_step, run.seconds, run.best_file, run.last_file
    )


@dataclass
class _State:
    """Where a run stands; everything in it is saved."""

    step: int = 0  # updates done
    epoch: int = 0
    batch: int = 0  # batches of this epoch that this process has taken
    epoch_loss: float = 0.0  # sum over them
    epoch_skipped: int = 0  # of them, without a loss
    skipped: int = 0  # steps without an update: nan_policy "skip", gradients that overflow in fp16
    judged: int = 0  # step of the last evaluation
    rows: int = 0  # of metrics, written so far
    plateau: Plateau = field(default_factory=Plateau)
    metrics: dict[str, float] = field(default_factory=dict)
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_value: float = -math.inf
    best_step: int = 0


class _Run:
    """Everything one run holds; `loop` is the training loop, `update` one step of it."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        train_set: InstanceDataset,
        val_set: Any | None,
        options: TrainOptions,
        folder: Path,
        info: WeightsInfo,
        callback: Callable[[dict[str, Any]], None] | None,
        evaluate: Callable[..., tuple[dict[str, float], list[dict[str, Any]]]],
        resumed: Callable[[], None] | None,
    ):
        self.started, self.seconds_before = time.perf_counter(), 0.0
        self.schedule: ScheduleConfig = config.schedule
        self.train_set, self.val_set = train_set, val_set
        self.options, self.info, self.folder, self.callback = options, info, folder, callback
        self.evaluate = evaluate
        self.last_file, self.best_file = folder / "last.ckpt", folder / "best.safetensors"
        self.device = _device(options)
        self.rank = distributed.rank()
        self.micro_batch = _micro_batch(self.schedule, options, train_set)
        self.workers = default_workers(self.device) if options.workers is None else options.workers
        self.loader = make_loader(
            train_set,
            config.input,
            batch_size=self.micro_batch,
            training=True,
            workers=self.workers,
            seed=options.seed,
            rank=self.rank,
            world=distributed.world_size(),
        )
        assert isinstance(self.loader.batch_sampler, ResumableSampler)
        self.sampler = self.loader.batch_sampler
        self.steps_per_epoch = len(self.sampler) / options.accumulate
        self.total = total_steps(self.schedule, self.steps_per_epoch)
        self.eval_every = _interval(options.eval_every, self.schedule, self.steps_per_epoch)
        self.save_every = _interval(options.save_every, self.schedule, self.steps_per_epoch)

        self.model = _synchronised(model, options).to(self.device)
        self.optimizer = make_optimizer(model, self.schedule)
        self.scaler = GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.average = None if self.schedule.ema is None else AveragedModel(model, multi_avg_fn=_ema(self.schedule.ema))
        self.state = _State()
        self.skipped_in_a_row = 0
        if options.resume is not None:
            self.restore(options.resume)
            if resumed is not None:
                resumed()
            self.take_along(options.resume.parent)
        if options.compile:  # after the average was made: a copy would keep the function of the original
            prepare_network(self.model, mode="compile")
        self.network = _distributed(model, self.device)
        self.window = _Window()
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder, self.state.rows, writes=distributed.rank_zero())

    @property
    def seconds(self) -> float:
        """What the run has taken so far, earlier calls included."""
        return self.seconds_before + time.perf_counter() - self.started

    def loop(self) -> None:
        options, state = self.options, self.state
        end = min(self.total, options.stop_after or self.total)
        started = state.step
        with (
            _deterministic(options, self.device),
            _explained_out_of_memory(self.device),
            Signals() as signals,
            self.progress_bar() as bar,
        ):
            if self.must_judge():  # the run was stopped before it could
                self.judge()
                self.save()
            batches = _endless(self.loader, self.sampler, state.epoch, state.batch)
            begin = time.perf_counter()
            while state.step < end:
                lr = lr_at(state.step, self.steps_per_epoch, self.schedule) * state.plateau.factor
                loss, stop = self.update(batches, lr, signals)
                state.step += 1
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if state.step == started + 1:
                    self.announce_first_step(time.perf_counter() - begin, end - state.step)
                if state.step % options.log_every == 0 or state.step == end:
                    self.report({"lr": lr, **self.window.means()})
                    self.window = _Window()
                paused = time.perf_counter()
                saves = stop or state.step == end or _due(state.step, self.save_every)
                if saves or self.must_judge():
                    self.require_finite()
                if saves:  # before an evaluation: that takes longer than one who stops a run waits
                    self.save()
                if stop and state.step < self.total:
                    raise Interrupted(signals.number or signal.SIGTERM, self.last_file, state.step)
                if self.must_judge():
                    self.judge()
                    if saves:
                        self.save()
                self.window.started += time.perf_counter() - paused  # neither is part of the pace

    def update(self, batches: Iterator[_Position], lr: float, signals: Signals) -> tuple[float, bool]:
        """One optimiser step; returns the loss and whether any process was told to stop."""
        options, state, schedule = self.options, self.state, self.schedule
        set_lr(self.optimizer, lr)
        self.network.train()
        loss, stop = 0.0, False
        for part in range(options.accumulate):
            state.epoch, state.batch, images, targets = self.take(batches, part)
            images = [image.to(self.device, non_blocking=True) for image in images]
            targets = [target.to(self.device) for target in targets]
            seed = (options.seed, self.rank, state.step * options.accumulate + part)
            seed_step(*seed)
            with _gradients_meet(self.network, part == options.accumulate - 1):
                with autocast(self.device, options.precision):
                    losses: dict[str, Tensor] = self.network(images, targets)
                terms, stop = _read(losses, signals)
                if not all(map(math.isfinite, terms.values())):
                    suspect = Suspect(images, targets, seed, state.step, lr, schedule.batch_size, options.precision)
                    self.refuse(suspect, losses, terms)
                    self.optimizer.zero_grad(set_to_none=True)
                    self.note_batch(None)
                    return math.nan, stop
                self.scaler.scale(torch.stack(list(losses.values())).sum() / options.accumulate).backward()
            loss += sum(terms.values()) / options.accumulate
            self.window.add(terms, len(images) * distributed.world_size())
            self.note_batch(sum(terms.values()))
        self.skipped_in_a_row = 0
        if self.learn() and self.average is not None:
            self.average.update_parameters(self.model)
        return loss, stop

    def learn(self) -> bool:
        """Updates the parameters by their gradients, unless these overflowed in fp16; returns whether it did.

        Raises:
            NonFiniteLoss: they did so although the loss was not scaled up any more.
        """
        scaler, clip_norm = self.scaler, self.schedule.clip_norm
        scale = scaler.get_scale()
        scaler.unscale_(self.optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            if clip_norm is not None:
                self.window.add_norm(nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm))
            # Not `scaler.step`: it calls fused optimisers for a skipped step too, whose momentum starts from whatever
            # is in memory then (torch 2.11).
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return True
        self.optimizer.zero_grad(set_to_none=True)
        self.state.skipped += 1
        what = f"gradients are not finite at step {self.state.step}, of a loss times {scale:g}"
        if scale <= 1:  # it was halved in every step before
            raise NonFiniteLoss(what, "use --precision bf16 or fp32, or a lower learning rate")
        say(f"{what}; step skipped, and the next ones use {scaler.get_scale():g}")
        return False

    def take(self, batches: Iterator[_Position], part: int) -> _Position:
        """The next batch. If the loader dies between two steps, the run is saved; within one it stays where it was."""
        try:
            return next(batches)
        except WorkerDied as died:
            if part > 0 or not distributed.rank_zero():
                raise
            self.require_finite()
            self.write_checkpoint()
            raise WorkerDied(
                f"{died.what} after step {self.state.step}, which is saved",
                f"{died.fix}; then go on with --resume {self.last_file}",
            ) from died

    def note_batch(self, loss: float | None) -> None:
        """Keeps the epoch's mean loss, by which the plateau schedule decides; None is a batch that was skipped."""
        state = self.state
        if loss is None:
            state.epoch_skipped += 1
        else:
            state.epoch_loss += loss
        if state.batch == len(self.sampler):
            counted = state.batch - state.epoch_skipped
            if self.schedule.policy == "plateau" and counted:
                state.plateau.observe(state.epoch_loss / counted, self.schedule.gamma)
            state.epoch_loss, state.epoch_skipped = 0.0, 0

    def must_judge(self) -> bool:
        """Whether an evaluation is due after this step and has not been."""
        step = self.state.step
        return self.state.judged < step and (step == self.total or _due(step, self.eval_every))

    def judge(self) -> None:
        """Evaluates; keeps the weights if they are the best so far."""
        state, learned = self.state, self.model if self.average is None else self.average.module
        state.judged = state.step
        value = 0.0
        distributed.share(learned.buffers())  # batch norms that learn have seen other images in every process
        if self.val_set is not None:
            state.metrics, results = self.evaluate(
                learned,
                self.val_set,
                precision=self.options.precision,
                workers=self.workers,
                batch_size=self.options.eval_batch,
                categories=self.info.categories or None,
                progress=self.options.progress,
            )
            self.report(state.metrics)
            metric = self.options.metric
            if metric not in state.metrics:
                metric = metric.replace("segm/", "bbox/")  # a model without masks
            if metric not in state.metrics:
                raise UsageError(f"metric '{self.options.metric}' is unknown", f"use one of {', '.join(state.metrics)}")
            value = state.metrics[metric]
            numbers = [f"{name} {fraction(state.metrics[name])}" for name in HEADLINE if name in state.metrics]
            say(f"step {state.step}: {', '.join(numbers)}")
            if distributed.rank_zero():
                write_atomically(self.folder / "results.json", json.dumps(results).encode())
        if not value < state.best_value:  # of equal ones the later, which has learned more
            state.best_value, state.best_step, state.best_metrics = value, state.step, state.metrics
            if distributed.rank_zero():
                info = replace(self.info, steps=state.step, metrics=state.metrics)
                save_weights(self.best_file, learned.state_dict(), info)

    def report(self, row: dict[str, Any]) -> None:
        row = {"step": self.state.step, "epoch": round(self.state.step / self.steps_per_epoch, 4), **row}
        self.journal.add(row)
        if self.callback is not None and distributed.rank_zero():
            self.callback(row)

    def refuse(self, suspect: Suspect, losses: dict[str, Tensor], terms: dict[str, float]) -> None:
        """Deals with a loss that is not finite in some process: raises, or returns to have the step skipped."""
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if self.options.nan_policy == "skip":
            self.state.skipped += 1
            self.skipped_in_a_row += 1
            say(str(suspect.error(bad, None).what) + "; step skipped", logging.WARNING)
            if self.skipped_in_a_row < MAX_SKIPPED:
                return
            say(f"{MAX_SKIPPED} steps in a row were skipped: nothing is learned any more", logging.WARNING)
        mine = [name for name, value in losses.items() if not math.isfinite(float(value.detach()))]
        path = self.folder / (f"crash-{suspect.step}.pt" if self.rank == 0 else f"crash-{suspect.step}-{self.rank}.pt")
        if mine:
            suspect.save(path, self.model, self.info)
        raise suspect.error(mine or bad, path if mine else None)

    def require_finite(self) -> None:
        """Keeps weights that a gradient has spoiled, though the loss was finite, from replacing good ones on disk.

        Raises:
            NonFiniteLoss: some are infinite or NaN.
        """
        state = self.model.state_dict()
        finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()  # one synchronisation
        bad = [name for name, is_finite in zip(state, finite, strict=True) if not is_finite]
        if bad:
            go_on = f"go on with --resume {self.last_file}" if self.last_file.exists() else "start again"
            raise NonFiniteLoss(
                f"after step {self.state.step} the weights are not finite ({some(bad)}), and are not saved",
                f"{go_on}, a lower learning rate or --grad-clip; its gradients were not finite",
            )

    def save(self) -> None:
        """Writes last.ckpt from process 0; the state is the same in all, but for their random generators, which follow
        from the position."""
        if distributed.rank_zero():
            self.write_checkpoint()
        distributed.barrier()

    def write_checkpoint(self) -> None:
        self.state.rows = len(self.journal.rows)
        save_checkpoint(
            self.last_file,
            {
                "state": asdict(self.state),
                "seconds": self.seconds,  # apart from the state, which a resumed run repeats bit for bit
                "fingerprint": self.fingerprint(),
                "model": self.model.state_dict(),
                "ema": None if self.average is None else self.average.module.state_dict(),
                "ema_updates": 0 if self.average is None else int(self.average.n_averaged),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "info": replace(self.info, steps=self.state.step, metrics=self.state.metrics).to_json(),
            },
        )

    def restore(self, path: Path) -> None:
        """Takes up a run where last.ckpt left it."""
        saved = load_checkpoint(path)
        for name, now in self.fingerprint().items():
            if saved["fingerprint"].get(name) != now:
                raise UsageError(
                    f"'{path}' was made with {name} {saved['fingerprint'].get(name)}, this run has {now}",
                    "resume with the same, or start a new run from its weights with --weights",
                )
        info = WeightsInfo.from_json(saved["info"])
        load_into(self.model, saved["model"], info, categories=self.info.categories, dataset=self.info.source)
        if self.average is not None:
            load_into(self.average.module, saved["ema"], info)
            self.average.n_averaged.fill_(saved["ema_updates"])
        settings = [{**group, "params": None} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise UsageError(
                f"'{path}' groups parameters otherwise than this run ({error})", "resume with the config of that run"
            ) from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):  # as config.json will say
            group.update({**own, "params": group["params"]})
        if saved.get("scaler"):  # of a run in fp16
            self.scaler.load_state_dict(saved["scaler"])
        self.state = _State(**{**saved["state"], "plateau": Plateau(**saved["state"]["plateau"])})
        self.seconds_before = saved.get("seconds", 0.0)
        say(f"resumed from {path} after step {self.state.step}")

    def take_along(self, earlier: Path) -> None:
        """Brings what belongs to the resumed checkpoint into a new folder; best weights that are lost are forgotten."""
        state = self.state
        if distributed.rank_zero() and earlier.resolve() != self.folder.resolve():
            for name in (self.best_file.name, "metrics.jsonl", "results.json"):
                if (earlier / name).is_file():
                    write_atomically(self.folder / name, (earlier / name).read_bytes())
        if state.best_step > 0 and not distributed.broadcast((earlier / self.best_file.name).is_file()):
            say(f"the best weights, of step {state.best_step}, are not beside the checkpoint", logging.WARNING)
            state.best_step, state.best_value, state.best_metrics = 0, -math.inf, {}
            state.judged = 0  # these weights are evaluated anew if that is due after this step

    def fingerprint(self) -> dict[str, Any]:
        """What must not change when a run is resumed, because the position in the data or the tensors depend on it."""
        return {
            "seed": self.options.seed,
            "processes": distributed.world_size(),
            "accumulation": self.options.accumulate,
            "batch size": self.schedule.batch_size,
            "training images": len(self.train_set),
            "optimizer": self.schedule.optimizer,
            "EMA": self.schedule.ema is not None,
        }

    def announce(self) -> None:
        """Says what is about to happen, and checks that the disk can hold it."""
        schedule, options, model = self.schedule, self.options, self.model
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        bytes_of_model = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        copies = 1 + (1 if schedule.optimizer == "sgd" else 2) + (schedule.ema is not None)
        needed = bytes_of_model * (2 * copies + 2)  # the new and the previous checkpoint, and weights twice
        free = shutil.disk_usage(self.folder).free
        names = [name for _, name in self.train_set.categories]
        images = f"{len(self.train_set)} images, {len(names)} categories ({some(names)})"
        kind = "videos" if hasattr(self.val_set, "videos") else "images"
        held_out = "no validation" if self.val_set is None else f"validation {len(self.val_set)} {kind}"
        kernels = "Triton kernels" if wants_triton(torch.empty(0, device=self.device)) else "ops in plain torch"
        say(f"device {_device_name(self.device)}, {kernels}, {options.precision}, {self.workers} loader workers")
        say(f"data {images}; {held_out}")
        say(
            f"model {learning / 1e6:.2f} M of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters learn"
        )
        say(
            f"batch {schedule.batch_size} = {self.micro_batch} per process x {distributed.world_size()} processes x "
            f"{options.accumulate} accumulated; {schedule.optimizer}, learning rate {schedule.lr:g} ({schedule.policy})"
        )
        say(f"{self.total} steps of {schedule.batch_size} images, {self.total / self.steps_per_epoch:.1f} epochs")
        say(f"disk {needed / 1e6:.0f} MB needed in {self.folder}, {free / 1e6:.0f} MB free")
        if needed > free:
            raise MachineError(
                f"no space for checkpoints in '{self.folder}': {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free",
                "free some space, or give --output a folder on another disk",
            )

    def announce_first_step(self, seconds: float, steps_left: int) -> None:
        pace = f"at that pace {steps_left} more steps take {_duration(seconds * steps_left)}"
        say(
            f"first step took {seconds:.2f} s, peak memory {peak_memory(self.device) / 1e9:.2f} GB; "
            + ("compiling was part of it" if self.options.compile else pace)
        )

    def progress_bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total,
            initial=self.state.step,
            desc="train",
            unit="step",
            disable=not (self.options.progress and distributed.rank_zero()),
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            smoothing=0.05,
        )


def say(message: str, level: int = logging.INFO) -> None:
    """Logs from process 0, above the progress bar if one is shown."""
    if distributed.rank_zero():
        with tqdm.external_write_mode(file=sys.stderr):
            LOG.log(level, message)


_Position = tuple[int, int, Sequence[Tensor], Sequence[Target]]


def _endless(loader: Iterable[Any], sampler: ResumableSampler, epoch: int, batch: int) -> Iterator[_Position]:
    """Epoch after epoch from a position on: (epoch, batches of it taken so far, images, targets)."""
    while True:
        sampler.load_state_dict({"epoch": epoch, "batch": batch})
        for images, targets in loader:
            batch += 1
            yield epoch, batch, images, targets
        epoch, batch = epoch + 1, 0


def _read(losses: dict[str, Tensor], signals: Signals) -> tuple[dict[str, float], bool]:
    """The terms as numbers, averaged over processes, and whether any process was told to stop; one synchronisation."""
    values = torch.stack([value.detach().float() for value in losses.values()])
    if distributed.world_size() == 1:
        return dict(zip(losses, values.tolist(), strict=True)), signals.number is not None
    told = values.new_tensor([float(signals.number is not None)])
    *means, stop = distributed.reduce_mean(torch.cat([values, told])).tolist()
    return dict(zip(losses, means, strict=True)), stop > 0


class _Window:
    """Means of the loss terms since the last row of metrics, and the pace."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.batches = self.images = 0
        self.norms: list[Tensor] = []
        self.started = time.perf_counter()

    def add(self, terms: dict[str, float], images: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.batches += 1
        self.images += images

    def add_norm(self, norm: Tensor) -> None:
        self.norms.append(norm.detach())  # read when the row is written, not now: that would wait for the GPU

    def means(self) -> dict[str, float]:
        means = {name: value / self.batches for name, value in self.sums.items()}
        row = {"loss": sum(means.values()), **means} if means else {}
        if self.norms:
            row["grad_norm"] = float(torch.stack(self.norms).mean())
        row["images_per_second"] = round(self.images / (time.perf_counter() - self.started), 2)
        return row


@contextlib.contextmanager
def _deterministic(options: TrainOptions, device: torch.device) -> Iterator[None]:
    """Same seed, same weights: always on the CPU, where it costs nothing; on a GPU when asked for."""
    if device.type != "cpu" and not options.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextlib.contextmanager
def _explained_out_of_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        now, peak = torch.cuda.memory_allocated(device) / 1e9, torch.cuda.max_memory_allocated(device) / 1e9
        raise MachineError(
            f"GPU memory ran out: {now:.1f} GB in use, {peak:.1f} GB at the peak",
            "add --accumulate 2 (smaller batches, same total), --precision bf16, or a smaller --size",
        ) from error


def _device(options: TrainOptions) -> torch.device:
    device = distributed.pick_device(options.device)
    if device.type == "cuda" and distributed.world_size() > 1:
        return torch.device("cuda", torch.cuda.current_device())  # `distributed.start` chose it
    return device


def _micro_batch(schedule: ScheduleConfig, options: TrainOptions, train_set: InstanceDataset) -> int:
    """Images per process and forward pass."""
    if len(train_set) == 0:
        raise DatasetError("no image is left to train on", "check the annotations; --no-drop-empty keeps empty images")
    parts = distributed.world_size() * options.accumulate
    if schedule.batch_size % parts or schedule.batch_size < parts:
        raise UsageError(
            f"batch size {schedule.batch_size} cannot be divided among {distributed.world_size()} processes x "
            f"{options.accumulate} accumulated batches",
            f"use --batch-size {max(1, round(schedule.batch_size / parts)) * parts}",
        )
    return schedule.batch_size // parts


def _interval(wanted: int | None, schedule: ScheduleConfig, steps_per_epoch: float) -> int:
    """Steps between two events of a kind; 0 for none before the end."""
    if wanted is not None:
        return wanted
    return max(1, round(steps_per_epoch) if schedule.unit == "epochs" else schedule.length // 10)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _synchronised(model: nn.Module, options: TrainOptions) -> nn.Module:
    """The model with its batch norms as `sync_bn` says; parameters and their names stay."""
    if not options.sync_bn or distributed.world_size() == 1:
        return model
    if _device(options).type != "cuda":
        raise UsageError("--sync-bn works between GPUs only, and this run is on the CPU", "leave --sync-bn away")
    synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return synchronised


def _gradients_meet(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Processes exchange gradients only after the last batch of a step."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else contextlib.nullcontext()


def _ema(decay: float) -> Callable[..., None]:
    """Exponential average whose first updates count more: decay rises to its value as (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor) -> None:
        done = int(updates)
        torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + done) / (10 + done)))

    return update


def fraction(value: float) -> str:
    """A metric as people read it; a dash where there was nothing to find, which pycocotools counts as -1."""
    return f"{value:.3f}" if value >= 0 else "-"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}), {distributed.world_size()} processes"
    return f"{device} ({torch.get_num_threads()} threads), {distributed.world_size()} processes"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
