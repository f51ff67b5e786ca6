"""A model for other programs: its network as ONNX or a `torch.export` program, and what decoding needs beside it.

What is exported goes from normalised, padded pixels to the paper's dense outputs: what it says at every location or
anchor, and the maps that masks are made of. Selection, suppression and mask assembly depend on values, not on shapes.
They stay the package's own `decode`, which runs on the outputs of whatever runtime computed them
(`Predictor.from_export`); the few weights that it reads (a mask codec, a box refinement) lie beside the network.

    network.onnx, network.pt2   the network, in one form or both
    decode.safetensors          config, categories, and the weights that decoding reads
    export.json                 inputs and outputs, for people and for programs that do without this package
"""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onestage.config import InputConfig, config_from_dict
from onestage.engine.checkpoint import DECODE, UNPICKLING_ERRORS, WeightsInfo, load_weights, save_weights
from onestage.errors import MachineError, UsageError, WeightsError
from onestage.files import write_atomically
from onestage.method import Method
from onestage.ops.deform import ExportedForm, exported_as
from onestage.structures import Detections

Format = Literal["onnx", "torch"]
Size = tuple[int, int]  # (height, width)

NETWORKS: dict[Format, str] = {"onnx": "network.onnx", "torch": "network.pt2"}
CARD = "export.json"
STRIDES = (8, 16, 32, 64, 128)  # of the levels P3 to P7, input pixels per cell
EXAMPLE = (256, 320)  # input traced where sizes stay open: no level shrinks to one cell, which tracing would fix
MAX_CELLS, MAX_BATCH = 512, 1024  # of open sizes: cells of the padding's multiple, images
# What onnxruntime raises for a file that it cannot read; its exceptions share no class.
ONNX_ERRORS = (
    *("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf"),
    *("NoModel", "NoSuchFile", "NotFound", "NotImplemented", "RuntimeException"),
)
PAIR = 1.0  # detections further apart, px, are not the same one


class DenseNetwork(nn.Module):
    """The part of a model that is exported: normalised, padded pixels [B, 3, H, W] to its dense outputs by name."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        outputs = self.model.dense_outputs(pixels)._asdict()
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


@torch.no_grad()
def export(
    model: Any,
    info: WeightsInfo,
    folder: Path,
    *,
    formats: Sequence[Format] = ("onnx",),
    dynamic: bool = True,
    opset: int = 20,
    deformable: ExportedForm = "operator",
) -> dict[str, Any]:
    """Writes an exported model into `folder`.

    Args:
        model: A paper's model in eval mode, on the CPU, in float32.
        info: What its weights file says; the config in it is the model's.
        folder: There already.
        formats: Which runtimes.
        dynamic: Any number of images, and any size where the recipe has no fixed one; else one image of the config's
            size.
        opset: ONNX's; 19 is the first with deformable convolutions.
        deformable: What deformable convolutions become, see `onestage.ops.deform.exported_as`.

    Returns:
        The content of export.json, and "seconds" of each format.

    Raises:
        MachineError: a library that ONNX needs is missing.
        UsageError: an opset that cannot hold the model.
    """
    if "onnx" in formats:
        need_onnx(info.package)
        if opset < 18:
            raise UsageError(
                f"--opset is {opset}; at least 18 is needed", "use --opset 20, which onnxruntime 1.17 reads"
            )
    config = model.config
    seconds = {}
    start = time.perf_counter()
    with exported_as(deformable):
        program = trace(model, config.input, dynamic)
    tracing = time.perf_counter() - start
    card = _card(info, program, config, formats, dynamic, opset)
    for form in formats:
        start = time.perf_counter()
        if form == "torch":
            torch.export.save(program, folder / NETWORKS["torch"])
        else:
            _write_onnx(program, folder / NETWORKS["onnx"], opset, card)
        seconds[form] = round(tracing + time.perf_counter() - start, 2)
    parts = tuple(f"{part}." for part in model.parts_of_decode)
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(parts)} if parts else {}
    save_weights(folder / DECODE, state, replace(info, config=asdict(config)))
    write_atomically(folder / CARD, (json.dumps(card, indent=2) + "\n").encode())
    return card | {"seconds": seconds}


def trace(model: Any, config: InputConfig, dynamic: bool) -> torch.export.ExportedProgram:
    """The dense network as a program; arguments as for `export`."""
    height, width = example_size(config, dynamic)
    shapes: Any = None
    if dynamic:
        sides: Any = {}
        if has_open_size(config):
            multiple = config.pad_multiple
            rows, columns = (torch.export.Dim(name, min=1, max=MAX_CELLS) for name in ("rows", "columns"))
            sides = {2: multiple * rows, 3: multiple * columns}
        shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH), **sides}}
    pixels = torch.zeros(2 if dynamic else 1, 3, height, width)
    return torch.export.export(DenseNetwork(model).eval(), (pixels,), dynamic_shapes=shapes, strict=False)


def has_open_size(config: InputConfig) -> bool:
    """Whether images of different proportions become inputs of different sizes."""
    return config.resize == "keep_ratio"


def example_size(config: InputConfig, dynamic: bool) -> Size:
    """(height, width) of the input that is traced."""
    if dynamic and has_open_size(config):
        return EXAMPLE
    height, width = (-(-side // config.pad_multiple) * config.pad_multiple for side in config.test_size)
    return height, width


def need_onnx(package: str) -> None:
    """Raises MachineError unless ONNX files can be written and run."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MachineError(
            f"ONNX needs onnx, onnxscript and onnxruntime, and {' and '.join(missing)} {verb} not installed",
            f"pip install './{package}[export]' in the checkout",
        )


