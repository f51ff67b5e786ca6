"""`python -m sipmask.to_video WEIGHTS --to FILE`: a video model that starts from an image model, to be trained.

The authors start from their COCO models. What both have is copied; surplus convs of the deeper image towers are left
out; the tracking branch starts anew.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from onestage.cli.flags import Switch, Talk, parse_flags
from onestage.errors import UsageError, WeightsError, some
from sipmask.config import VARIANTS, SipMaskConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sipmask.model import SipMask


@dataclass(frozen=True, kw_only=True)
class ToVideo(Talk):
    """Makes a video model of an image model's weights; its tracking branch knows nothing until it is trained."""

    weights: Positional[Path | None] = None  # of an image model, .safetensors or last.ckpt (required)
    to: Path | None = None  # the .safetensors to write (required)
    variant: str = "video"  # the video configuration to make
    overwrite: Switch = False  # replace an existing file
    seed: int = 0  # of what starts anew


def run(words: list[str]) -> int:
    """Runs the verb with the words after it; returns the exit code."""
    flags = parse_flags(ToVideo, words, "python -m sipmask.to_video")
    source, target, config = _checked(flags)
    # The imports are here because these modules load torch.
    import torch

    from onestage.config import config_from_dict
    from onestage.engine.checkpoint import load_weights, save_weights

    state, info = load_weights(source, package="sipmask")
    image = config_from_dict(SipMaskConfig, info.config, f"{source}: config")
    torch.manual_seed(flags.seed)
    model, notes = video_from_image(state, image, config)
    info = replace(
        info,
        variant=flags.variant,
        config=asdict(model.config),
        metrics={},
        recipe=f"{info.recipe}; made a video model of, not trained since",
        steps=0,
    )
    save_weights(target, model.state_dict(), info)
    if not flags.quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"wrote {target}", file=sys.stderr)
        train = f"python -m sipmask.train --variant {flags.variant} --weights {target} --head reinit --data FOLDER"
        print(f"next: {train}", file=sys.stderr)
    if flags.json:
        print(json.dumps({"to": str(target), "variant": flags.variant, "notes": notes}))
    return 0


def video_from_image(state: dict[str, Tensor], image: SipMaskConfig, video: SipMaskConfig) -> tuple[SipMask, list[str]]:
    """A video model with what an image model knows.

    Args:
        state: Tensors of the image model.
        image: Its config; classes and trunk are taken over.
        video: The video config to make, width and norm as the image model's.

    Returns:
        The model and notes on what was left out or starts anew.

    Raises:
        WeightsError: the image model lacks something that the video model needs.
    """
    from sipmask.model import SipMask

    if image.is_video:
        raise WeightsError("these weights are a video model's already", "train it as it is")
    model = SipMask(replace(video, num_classes=image.num_classes, backbone=image.backbone))
    wanted = model.state_dict()
    new = [name for name in wanted if name.startswith("head.tracking.")]
    unfit = [
        name
        for name, value in wanted.items()
        if name not in new and (name not in state or state[name].shape != value.shape)
    ]
    if unfit:
        raise WeightsError(
            f"the image model has nothing that fits {some(unfit)}",
            "use weights of an image model of the same width and norm, with towers at least as deep",
        )
    model.load_state_dict({name: value if name in new else state[name] for name, value in wanted.items()})
    surplus = [name for name in state if name not in wanted]
    notes = [f"starts anew: {some(new)}"]
    return model, [f"left out: {some(surplus)}", *notes] if surplus else notes


def _checked(flags: ToVideo) -> tuple[Path, Path, SipMaskConfig]:
    """Source, target and video config, if every flag can be used."""
    if flags.weights is None or flags.to is None:
        missing = "weights" if flags.weights is None else "--to"
        raise UsageError(f"{missing} missing", "python -m sipmask.to_video image.safetensors --to video.safetensors")
    if flags.to.suffix != ".safetensors":
        raise UsageError(
            f"--to '{flags.to}' does not end in .safetensors", f"--to {flags.to.with_suffix('.safetensors')}"
        )
    if flags.to.exists() and not flags.overwrite:
        raise UsageError(f"--to '{flags.to}' exists", "add --overwrite to replace it, or name another file")
    videos = [name for name, config in VARIANTS.items() if config.is_video]
    if flags.variant not in videos:
        raise UsageError(f"'{flags.variant}' is no video variant", f"use one of: {', '.join(videos)}")
    return flags.weights, flags.to, VARIANTS[flags.variant]


if __name__ == "__main__":
    from sipmask.__main__ import run_verb

    run_verb("to_video")
