"""Every verb's flags as one dataclass, read by tyro; nothing here imports torch.

A flag that changes the model or the recipe (`--variant`, `--size`, `--model.grid`) ends up in the method's frozen
config: see `resolve_config`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from onestage.config import (
    BackboneName,
    Precision,
    ScheduleConfig,
    config_from_dict,
    of_length,
    rescaled,
    resized,
    with_field,
)
from onestage.errors import UsageError
from onestage.method import Method

Flags = TypeVar("Flags")
Switch = FlagCreatePairsOff[bool]  # --x without a --no-x


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What the program says."""

    json: Switch = False  # last line of stdout is one JSON object; people read stderr
    quiet: Annotated[Switch, arg(aliases=["-q"])] = False  # errors and warnings only
    verbose: Annotated[Switch, arg(aliases=["-v"])] = False  # details, and tracebacks of errors


@dataclass(frozen=True, kw_only=True)
class Common(Talk):
    """What every verb that computes knows."""

    output: Path | None = None  # run folder, default runs/<package>/<verb>/<time>
    overwrite: Switch = False  # write into an --output that is not empty
    device: str = "auto"  # auto, cpu, cuda, cuda:1; auto = a GPU if there is one
    precision: Precision = "fp32"  # bf16, fp16: autocast; training in fp16 scales its loss
    seed: int = 0
    config: Path | None = None  # a run's config.json: its settings become the defaults
    print_config: Switch = False  # print the resolved settings as JSON on stdout and stop
    dry_run: Switch = False  # check everything that can be checked without computing, and stop


@dataclass(frozen=True, kw_only=True)
class Reading(Common):
    """What verbs that go through a data set know besides."""

    workers: int | None = None  # processes that read images; default: none on a small CPU
    limit: int | None = None  # use the first N images only


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set in COCO format: a folder, or the files themselves."""

    data: Path | None = None  # folder in one of the layouts of the README; default: COCO_ROOT
    val_json: Path | None = None  # with --val-images, in place of --data
    val_images: Path | None = None
    on_bad_sample: Literal["raise", "skip"] = "raise"  # skip: count and list unreadable images, go on
    max_pixels: float = 100e6  # refuse larger images, height * width


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which configuration."""

    variant: str | None = None  # named configuration
    small: Switch = False  # the variant that trains on a laptop
    backbone: BackboneName | None = None  # short for --model.backbone.name
    size: int | None = None  # network input, shorter side in px; the longer side keeps its proportion


@dataclass(frozen=True, kw_only=True)
class Demo(Reading):
    """Trains a small configuration on generated shapes, evaluates it and writes a page. Needs no data, no network."""

    deterministic: bool = False  # a GPU, too, uses algorithms that repeat their result; warns where there is none
    steps: int | None = None  # optimiser steps
    batch_size: int | None = None  # images per optimiser step; learning rate and steps change along


@dataclass(frozen=True, kw_only=True)
class Train(Model, Data, Reading):
    """Trains on a data set in COCO format."""

    deterministic: bool = False  # a GPU, too, uses algorithms that repeat their result; warns where there is none
    train_json: Path | None = None  # with --train-images, in place of --data
    train_images: Path | None = None
    schedule: str | None = None  # take the schedule of this variant
    weights: Path | None = None  # start from these weights (.safetensors or last.ckpt)
    weights_backbone: str | None = None  # ImageNet start: a local file, or IMAGENET1K_V1 to download torchvision's
    head: Literal["match", "reinit"] = "match"  # reinit: with --weights, keep the trunk and start a new head
    resume: str | None = None  # auto (or nothing) = the newest run; or a last.ckpt
    epochs: int | None = None  # length in epochs; milestones move along
    steps: int | None = None  # length in optimiser steps; milestones move along
    batch_size: int | None = None  # images per optimiser step, over all processes and --accumulate
    accumulate: int = 1  # forward passes per optimiser step
    compile: Switch = False  # torch.compile the network (not the losses)
    sync_bn: Switch = False  # batch norms that learn take their statistics from all GPUs
    autoscale: bool = True  # another --batch-size changes learning rate and steps as the recipe would
    ema: float | None = None  # decay of averaged weights
    grad_clip: float | None = None  # largest global norm of the gradients
    drop_empty: Switch = False  # leave out images without annotations
    eval_every: int | None = (
        None  # steps between evaluations; default: an epoch or a tenth of --steps; 0: only at the end
    )
    save_every: int | None = None  # steps between checkpoints; default: as above; 0: at the end only
    log_every: int = 20  # steps between rows of metrics
    log: tuple[Literal["tensorboard"], ...] = ()  # where rows of metrics go besides metrics.csv and metrics.jsonl
    nan_policy: Literal["stop", "skip"] = "stop"  # what a loss that is not finite does
    overfit: int | None = None  # learn the first N training images by heart: no augmentation, evaluated on themselves
    replay: Path | None = None  # repeat the step that a crash-<step>.pt holds


