"""From the data flags of a command line to data sets."""

from __future__ import annotations

import logging
from typing import Any, Literal

from onestage.cli.flags import Call
from onestage.data.coco import CocoDataset, locate
from onestage.data.ytvis import VideoDataset
from onestage.engine import distributed
from onestage.errors import DatasetError, some

logger = logging.getLogger("onestage")


def open_split(
    call: Call, split: Literal["train", "val"], schedule: Any | None = None, polygons: bool = False
) -> CocoDataset:
    """The data set that --data (or the explicit flags, or COCO_ROOT) names.

    Args:
        call: The command line.
        split: Which part of it.
        schedule: With training data, what its recipe leaves out (`drop_empty`, `min_size`).
        polygons: Targets carry polygons too.
    """
    flags = call.flags
    found = locate(flags.data, split, json=getattr(flags, f"{split}_json"), images=getattr(flags, f"{split}_images"))
    dropping = {} if schedule is None else {"drop_empty": schedule.drop_empty, "min_size": schedule.min_size}
    dataset = CocoDataset(
        found.json,
        found.images,
        on_bad_sample=flags.on_bad_sample,
        max_pixels=flags.max_pixels,
        polygons=polygons,
        **dropping,
    )
    if len(dataset) == 0:
        raise DatasetError(f"dataset '{found.json}' has no images to use", "check its images and --drop-empty")
    if schedule is not None and not any(map(dataset.num_instances, range(len(dataset)))):
        raise DatasetError(
            f"dataset '{found.json}' has no objects to learn from", "check its annotations; crowd regions do not count"
        )
    logger.info(
        "%s data: %s, layout %s, %d images, %d categories",
        split,
        found.json,
        found.layout,
        len(dataset),
        len(dataset.categories),
    )
    return dataset if flags.limit is None else dataset.subset(range(min(flags.limit, len(dataset))))


def open_videos(call: Call, split: Literal["train", "val"]) -> VideoDataset:
    """The data set in YouTube-VIS format that --data (or the explicit flags, or YTVIS_ROOT) names.

    Args:
        call: The command line; --limit takes the first videos.
        split: Which part of it.
    """
    flags = call.flags
    json, images = getattr(flags, f"{split}_json"), getattr(flags, f"{split}_images")
    found = locate(flags.data, split, json=json, images=images, variable="YTVIS_ROOT")
    dataset = VideoDataset(found.json, found.images, on_bad_sample=flags.on_bad_sample, max_pixels=flags.max_pixels)
    if len(dataset) == 0:
        raise DatasetError(f"dataset '{found.json}' has no videos to use", "check its frames")
    logger.info(
        "%s data: %s, layout %s, %d videos, %d categories",
        split,
        found.json,
        found.layout,
        len(dataset),
        len(dataset.categories),
    )
    return dataset if flags.limit is None else dataset.subset(range(min(flags.limit, len(dataset))))


def say_skipped(*datasets: Any) -> int:
    """Counts and lists what `--on-bad-sample skip` left out, in all processes; every one of them has to call it.

    Returns:
        How many annotations and images.
    """
    mine = [line for dataset in datasets for line in dataset.skipped]
    lines = list(dict.fromkeys(line for part in distributed.gather(mine) for line in part))
    if lines:
        logger.warning("%d bad samples were skipped: %s", len(lines), some(lines))
    return len(lines)