def _write_onnx(program: torch.export.ExportedProgram, path: Path, opset: int, card: Mapping[str, Any]) -> None:
    with _quiet():
        converted: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=["pixels"],
            output_names=list(card["outputs"]),
            verbose=False,
        )
    written = converted.model.opset_imports[""]
    if written != opset:  # it gives up and leaves what no runtime reads
        raise UsageError(
            f"--opset is {opset}, which the installed exporter cannot write: it came to {written}", "use --opset 20"
        )
    _name_sizes(converted)
    converted.model.metadata_props["onestage"] = json.dumps(card)
    converted.save(path, external_data=False)


def _name_sizes(converted: Any) -> None:
    """Calls open sizes batch, rows and columns in place of the tracer's symbols."""
    shape = [str(side) for side in converted.model.graph.inputs[0].shape]
    symbols = {name: re.findall(r"\bs\d+\b", shape[axis]) for axis, name in ((0, "batch"), (2, "rows"), (3, "columns"))}
    converted.rename_axes({found[0]: name for name, found in symbols.items() if found})


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and loaders warn of each other's ways, which their user cannot mend."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _card(
    info: WeightsInfo,
    program: torch.export.ExportedProgram,
    config: Any,
    formats: Sequence[Format],
    dynamic: bool,
    opset: int,
) -> dict[str, Any]:
    """What export.json says."""
    rules: InputConfig = config.input
    height, width = example_size(rules, dynamic)
    is_open = dynamic and has_open_size(rules)
    nodes = program.call_spec.out_spec.unflatten(list(program.graph.output_node().args[0]))
    shapes = {name: [_traced(side) for side in node.meta["val"].shape] for name, node in nodes.items()}
    return {
        "format": "onestage-export-1",
        "package": info.package,
        "variant": info.variant,
        "networks": {form: NETWORKS[form] for form in formats},
        "opset": opset if "onnx" in formats else None,
        "input": {
            "name": "pixels",
            "type": "float32",
            "shape": [
                "batch" if dynamic else 1,
                3,
                "height" if is_open else height,
                "width" if is_open else width,
            ],
            "multiple_of": rules.pad_multiple if is_open else None,
            "resize": rules.resize,
            "test_size": list(rules.test_size),
            "antialias": rules.antialias,
            "channel_order": rules.channel_order,
            "mean": list(rules.mean),
            "std": list(rules.std),
            "scale": "0..255, minus mean, over std",
            "padding": "zeros after normalising, at the right and at the bottom",
        },
        "outputs": shapes,
        "outputs_are_for": [2 if dynamic else 1, 3, height, width],
        "strides": list(STRIDES),
        "num_classes": config.num_classes,
        "categories": [list(category) for category in info.categories],
        "weights": info.source,
    }


def _traced(side: Any) -> int:
    """The number that an open side had when it was traced."""
    return side if isinstance(side, int) else int(side.node.hint)


# Running it


