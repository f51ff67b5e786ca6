from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from meinst.decode import decode, select, to_image
from meinst.model import RawOutput
from onestage.nn import fcos
from onestage.nn.nms import Kept
from onestage.structures import FORM_OF, ImageFrame

SIZES = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
CONFIG = MEInstConfig(num_classes=2, mask_size=2, encoding="none")


def _raw(*found):
    """Outputs with a few confident locations: (location, class, class score, centerness, distances in strides)."""
    count = sum(height * width for height, width in SIZES)
    logits, centerness = torch.full((1, count, 2), -20.0), torch.zeros(1, count)
    distances, codes = torch.zeros(1, count, 4), torch.zeros(1, count, 4)
    for location, label, score, center, ltrb in found:
        logits[0, location, label] = torch.tensor(score).logit()
        centerness[0, location] = torch.tensor(center).logit()
        distances[0, location] = torch.tensor(ltrb)
        codes[0, location] = torch.tensor([20.0, -20.0, 20.0, -20.0])  # the left half
    return RawOutput(logits, distances, centerness, codes, [], fcos.locations(SIZES), SIZES)


def test_scores_are_geometric_means_and_boxes_are_in_strides_of_their_level():
    # Location 5 of P3 lies at (12, 12); location 16, the first of P4, at (8, 8).
    raw = _raw((5, 1, 0.64, 0.25, [1.0, 1.0, 1.0, 0.5]), (16, 0, 0.5, 0.5, [0.25, 0.5, 1.0, 1.0]))
    kept, boxes = select(raw, 0, CONFIG)
    assert_close(kept.scores, torch.tensor([0.5, 0.4]))
    assert kept.labels.tolist() == [0, 1]
    assert boxes.tolist() == [[4.0, 0.0, 24.0, 24.0], [4.0, 4.0, 20.0, 16.0]]


def test_the_threshold_is_on_the_class_score_unless_asked_otherwise():
    raw = _raw((5, 1, 0.06, 0.1, [1.0] * 4))
    assert len(select(raw, 0, CONFIG)[1]) == 1
    config = replace(CONFIG, inference=replace(CONFIG.inference, threshold_with_centerness=True))
    assert len(select(raw, 0, config)[1]) == 0


def test_duplicates_of_a_class_fall_and_other_classes_stay():
    same = [1.0] * 4
    raw = _raw((5, 1, 0.9, 0.9, same), (6, 1, 0.8, 0.9, [2.0, 1.0, 0.0, 1.0]), (9, 0, 0.7, 0.9, [1.0, 2.0, 1.0, 0.0]))
    kept, boxes = select(raw, 0, CONFIG)
    assert kept.index.tolist() == [5, 9]
    assert torch.equal(boxes[0], boxes[1])


def test_boxes_are_cut_to_the_image_and_empty_ones_dropped():
    kept = Kept(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([0.9, 0.8]))
    frame = ImageFrame((50, 100), (25, 50), (32, 64), (0.5, 0.5))
    boxes = torch.tensor([[-4.0, 5.0, 10.0, 40.0], [60.0, 0.0, 70.0, 9.0]])
    left, found = to_image(kept, boxes, frame)
    assert left.index.tolist() == [3]
    assert found.boxes.tolist() == [[0.0, 10.0, 20.0, 50.0]]


def test_masks_fill_boxes_of_the_image():
    raw = _raw((5, 1, 0.9, 0.9, [1.0] * 4))  # box (4, 4, 20, 20) of the input
    frame = ImageFrame((64, 64), (32, 32), (32, 32), (0.5, 0.5))

    def run(form):
        return decode(raw, [frame], lambda i, index: raw.codes[i, index], PixelCodec(CONFIG), CONFIG, form)[0]

    masks = run("binary").masks.to_bool()
    # Image box (8, 8, 40, 40), its left half; towards the corners the values fall below one half.
    assert masks[0, 12:36, 10:22].all()
    assert not masks[0, :8].any()
    assert not masks[0, :, :8].any()
    assert not masks[0, :, 24:].any()
    soft = run("soft").soft_masks
    assert torch.equal(soft >= 0.5, masks)
    assert run("lowres").soft_masks.shape == (1, 2, 2)
    assert run("none").masks is None


def test_an_image_with_nothing_in_it():
    frame = ImageFrame((20, 30), (32, 32), (32, 32), (1.6, 1.07))
    raw = _raw()
    found = decode(raw, [frame], lambda i, index: raw.codes[i, index], PixelCodec(CONFIG), CONFIG)[0]
    assert len(found) == len(found.masks) == 0
    assert found.masks.to_bool().shape == (0, 20, 30)


SHAPES = {"prob": (0, 1, 20, 30), "lowres": (0, 1, 2, 2), "bool": (0, 20, 30)}


@pytest.mark.parametrize("form", [*SHAPES, "rle", "none"])
@pytest.mark.parametrize("encoding", ["none", "pca"])
def test_an_image_with_nothing_in_it_has_every_form_of_masks(form, encoding):
    frame = ImageFrame((20, 30), (32, 32), (32, 32), (1.6, 1.07))
    config = replace(CONFIG, encoding=encoding, code_length=4)
    raw, codec = _raw(), MaskCodec(config) if encoding == "pca" else PixelCodec(config)
    masks = FORM_OF.get(form, "binary")
    (found,) = decode(raw, [frame], lambda i, index: raw.codes[i, index], codec, config, masks)
    result = found.as_dict(form)
    assert result["boxes"].shape == (0, 4)
    if form in SHAPES:
        assert result["masks"].shape == SHAPES[form]
    else:
        assert result.get("masks") == ([] if form == "rle" else None)