@dataclass(frozen=True, kw_only=True)
class Eval(Model, Data, Reading):
    """AP of weights on a data set, or of a results file, exactly as pycocotools counts it."""

    weights: Path | None = None  # .safetensors or last.ckpt
    results: Path | None = None  # a COCO results file to evaluate in place of a model
    seeds: tuple[Path, ...] = ()  # in place of --weights, those of several trainings: mean and spread of their AP
    per_class: bool = False  # AP of each category too
    iou_types: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm")
    max_dets: tuple[int, int, int] = (1, 10, 100)  # detections per image that AR counts; the last one for AP
    backend: Literal["pycocotools", "faster-coco-eval"] = "pycocotools"  # equal numbers; the second is quicker
    tta: Switch = False  # test-time augmentation: look at mirror images too, and merge what both have by NMS
    score_thr: float | None = None  # short for --model.inference.score-threshold
    batch_size: int = 1  # images at once


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Finds instances in images, or in the frames of a video: pictures, COCO JSON, masks."""

    # files, folders, patterns in quotes; - reads a list from stdin; or one video, or the number of a camera
    source: Positional[tuple[str, ...]] = ()
    weights: Path | None = None  # .safetensors, last.ckpt or a folder that export wrote (required)
    score_thr: float = 0.3  # leave out instances below this score
    max_dets: int | None = None  # at most so many instances per image
    classes: tuple[str, ...] = ()  # only these categories, by name
    save: tuple[Literal["image", "json", "masks", "video"], ...] = ("image", "json")  # of a video: video json
    mask_format: Literal["rle", "polygon", "png"] = "rle"  # in the JSON; png: files, one per instance
    max_pixels: float = 100e6  # refuse larger images from their header
    limit: int | None = None  # use the first N images only
    skip_existing: Switch = False  # leave out images that --output already has
    shard: str = "0/1"  # I/N: every N-th image starting with image I, for N machines
    stride: int = 1  # every n-th image or frame
    track: Switch = False  # follow objects through a video; of packages with the verb track, and the same as that
    show: Switch = False  # open what was drawn in the system's viewer


@dataclass(frozen=True, kw_only=True)
class Export(Model, Common):
    """Writes the network for other runtimes (ONNX, torch.export), runs it there and compares."""

    weights: Path | None = None  # .safetensors or last.ckpt; default: random parameters, to measure a runtime with
    format: Literal["onnx", "torch", "both"] = "onnx"
    dynamic: bool = True  # any number of images, and any size where the recipe has no fixed one
    opset: int = 20  # ONNX's
    deformable: Literal["operator", "gather"] = "operator"  # gather: for runtimes without deformable convolutions
    check: bool = True  # run what was written and compare it with the model
    image: tuple[str, ...] = ()  # picture files to compare on; default: generated ones
    tolerance: tuple[float, float, float] = (1e-3, 1e-4, 1e-4)  # allowed: boxes in px, share of mask pixels, scores


@dataclass(frozen=True, kw_only=True)
class Convert(Talk):
    """Turns an official checkpoint into our weights; every tensor is accounted for."""

    from_: Annotated[Path | None, arg(name="from")] = None  # the checkpoint (required)
    to: Path | None = None  # the .safetensors to write (required)
    variant: str | None = None  # its configuration; default: told from the tensors
    map: Switch = False  # list what became of each tensor
    verify: Switch = False  # read the file back, compare every tensor and the model's outputs
    overwrite: Switch = False  # replace an existing file


@dataclass(frozen=True, kw_only=True)
class Benchmark(Model, Common):
    """Latency by stage, memory, instances per image, on random images of one size."""

    weights: Path | None = None  # default: random parameters, made to find as many instances as allowed
    image_size: tuple[int, int] | None = None  # height, width of the images; default: the network's
    batch: int = 1
    warmup: int = 2
    iters: int = 10
    compare: Literal["none", "maskrcnn"] = "none"  # maskrcnn: torchvision's, R-50, interleaved, same output form
    mode: Literal["eager", "compile", "graph"] = "eager"  # how the network runs; graph: as a CUDA graph
    channels_last: Switch = False  # weights and pixels in that order


@dataclass(frozen=True, kw_only=True)
class Info(Talk):
    """Model card of a weights file; without a file, the variants of this package."""

    file: Positional[Path | None] = None  # .safetensors or last.ckpt


VERBS: dict[str, type[Talk]] = {
    "demo": Demo,
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "export": Export,
    "convert": Convert,
    "benchmark": Benchmark,
    "info": Info,
}
WITH_VARIANT = ("train", "eval", "export", "benchmark")
WITH_MODEL = ("demo", "train", "eval", "export", "benchmark")  # verbs with --model.*
WITH_OPTIM = ("demo", "train")  # verbs with --optim.*
# Flags that a config.json does not carry: they belong to one call, or the config has what they mean.
PER_CALL = {"json", "quiet", "verbose", "output", "overwrite", "config", "print_config", "dry_run", "resume", "replay"}
IN_TRAINING = {"epochs", "steps", "batch_size", "ema", "grad_clip", "drop_empty"}
IN_CONFIG = {"model", "optim", "variant", "small", "backbone", "size", "schedule", "score_thr"}
# What a number may be, wherever a verb or a config has a flag of that name.
RANGES = dict.fromkeys(("accumulate", "batch", "batch_size", "image_size", "iters", "limit"), (1, math.inf))
RANGES |= dict.fromkeys(("log_every", "max_dets", "max_pixels", "overfit", "stride"), (1, math.inf))
RANGES |= dict.fromkeys(("grid", "length", "max_detections", "num_classes", "pad_multiple", "test_size"), (1, math.inf))
RANGES |= dict.fromkeys(("eval_every", "save_every", "warmup", "warmup_steps", "workers"), (0, math.inf))
RANGES |= dict.fromkeys(("clip_norm", "grad_clip", "lr", "weight_decay"), (0, math.inf))
RANGES |= dict.fromkeys(("ema", "momentum", "score_thr", "score_threshold"), (0, 1))
RANGES |= dict.fromkeys(("per_category", "pictures", "top"), (0, math.inf))
RANGES["frozen_stages"] = (0, 5)
RANGES["seed"] = (0, 2**63 - 1)  # torch's and NumPy's generators take these
LIKE = 0.6  # how much of an unknown flag has to be in the nearest one for that to be proposed


@dataclass(frozen=True)
class Call:
    """A parsed command line.

    Args:
        verb: Name of the verb.
        flags: The verb's flags.
        given: Dotted names of the flags that stood on the command line, as in `model.grid`.
        config: The method's resolved config, or None for a verb without one. Weights bring their own: see
            `on_top_of`.
    """

    verb: str
    flags: Any
    given: frozenset[str]
    config: Any

    def on_top_of(self, config: Any) -> Any:
        """`config`, which weights brought along, with the model flags of this command line."""
        for name in sorted(self.given):
            if name.startswith(("model.", "optim.")):
                config = with_field(config, _config_path(name), _get(self.config, _config_path(name)))
        return _shortcuts(config, self)

    def settings(self) -> dict[str, Any]:
        """What a run's config.json keeps of the flags."""
        left_out = PER_CALL | IN_CONFIG | (IN_TRAINING if self.verb in WITH_OPTIM else set())
        values = {entry.name: getattr(self.flags, entry.name) for entry in fields(self.flags)}
        return {name: _plain(value) for name, value in values.items() if name not in left_out}