def load_exported(
    folder: str | Path,
    *,
    method_of: Callable[[str], Method],
    runtime: Format = "onnx",
    device: torch.device | str = "cpu",
    configured: Callable[[Any], Any] = lambda config: config,
) -> tuple[Any, WeightsInfo]:
    """The model of an exported folder: its `detect` runs the exported network, and the package's own decoding.

    Args:
        folder: What `export` wrote.
        method_of: Package name to its `Method`.
        runtime: "onnx": onnxruntime; "torch": the `torch.export` program, which may do anything that Python can: for
            folders you trust.
        device: Where the network runs.
        configured: What to make of the stored config, for another threshold.

    Raises:
        WeightsError: not such a folder, or damaged.
        MachineError: the runtime or its device is missing.
    """
    folder = Path(folder)
    if not (folder / DECODE).is_file():
        raise WeightsError(f"'{folder}' is no exported model: it has no {DECODE}", "give a folder that export wrote")
    state, info = load_weights(folder / DECODE)
    method = method_of(info.package)
    if method.name != info.package:
        raise WeightsError(
            f"'{folder}' is a model of {info.package}, not of {method.name}",
            f"python -m {info.package}.predict --weights {folder}",
        )
    path = folder / NETWORKS[runtime]
    if not path.is_file():
        raise WeightsError(
            f"'{folder}' has no {path.name}", f"export it: python -m {info.package}.export --format both"
        )
    config: Any = configured(config_from_dict(method.config_type, info.config, f"{folder / DECODE}: config"))
    with torch.device("meta"):
        model: Any = method.build(config)
    parts = tuple(f"{part}." for part in model.parts_of_decode)
    needed = {name for name in model.state_dict() if parts and name.startswith(parts)}
    if needed != set(state):
        raise WeightsError(f"'{folder / DECODE}' holds other weights than decoding needs", "export the model again")
    model.load_state_dict(model.state_dict() | state, assign=True)
    _forget_meta(model)
    network = ExportedNetwork(path, torch.device(device), model.output_type)
    object.__setattr__(model, "raw_outputs", network)
    return model.eval(), info


