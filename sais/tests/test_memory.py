"""The paper's claim on training memory, counted without computing: see benchmarks/training_memory.py."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from onestage.engine.memory import training_peak
from onestage.structures import Target
from onestage.testing import coco_like_boxes
from sais.config import VARIANTS
from sais.model import SAIS


def test_sais_768_needs_what_the_paper_reports():
    # The paper has 2.5 GB with a GPU's workspaces and rounding; the reference count is 2.28.
    assert _peak("r50_768") == pytest.approx(2.28, abs=0.15)


@pytest.mark.slow
def test_rows_of_table_four_in_order():
    peaks = [_peak(row) for row in ("r50_640", "r50_768", "r101_768", "x101_768")]
    paper = [1.8, 2.5, 3.6, 6.6]
    assert peaks == sorted(peaks)
    for ours, theirs in zip(peaks, paper, strict=True):
        assert 0.80 * theirs < ours < theirs


@pytest.mark.slow
def test_more_masks_per_image_cost_next_to_nothing_in_windows():
    # Dense masks need 0.66 GiB more at 1000 than at 100.
    assert _peak("r50_640", masks=1000) < _peak("r50_640") + 0.2


@cache
def _peak(variant: str, masks: int = 100) -> float:
    """GiB of a full step with two images, gradients kept as torch did then."""
    config = replace(VARIANTS[variant], masks_per_image=masks)
    height, width = size = config.input.train_sizes[0]
    generator = torch.Generator().manual_seed(0)
    images = [torch.zeros(3, height, width, dtype=torch.uint8) for _ in range(2)]
    targets = [
        Target(
            coco_like_boxes(15, size, generator),
            torch.arange(15),
            torch.zeros(15, height, width, dtype=torch.uint8),
            torch.zeros(15, dtype=torch.bool),
        )
        for _ in images
    ]
    return training_peak(lambda: SAIS(config), images, targets, config.schedule, keep_gradients=True) / 2**30