def parse(method: Method, verb: str, argv: Sequence[str]) -> Call:
    """Reads a verb's command line; `--help` prints and exits as usual.

    Raises:
        UsageError: an unknown flag, a value that does not fit, a variant or file that is not there.
    """
    argv = _complete_resume(list(argv)) if verb == "train" else list(argv)
    program = f"python -m {method.name}.{verb}"
    defaults, base = _defaults(method, verb, argv)
    flags, given = _read(defaults, argv, program)
    if verb not in WITH_MODEL:
        return Call(verb, flags, given, None)
    schedule = flags.optim if verb in WITH_OPTIM else base.schedule
    values = {f.name: getattr(flags.model, f.name) for f in fields(flags.model)}
    call = Call(verb, flags, given, method.config_type(**values | {"schedule": schedule}))
    return replace(call, config=_shortcuts(call.config, call))


def parse_flags(kind: type[Flags], argv: Sequence[str], program: str) -> Flags:
    """Reads the flags of a paper's own verb into its dataclass, with the same errors as the common verbs.

    Args:
        kind: A frozen dataclass, usually derived from `Talk`; every field has a default.
        argv: The command line after the verb.
        program: How the verb is called, as in `python -m package.verb`.
    """
    return _read(kind(), list(argv), program)[0]


def read_settings(path: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        UsageError: not there, or not such a file.
    """
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"config '{path}' does not exist", "give a config.json of a run folder")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"config '{path}' is not JSON: {error}", "give a config.json of a run folder") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise UsageError(f"config '{path}' has no 'model'", "give a config.json of a run folder")
    return settings


def _complete_resume(argv: list[str]) -> list[str]:
    """`--resume` alone means `--resume auto`; tyro knows no optional value."""
    completed = []
    for position, word in enumerate(argv):
        completed.append(word)
        if word == "--resume" and (position + 1 == len(argv) or argv[position + 1].startswith("-")):
            completed.append("auto")
    return completed


def _defaults(method: Method, verb: str, argv: list[str]) -> tuple[Any, Any]:
    """The flags' defaults, which --variant, --schedule and --config decide, and the config they stand for."""
    flags_type = VERBS[verb]
    file = _peek(argv, "--config")
    values: dict[str, Any] = {}
    variant = _peek(argv, "--variant")
    if variant is None and "--small" in argv:
        variant = method.small_variant
    if verb == "train" and file is None and variant is None:  # with a variant, the whole command was typed again
        file = _config_of_resumed(method, argv)
    usual = method.demo_variant if verb == "demo" else method.default_variant
    if file is not None:
        settings = read_settings(Path(file))
        if variant is not None:
            raise UsageError(
                f"--config '{file}' and a variant both name the whole configuration", "leave one of the two away"
            )
        if settings.get("package", method.name) != method.name:
            raise UsageError(
                f"config '{file}' belongs to {settings['package']}, not to {method.name}",
                f"use it with: python -m {settings['package']}.{verb}",
            )
        base: Any = config_from_dict(method.config_type, settings["model"], f"{file}: model")
        variant = settings.get("variant")
        if settings.get("verb") == verb:
            values = dict(settings.get("flags", {}))
    else:
        base = _variant(method, variant or usual)
    schedule = _peek(argv, "--schedule")
    if schedule is not None:
        base = replace(base, schedule=_variant(method, schedule).schedule)
    if verb in WITH_VARIANT:
        values["variant"] = variant if variant in method.variants else usual
    flags = config_from_dict(flags_type, values, f"{file}: flags")
    return _with_model(flags, verb, method, base), base


def _config_of_resumed(method: Method, argv: list[str]) -> str | None:
    resume = _peek(argv, "--resume")
    if resume is None:
        return None
    from onestage.cli.runs import checkpoint_to_resume

    output = _peek(argv, "--output")
    checkpoint = checkpoint_to_resume(method.name, resume, Path(output) if output else None)
    settings = checkpoint.with_name("config.json")
    if not settings.is_file():
        raise UsageError(
            f"checkpoint '{checkpoint}' has no config.json beside it",
            "put that of its run there, or repeat the flags of its training, --variant among them",
        )
    return str(settings)


def _with_model(flags: Any, verb: str, method: Method, base: Any) -> Any:
    """The same flags plus --model.* and --optim.*, whose defaults are `base`, and --variant with its choices."""
    extra: list[Any] = []
    values = {f.name: getattr(flags, f.name) for f in fields(flags)}
    if verb in WITH_VARIANT:
        names: Any = Literal[tuple(method.variants)]
        help_text = "named configuration; weights and --config bring their own"
        extra.append(("variant", Annotated[names, arg(help=help_text)], values["variant"]))
    if verb in WITH_MODEL:
        model_type = _model_flags(method.config_type)
        model = model_type(**{f.name: getattr(base, f.name) for f in fields(base)})
        extra.append(("model", model_type, field(default=model)))
        values["model"] = model
    if verb in WITH_OPTIM:
        extra.append(("optim", ScheduleConfig, field(default=base.schedule)))
        values["optim"] = base.schedule
    if not extra:
        return flags
    kind = type(flags)
    full = make_dataclass(
        kind.__name__, extra, bases=(kind,), frozen=True, kw_only=True, namespace={"__doc__": kind.__doc__}
    )
    full.__module__ = kind.__module__
    return full(**values)


def _model_flags(config_type: type) -> type:
    """The method's config without its schedule, which has its own flags (--optim.*)."""
    hidden = tyro.conf.Suppress[tyro.conf.Fixed[ScheduleConfig]]
    made = make_dataclass(
        config_type.__name__,
        [("schedule", hidden, field(default_factory=ScheduleConfig))],
        bases=(config_type,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": "The model; what weights bring along unless a flag stands here."},
    )
    made.__module__ = config_type.__module__
    return made


def _read(defaults: Any, argv: list[str], program: str) -> tuple[Any, frozenset[str]]:
    """The flags, and the dotted names of those that stood on the command line."""
    kind = type(defaults)
    given = frozenset(_given(argv, dict(_flag_names(kind)), program))
    flags = _run_tyro(kind, defaults, argv, program)
    _check_ranges(flags)
    return flags, given


def _check_ranges(flags: Any, group: str = "") -> None:
    for entry in fields(flags):
        values, name = getattr(flags, entry.name), f"{group}{entry.name}".replace("_", "-")
        if is_dataclass(values):
            _check_ranges(values, f"{name}.")
        if entry.name not in RANGES:
            continue
        least, most = RANGES[entry.name]
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, int | float) and not least <= value <= most:
                limit = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
                raise UsageError(f"--{name} is {value}", f"give {limit}")


def _run_tyro(kind: type, defaults: Any, argv: list[str], program: str) -> Any:
    is_help = "-h" in argv or "--help" in argv
    said = io.StringIO()
    was_enabled = gc.isenabled()
    gc.disable()  # tyro makes syntax trees of all sources: a tenth of its time would go into looking for garbage
    try:
        if is_help:
            return tyro.cli(kind, prog=program, description=kind.__doc__, default=defaults, args=["--help"])
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, description=kind.__doc__, default=defaults, args=argv)
    except SystemExit as stopped:
        if is_help:
            raise
        raise UsageError(_plain_message(said.getvalue()), f"{program} --help lists every flag") from stopped
    finally:
        if was_enabled:
            gc.enable()