def _forget_meta(model: nn.Module) -> None:
    """Takes away what lives in the exported network only."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_meta:
                    store[name] = None


class ExportedNetwork:
    """Stands for a model's `raw_outputs`: runs the exported network. Safe in threads; a copy opens the file anew.

    Args:
        path: A network.onnx or network.pt2.
        device: Where it runs; outputs come back there.
        output_type: Named tuple that the model's decoding reads.
    """

    def __init__(self, path: Path, device: torch.device, output_type: type):
        self.path, self.device, self.output_type = path, device, output_type
        self._run = self._open()

    def __call__(self, pixels: Tensor) -> Any:
        """Raw outputs for normalised, padded pixels [B, 3, H, W].

        Raises:
            UsageError: a size or batch that the network was not exported for.
        """
        outputs = self._run(pixels)
        sizes = [tuple(-(-side // stride) for side in pixels.shape[2:]) for stride in STRIDES]
        known: dict[str, Any] = {**outputs, "sizes": sizes}
        fields: tuple[str, ...] = self.output_type._fields  # type: ignore[attr-defined]
        return self.output_type(**{name: known.get(name) for name in fields})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._run = self._open()

    def _open(self) -> Callable[[Tensor], dict[str, Tensor]]:
        return (_open_onnx if self.path.suffix == ".onnx" else _open_program)(self.path, self.device)


def _open_onnx(path: Path, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    if find_spec("onnxruntime") is None:
        raise MachineError(f"'{path}' needs onnxruntime, which is not installed", "pip install onnxruntime")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as reasons

    provider, choice = "CPUExecutionProvider", {}
    if device.type == "cuda":
        provider, choice = "CUDAExecutionProvider", {"device_id": device.index or 0}
    if provider not in onnxruntime.get_available_providers():
        raise MachineError(f"onnxruntime has no {provider}", "pip install onnxruntime-gpu, or use --device cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, choice)])
    except tuple(getattr(reasons, name) for name in ONNX_ERRORS) as error:
        text = _first_line(error)
        if "DeformConv" in text:
            raise MachineError(
                f"onnxruntime {onnxruntime.__version__} has no deformable convolution for this device",
                "export with --opset 20 or --deformable gather, or install a newer onnxruntime",
            ) from error
        raise WeightsError(f"onnxruntime cannot read '{path}': {text}", "export the model again") from error
    names = [output.name for output in session.get_outputs()]
    (given,) = session.get_inputs()

    def run(pixels: Tensor) -> dict[str, Tensor]:
        _check_shape(path, given.shape, pixels.shape)
        values = session.run(None, {given.name: pixels.detach().cpu().numpy()})
        return {name: torch.from_numpy(value).to(device) for name, value in zip(names, values, strict=True)}

    return run


def _open_program(path: Path, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    try:
        with _quiet():
            program = torch.export.load(path)  # a program: torch runs what the file says
    except (*UNPICKLING_ERRORS, OSError) as error:
        raise WeightsError(f"torch cannot read '{path}': {_first_line(error)}", "export the model again") from error
    (given,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    shape = [side if isinstance(side, int) else None for side in given.meta["val"].shape]
    # A guard refuses levels of one cell, which tracing did not see and the graph computes all the same.
    network: Any = program.module(check_guards=False).to(device)

    def run(pixels: Tensor) -> dict[str, Tensor]:
        _check_shape(path, shape, pixels.shape)
        with torch.no_grad():
            outputs: dict[str, Tensor] = network(pixels)
        return outputs

    return run


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_shape(path: Path, wanted: Sequence[Any], given: Sequence[int]) -> None:
    """Compares where `wanted` has numbers."""
    if any(isinstance(side, int) and side != own for side, own in zip(wanted, given, strict=True)):
        shown = " x ".join(str(side) if isinstance(side, int) else "any" for side in wanted)
        raise UsageError(
            f"'{path}' takes pixels of {shown}, this batch is {' x '.join(map(str, given))}",
            "give one image of that size after resizing and padding, or export with --dynamic",
        )


# Comparing


@dataclass(frozen=True)
class Tolerance:
    """Largest differences allowed between a model and what was exported of it."""

    boxes: float = 1e-3  # image pixels
    masks: float = 1e-4  # share of the image's pixels, of each mask
    scores: float = 1e-4


@dataclass(frozen=True)
class Difference:
    """How an exported model differs from the original on a batch.

    Args:
        input_shape: Of the network's pixels.
        detections: How many the original found.
        unpaired: Detections of either without one of the same class within a pixel in the other.
        boxes: Largest difference of a coordinate, image pixels.
        masks: Largest share of the image's pixels by which a mask differs.
        scores: Largest difference.
        outputs: Largest difference of each of the network's outputs, in their units.
    """

    input_shape: tuple[int, ...]
    detections: int
    unpaired: int
    boxes: float
    masks: float
    scores: float
    outputs: dict[str, float]

    def holds(self, tolerance: Tolerance) -> bool:
        return (
            self.unpaired == 0
            and self.boxes <= tolerance.boxes
            and self.masks <= tolerance.masks
            and self.scores <= tolerance.scores
        )


@torch.no_grad()
def compare(model: Any, exported: Any, images: list[Tensor]) -> Difference:
    """Runs both on the same images.

    Args:
        model: The original.
        exported: Of `load_exported`, with the same thresholds.
        images: As for `model.detect`.
    """
    seen: list[Tensor] = []
    with _watched(exported, seen) as raws:
        found = exported.detect(images)
    (pixels,) = seen
    dense = model.dense_outputs(pixels)._asdict()
    other = raws[0]._asdict()
    outputs = {
        name: float((value - other[name]).abs().max()) for name, value in dense.items() if isinstance(value, Tensor)
    }
    pairs = [_difference(ours, theirs) for ours, theirs in zip(model.detect(images), found, strict=True)]
    counts, unpaired, boxes, masks, scores = zip(*pairs, strict=True)
    return Difference(tuple(pixels.shape), sum(counts), sum(unpaired), max(boxes), max(masks), max(scores), outputs)


@contextmanager
def _watched(model: Any, seen: list[Tensor]) -> Iterator[list[Any]]:
    """Collects what goes into a model's network, and what comes out."""
    network, came = model.raw_outputs, []

    def watch(pixels: Tensor) -> Any:
        seen.append(pixels)
        came.append(network(pixels))
        return came[-1]

    object.__setattr__(model, "raw_outputs", watch)
    try:
        yield came
    finally:
        object.__setattr__(model, "raw_outputs", network)


def _difference(ours: Detections, theirs: Detections) -> tuple[int, int, float, float, float]:
    """Of one image: number, unpaired, and the largest differences of boxes, masks and scores."""
    left = list(range(len(theirs)))
    boxes = masks = scores = 0.0
    paired = 0
    for i in range(len(ours)):
        same = [j for j in left if theirs.labels[j] == ours.labels[i]]
        if not same:
            continue
        apart = (theirs.boxes[same] - ours.boxes[i]).abs().amax(1)
        best = int(apart.argmin())
        if not apart[best] <= PAIR:  # nor is NaN
            continue
        j = same[best]
        left.remove(j)
        paired += 1
        boxes = max(boxes, float(apart[best]))
        scores = max(scores, abs(float(theirs.scores[j] - ours.scores[i])))
        if ours.masks is not None and theirs.masks is not None:
            differing = (ours.masks[i].to_bool() != theirs.masks[j].to_bool()).float().mean()
            masks = max(masks, float(differing))
    return len(ours), len(ours) + len(theirs) - 2 * paired, boxes, masks, scores
