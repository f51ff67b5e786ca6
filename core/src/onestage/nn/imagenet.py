"""ImageNet weights for a trunk: torchvision's by name, and the MSRA/caffe files of older recipes by path.

Every tensor of a file is used or named; nothing is downloaded unless a weight name asks for it.
"""

import os
import re
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor
from torchvision.models import WeightsEnum

from onestage.engine.checkpoint import read_state_dict
from onestage.errors import MachineError, WeightsError, some
from onestage.nn.resnet import ResNet


def load_imagenet(backbone: ResNet, source: str | Path | WeightsEnum, *, progress: bool = False) -> list[str]:
    """Loads ImageNet weights into a trunk.

    Args:
        backbone: Changed in place.
        source: A local file (torchvision's or mmdetection's .pth, detectron's or detectron2's .pkl) or one of
            torchvision's weights, by name, "IMAGENET1K_V1", or as the member of their enum; only these download, into
            torch's cache.
        progress: Show a bar on stderr while downloading.

    Returns:
        Notes on what was left out, folded or kept at its initialisation, one line each.

    Raises:
        WeightsError: no such weights, or tensors that are missing, left over or of another shape.
        MachineError: a download that is forbidden (ONESTAGE_OFFLINE=1) or fails.
    """
    is_file = not isinstance(source, WeightsEnum) and Path(source).is_file()
    path = Path(source) if is_file else _download(backbone.config.name, source, progress)
    state, notes = rename_imagenet(read_state_dict(path))
    notes += _complete(state, backbone)
    ours = backbone.state_dict()
    missing = sorted(ours.keys() - state.keys())
    foreign = sorted(state.keys() - ours.keys())
    reshaped = [name for name in ours.keys() & state.keys() if ours[name].shape != state[name].shape]
    for problem, names in (("lack", missing), ("have unknown", foreign), ("have other shapes of", sorted(reshaped))):
        if names:
            raise WeightsError(
                f"weights '{path}' {problem} {some(names)}: not those of {backbone.config.name}",
                f"give ImageNet weights of {backbone.config.name}",
            )
    backbone.load_state_dict(state)
    return notes


def rename_imagenet(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Torchvision's names for the tensors of any of the known layouts; unknown names stay as they are.

    The classifier and optimiser momenta are left out. Biases of convolutions, which some MSRA files carry, move into
    the norm behind them, where they shift the mean.

    Args:
        state: Tensors by their name in the file.

    Returns:
        Tensors by their name in our trunk, and notes.
    """
    renamed: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in state.items():
        if _CLASSIFIER.fullmatch(name) or name.endswith("_momentum"):
            dropped.append(name)
        else:
            renamed[_rename(name)] = tensor.float() if tensor.is_floating_point() else tensor
    notes = [f"left out {some(sorted(dropped))}"] if dropped else []
    folded = [name for name in renamed if _CONV_BIAS.fullmatch(name)]
    for name in folded:
        bias = renamed.pop(name)
        norm = _norm_behind(name.removesuffix(".bias"))
        renamed[f"{norm}.running_mean"] = renamed.get(f"{norm}.running_mean", torch.zeros_like(bias)) - bias
    if folded:
        notes.append(f"folded {some(sorted(folded))} into the norms")
    return renamed, notes


_CLASSIFIER = re.compile(r"(fc|fc1000|pred|stem\.fc|linear)[._](weight|bias|w|b)")
_CONV_BIAS = re.compile(r"(conv1|layer\d\.\d+\.(conv\d|downsample\.0))\.bias")
_CAFFE2_STEM = re.compile(r"(?:res_)?conv1_(bn_)?(w|b|s|rm|riv)")
_CAFFE2_BLOCK = re.compile(r"res(\d)_(\d+)_branch(1|2a|2b|2c)_(bn_)?(w|b|s|rm|riv)")
_DETECTRON2 = re.compile(r"(?:backbone\.bottom_up\.)?(?:stem|res(\d)\.(\d+))\.(conv\d|shortcut)(\.norm)?\.(\w+)")
_CAFFE2_FIELDS = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}
_CAFFE2_CONVS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}


def _rename(name: str) -> str:
    if stem := _CAFFE2_STEM.fullmatch(name):
        return _our_name("", "conv1", stem[1] is not None, _CAFFE2_FIELDS[stem[2]])
    if block := _CAFFE2_BLOCK.fullmatch(name):
        prefix = f"layer{int(block[1]) - 1}.{block[2]}."
        return _our_name(prefix, _CAFFE2_CONVS[block[3]], block[4] is not None, _CAFFE2_FIELDS[block[5]])
    if match := _DETECTRON2.fullmatch(name):
        prefix = f"layer{int(match[1]) - 1}.{match[2]}." if match[1] else ""
        return _our_name(prefix, match[3], match[4] is not None, match[5])
    return name


def _our_name(prefix: str, conv: str, is_norm: bool, field: str) -> str:
    module = "downsample.0" if conv == "shortcut" else conv
    return f"{_norm_behind(prefix + module) if is_norm else prefix + module}.{field}"


def _norm_behind(conv: str) -> str:
    """`layer1.0.conv1` to `layer1.0.bn1`, `downsample.0` to `downsample.1`."""
    return conv.removesuffix("0") + "1" if conv.endswith("downsample.0") else conv.replace("conv", "bn")


def _complete(state: dict[str, Tensor], backbone: ResNet) -> list[str]:
    """Adds what files may rightly lack; returns notes."""
    notes = []
    ours = backbone.state_dict()
    without_statistics = [name for name in ours if name.endswith(".running_var") and name not in state]
    for name in without_statistics:
        # Their norms are a scale and a shift: a variance of 1 - eps makes ours exactly that.
        state[name] = torch.full_like(ours[name], 1.0 - backbone.bn1.eps)
        state.setdefault(name.replace("running_var", "running_mean"), torch.zeros_like(ours[name]))
    if without_statistics:
        notes.append("norms have no statistics in the file: they are a scale and a shift")
    offsets = [name for name in ours if ".conv_offset." in name and name not in state]
    if offsets:
        notes.append(f"kept the initialisation of {some(offsets)}")
    counters = [name for name in ours if name.endswith("num_batches_tracked")]
    state.update({name: ours[name] for name in offsets + counters if name not in state})
    return notes


def _download(model: str, wanted: str | Path | WeightsEnum, progress: bool) -> Path:
    """The local file of one of torchvision's weights."""
    known = list(torchvision.models.get_model_weights(model))
    found = [entry for entry in known if str(wanted) in (entry.name, str(entry))]
    if not found:
        names = sorted(entry.name for entry in known)
        raise WeightsError(
            f"no file '{wanted}', and torchvision has no such weights of {model} (it has {some(names)})",
            "give an existing file or one of these names",
        )
    name, url = found[0].name, found[0].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    if os.environ.get("ONESTAGE_OFFLINE", "") == "1":
        raise MachineError(
            f"weights {name} of {model} are not in {path.parent}, and ONESTAGE_OFFLINE=1 forbids downloads",
            f"copy {url} to {path}, or unset ONESTAGE_OFFLINE",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = re.search(r"-([a-f0-9]{8,})\.", path.name)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest[1] if digest else None, progress=progress)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the hash does not fit
        raise MachineError(f"cannot download {url}: {error}", f"copy it to {path} by other means") from error
    return path