def _plain_message(box: str) -> str:
    """The sentence inside the frame that tyro draws."""
    inside = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    sentence = []
    for line in inside:
        if set(line) == {"─"}:
            break
        sentence.append(line)
    text = " ".join(sentence).removeprefix("Error parsing ").strip()
    misread = re.fullmatch(r"(.*): no type matching (?:\{None\}\|)?(.*) could be .* from \['(.*?)'\].*", text)
    if misread is not None:  # what it tried, type by type, is of no use
        return "{0} is '{2}'; expected {1}".format(*misread.groups())
    return text[:1].lower() + text[1:].rstrip(".")


def _given(argv: Sequence[str], known: dict[str, str], program: str) -> list[str]:
    """Dotted names of the flags on the command line; unknown ones are refused with the nearest name."""
    given = []
    for word in argv:
        if word == "--":
            break
        if not word.startswith("--") and not re.match(r"-[a-z]\w", word):  # -data, but neither -q nor -1
            continue
        name = word.split("=", 1)[0].replace("_", "-")
        if name not in known:
            nearest = max(known, key=lambda flag: _likeness(name, flag))
            if _likeness(name, nearest) < LIKE:
                raise UsageError(f"unknown flag '{name}'", f"{program} --help lists every flag")
            raise UsageError(f"unknown flag '{name}'; nearest: '{nearest}'", f"use {nearest}, or see: {program} --help")
        given.append(known[name])
    return given


