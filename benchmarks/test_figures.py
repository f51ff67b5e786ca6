"""Sheets show what their captions say, on a scene that is known."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from onestage.structures import Target

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)  # it imports representations.py beside it
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


@pytest.fixture(scope="module")
def by_hand(figures):
    """What is given by hand of SAIS' and SPRNet's sheets, without generated images."""
    return figures.assignment([]), figures.positive_pixels([])


def _colour_at(figures, picture, x, y):
    factor = figures.SHOWN_WIDTH / figures.SIZE
    return picture.getpixel((round(factor * x), round(factor * y)))


def test_the_two_rules_of_sais_differ_where_boxes_overlap(figures, scene):
    _, smallest, central = figures.assignment(scene).rows[-1]
    assert (smallest[0], central[0]) == (
        "all levels, smallest box: area-aware",
        "all levels, most central: centre-aware",
    )
    maps = [torch.from_numpy(np.asarray(picture).copy()).flatten(0, 1) for _, picture in (smallest, central)]
    blue, orange = (torch.tensor(figures.colour_of(i)) for i in (0, 1))
    large = [int((pixels == blue).all(1).sum()) for pixels in maps]
    assert large[0] > 0
    assert large[1] > large[0]  # the large object gets its middle back
    assert all((pixels == orange).all(1).any() for pixels in maps)


# Half of the example in sais/tests/test_targets.py. Places, whose they are by both rules, and sqrt(l/r * t/b) by hand.
@pytest.mark.parametrize(
    ("x", "y", "smallest", "central", "large", "small"),
    [
        (152, 120, 1, 0, 1.0, 0.3780),  # the large box's centre
        (168, 120, 1, 0, 0.8510, 0.6939),
        (184, 120, 1, 1, 0.0, 0.9512),  # 132 px to the large box's left side: not P4's
        (136, 120, 0, 0, 0.8510, 0.0),  # outside of the small box
        (152, 152, 1, 0, 0.6339, 0.2307),
        (24, 24, None, None, 0.0, 0.0),
    ],
)
def test_one_level_shows_both_rules_and_the_centerness_worked_out_by_hand(
    figures, by_hand, x, y, smallest, central, large, small
):
    (_, *rules), shaded = by_hand[0].rows
    for (_, picture), owner in zip(rules, (smallest, central), strict=True):
        assert _colour_at(figures, picture, x, y) == ((0, 0, 0) if owner is None else figures.colour_of(owner))
    larger = (0, large) if large > small else (1, small)
    for (_, picture), (owner, shade) in zip(shaded, ((0, large), (1, small), larger), strict=True):
        expected = [shade * part for part in figures.colour_of(owner)]
        assert _colour_at(figures, picture, x, y) == pytest.approx(expected, abs=1)


def test_a_red_anchor_is_positive_and_a_blue_one_is_not(figures, by_hand):
    (caption, picture), *_ = by_hand[1].rows[0]
    red, blue = (float(number) for number in re.findall(r"\d\.\d+", caption))
    assert caption.startswith("a box given by hand")
    assert red > 0.7 > 0.5 > blue > 0
    shown = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert {figures.GREEN, figures.RED, figures.BLUE} <= shown


def test_a_higher_threshold_leaves_fewer_positive_pixels(figures, scene):
    half, strict = figures.positive_pixels(scene).rows[-1]
    counts = [int(re.search(r": (\d+) pixels", caption).group(1)) for caption, _ in (half, strict)]
    assert counts[0] > counts[1] > 0


def test_what_lacks_its_training_names_the_command(figures, tmp_path):
    (sheet,) = figures.trained(tmp_path, figures.sipmask.method.METHOD, ("4", "1x1", "2x2"), "a title", "a text")
    assert sheet.missing == 'needs: python -m onestage.tables table4 sipmask --profile smoke --rows "1x1" "2x2"'
    assert not sheet.rows
