"""Sheets show what their captions say, on a scene that is known."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from onestage.structures import Target

HERE = Path(__file__).parent


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(HERE)  # it imports representations.py beside it
    return importlib.import_module("figures")


@pytest.fixture
def scene():
    """One image: a square off the middle of a larger one; one level learns where they overlap."""
    boxes = torch.tensor([[20.0, 20.0, 230.0, 230.0], [48.0, 48.0, 176.0, 176.0]])
    masks = torch.zeros(2, 256, 256, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    target = Target(boxes, torch.tensor([0, 1]), masks, torch.zeros(2, dtype=torch.bool), 1)
    return [(torch.full((3, 256, 256), 90, dtype=torch.uint8), target)]


def test_the_two_rules_of_sais_differ_where_boxes_overlap(figures, scene):
    torch.manual_seed(0)
    ((_, smallest, central),) = figures.assignment(scene).rows
    assert (smallest[0], central[0]) == ("smallest box: area-aware", "most central: centre-aware")
    maps = [torch.from_numpy(np.asarray(picture).copy()).flatten(0, 1) for _, picture in (smallest, central)]
    blue, orange = (torch.tensor(figures.colour_of(i)) for i in (0, 1))
    large = [int((pixels == blue).all(1).sum()) for pixels in maps]
    assert large[0] > 0
    assert large[1] > large[0]  # the large object gets its middle back
    assert all((pixels == orange).all(1).any() for pixels in maps)


def test_a_higher_threshold_leaves_fewer_positive_pixels(figures, scene):
    ((half, strict),) = figures.positive_pixels(scene).rows
    counts = [int(re.search(r": (\d+) pixels", caption).group(1)) for caption, _ in (half, strict)]
    assert counts[0] > counts[1] > 0


def test_what_lacks_its_training_names_the_command(figures, tmp_path):
    (sheet,) = figures.trained(tmp_path, figures.sipmask.method.METHOD, ("4", "1x1", "2x2"), "a title", "a text")
    assert sheet.missing == 'needs: python -m onestage.tables table4 sipmask --profile smoke --rows "1x1" "2x2"'
    assert not sheet.rows
