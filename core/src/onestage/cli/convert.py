"""`convert`: an official checkpoint becomes our weights."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestage.cli.flags import Call
from onestage.config import config_from_dict
from onestage.engine.checkpoint import WeightsInfo, load_weights, read_state_dict, save_weights
from onestage.errors import CheckFailed, UsageError, WeightsError, some
from onestage.files import file_digest
from onestage.method import Method

logger = logging.getLogger("onestage")


def run(method: Method, call: Call) -> dict[str, Any]:
    """Converts `--from` to `--to`; `--verify` reads the result back and compares tensors and outputs."""
    flags = call.flags
    source, target = _paths(method, flags.from_, flags.to, flags.overwrite)
    foreign = read_state_dict(source, package=method.name)
    if method.convert is None or method.infer_config is None:
        raise WeightsError(
            f"there are no official weights of {method.title.partition(':')[0]}: {method.unreleased}"
            f" (this file's first key is {min(foreign)})",
            f"train your own with python -m {method.name}.train; weights it wrote need no conversion",
        )
    config = method.infer_config(foreign) if flags.variant is None else _variant(method, flags.variant)
    state, notes = method.convert(foreign, config)
    model = method.build(config)
    model.load_state_dict(state, strict=True)
    variant = flags.variant or next((name for name, value in method.variants.items() if value == config), "")
    info = WeightsInfo(
        package=method.name,
        variant=variant,
        config=asdict(config),
        categories=coco_categories() if config.num_classes == 80 else _numbered(config.num_classes),
        recipe=f"converted from the authors' {source.name}",
        source=source.name,
        source_sha256=file_digest(source),
    )
    save_weights(target, model.state_dict(), info)
    logger.info("%d tensors of %s became %d of %s", len(foreign), source, len(state), target)
    logger.info("configuration: %s", variant or f"one of its own; see: python -m {method.name}.info {target}")
    for note in notes:
        logger.info("note: %s", note)
    if flags.map:
        for name, tensor in state.items():
            logger.info("  %-60s %s", name, list(tensor.shape))
    if flags.verify:
        count = _verify(method, model, config, target)
        logger.info("verified: every tensor and %d detections in a random image are the same after reading back", count)
    return {
        "to": str(target),
        "variant": variant,
        "tensors_read": len(foreign),
        "tensors_written": len(state),
        "notes": notes,
        "source_sha256": info.source_sha256,
        "verified": flags.verify,
    }


def coco_categories() -> tuple[tuple[int, str], ...]:
    """(id, name) of COCO's 80 categories; their ids have gaps."""
    from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # indexed by COCO's id
    return tuple((number, name) for number, name in enumerate(names) if name not in ("__background__", "N/A"))


def _paths(method: Method, source: Path | None, target: Path | None, overwrite: bool) -> tuple[Path, Path]:
    if source is None or target is None:
        raise UsageError(
            f"{'--from' if source is None else '--to'} is missing",
            f"python -m {method.name}.convert --from checkpoint.pth --to weights.safetensors",
        )
    if target.suffix != ".safetensors":
        raise UsageError(f"--to '{target}' does not end in .safetensors", f"--to {target.with_suffix('.safetensors')}")
    if target.exists() and not overwrite:
        raise UsageError(f"--to '{target}' exists", "add --overwrite to replace it, or name another file")
    return source, target


def _variant(method: Method, name: str) -> Any:
    if name not in method.variants:
        raise UsageError(f"unknown variant '{name}'", f"use one of: {', '.join(method.variants)}")
    return method.variants[name]


def _numbered(num_classes: int) -> tuple[tuple[int, str], ...]:
    return tuple((number, f"class {number}") for number in range(num_classes))


def _verify(method: Method, model: nn.Module, config: Any, target: Path) -> int:
    """Compares `model` with one that is built anew from the file: every tensor, and detections on a random image.

    Returns:
        How many detections were compared.
    """
    state, info = load_weights(target, package=method.name)
    ours = model.state_dict()
    differing = [name for name in ours if name not in state or not torch.equal(ours[name], state[name])]
    if differing or state.keys() - ours.keys():
        raise CheckFailed(f"'{target}' reads back differently: {some(differing)}", "convert again, on another disk")
    stored: Any = config_from_dict(method.config_type, info.config, f"{target}: config")
    if stored != config:
        raise CheckFailed(f"'{target}' reads back with another configuration", "report this as a bug")
    again = method.build(stored)
    again.load_state_dict(state, strict=True)
    image = torch.rand(3, 240, 320, generator=torch.Generator().manual_seed(0))
    first, second = (_boxes_and_scores(m, image) for m in (model, again))
    if not torch.equal(first, second):
        raise CheckFailed(f"the model of '{target}' answers differently on the same image", "report this as a bug")
    return len(first)


def _boxes_and_scores(model: nn.Module, image: Tensor) -> Tensor:
    detector: Any = model.eval()
    found = detector.detect([image])[0]
    return torch.cat((found.boxes, found.scores[:, None]), dim=1)