def _likeness(name: str, flag: str) -> float:
    name, flag = name.lstrip("-"), flag.lstrip("-")
    last = flag.rpartition(".")[2]
    return max(SequenceMatcher(None, name, flag).ratio(), SequenceMatcher(None, name, last).ratio() - 0.01)


def _flag_names(kind: type, prefix: str = "") -> list[tuple[str, str]]:
    """(flag, dotted field name) of everything tyro makes of the dataclass."""
    names = [("--help", "help")] if not prefix else []
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        if Positional in getattr(marked[entry.name], "__metadata__", ()):
            continue  # an argument without a flag
        hint, flag = hints[entry.name], entry.name.rstrip("_").replace("_", "-")
        if is_dataclass(hint):
            if not (prefix and entry.name == "schedule"):
                names += _flag_names(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
            continue
        dotted = prefix + entry.name
        group = prefix.replace("_", "-")
        names.append((f"--{group}{flag}", dotted))
        if hint is bool:
            names.append((f"--{group}no-{flag}", dotted))
    return names


def _names(kind: type) -> set[str]:
    return {f.name for f in fields(kind)}


def _peek(argv: Sequence[str], flag: str) -> str | None:
    """Value of a flag that decides the defaults of others and so has to be known before they are parsed."""
    for position, word in enumerate(argv):
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
        if word == flag and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _variant(method: Method, name: str) -> Any:
    if name not in method.variants:
        nearest = max(method.variants, key=lambda known: SequenceMatcher(None, name, known).ratio())
        raise UsageError(f"unknown variant '{name}'; nearest: '{nearest}'", f"use one of: {', '.join(method.variants)}")
    return method.variants[name]


def _shortcuts(config: Any, call: Call) -> Any:
    """Applies the short flags that stand for one or several fields of the config."""
    flags = call.flags

    def value(name: str) -> Any:
        return getattr(flags, name, None)

    if value("backbone") is not None:
        config = with_field(config, "backbone.name", flags.backbone)
    if value("size") is not None:
        config = replace(config, input=resized(config.input, flags.size))
    if value("score_thr") is not None and "score_threshold" in _names(type(config.inference)):
        config = with_field(config, "inference.score_threshold", flags.score_thr)
    if call.verb in WITH_OPTIM:
        config = replace(config, schedule=_schedule(config.schedule, call))
    return config


def _schedule(schedule: ScheduleConfig, call: Call) -> ScheduleConfig:
    flags = call.flags
    batch_size = getattr(flags, "batch_size", None)
    if batch_size is not None:
        if getattr(flags, "autoscale", True):
            chosen = {f.name for f in fields(schedule) if f"optim.{f.name}" in call.given}
            kept = {name: getattr(schedule, name) for name in chosen}
            schedule = replace(rescaled(schedule, batch_size), **kept)
        schedule = replace(schedule, batch_size=batch_size)
    epochs, steps = getattr(flags, "epochs", None), flags.steps
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps both say how long to train", "leave one of the two away")
    length = steps if epochs is None else epochs
    if length is not None:
        schedule = of_length(schedule, length, "steps" if epochs is None else "epochs")
    if getattr(flags, "ema", None) is not None:
        schedule = replace(schedule, ema=flags.ema)
    if getattr(flags, "grad_clip", None) is not None:
        schedule = replace(schedule, clip_norm=flags.grad_clip)
    if getattr(flags, "drop_empty", False):
        schedule = replace(schedule, drop_empty=True)
    return schedule


def _config_path(dotted: str) -> str:
    group, _, rest = dotted.partition(".")
    return f"schedule.{rest}" if group == "optim" else rest


def _get(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
