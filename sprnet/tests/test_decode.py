import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.nn import retinanet
from onestage.ops.paste import cut_mask, paste_masks
from onestage.structures import FORM_OF, ImageFrame
from onestage.testing import dense_paste
from sprnet.coder import encode
from sprnet.config import R50_800, SPRNetConfig
from sprnet.decode import best_pairs, decode, select
from sprnet.model import RawOutput

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]  # of a 128 x 128 input
SQUARE = ImageFrame((128, 128), (128, 128), (128, 128), (1.0, 1.0))
CONFIG = replace(R50_800, num_classes=3)


def _raw(found):
    """Outputs of one image where only some anchors answer: {anchor: (class, score, xyxy)}."""
    anchors = retinanet.anchors(SIZES, retinanet.STRIDES)
    logits, deltas = torch.full((1, len(anchors), 3), -20.0), torch.zeros(1, len(anchors), 4)
    for anchor, (label, score, box) in found.items():
        logits[0, anchor, label] = math.log(score / (1 - score))
        deltas[0, anchor] = encode(anchors[anchor], torch.tensor(box), CONFIG)
    return RawOutput(anchors, SIZES, logits, deltas, [])


def _anchor(x, y, a=0):
    return ((y // 8) * 16 + x // 8) * 9 + a  # on P3


def _full(image, pixels, labels):
    return torch.full((len(pixels), 32, 32), 5.0)


def test_nms_is_by_class_and_boxes_of_iou_one_half_stay():
    box, half = [40.0, 40.0, 88.0, 88.0], [40.0, 40.0, 64.0, 88.0]  # IoU exactly 1/2
    raw = _raw(
        {
            _anchor(60, 60): (0, 0.9, box),
            _anchor(68, 60): (0, 0.8, half),
            _anchor(60, 68): (0, 0.7, [41.0, 41.0, 88.0, 88.0]),  # too close to the first
            _anchor(68, 68): (1, 0.6, box),  # another class
            _anchor(12, 12): (2, 0.04, box),  # below the threshold
        }
    )
    kept, boxes = select(raw, 0, SQUARE, CONFIG)
    assert kept.labels.tolist() == [0, 0, 1]
    assert_close(kept.scores, torch.tensor([0.9, 0.8, 0.6]))
    assert kept.index.tolist() == [_anchor(60, 60), _anchor(68, 60), _anchor(68, 68)]
    assert_close(boxes, torch.tensor([box, half, box]))


def test_each_level_offers_its_best_pairs():
    logits = torch.full((3 * 9, 2), -9.0)  # levels of 2 and 1 cells
    logits[3, 1], logits[7, 0], logits[11, 0], logits[20, 1] = 2.0, 3.0, 1.0, -1.0
    pairs = best_pairs(logits, [(1, 2), (1, 1)], 0.05, 2)
    assert pairs.index.tolist() == [7, 3, 20]
    assert pairs.labels.tolist() == [0, 1, 1]
    assert_close(pairs.scores, torch.tensor([3.0, 2.0, -1.0]).sigmoid())
    assert len(best_pairs(logits, [(1, 2), (1, 1)], 0.5, 100).index) == 3
    assert len(best_pairs(logits, [(1, 2), (1, 1)], 0.0, 100).index) == 36 + 18


def test_detections_are_at_most_a_hundred_after_nms():
    boxes = {
        _anchor(8 * j, 8 * i): (0, 0.5 + i / 100 + j / 1000, [8.0 * j, 8.0 * i, 8.0 * j + 6, 8.0 * i + 6])
        for i in range(16)
        for j in range(16)
    }
    kept, _ = select(_raw(boxes), 0, SQUARE, CONFIG)
    assert len(kept.index) == 100
    assert (kept.scores.diff() <= 0).all()


def test_masks_are_asked_for_at_the_pixels_of_what_survives_nms():
    raw = _raw(
        {
            _anchor(60, 60, 2): (0, 0.9, [40.0, 40.0, 88.0, 88.0]),
            _anchor(60, 60, 5): (2, 0.8, [42.0, 40.0, 88.0, 90.0]),  # the same pixel
            _anchor(60, 68): (0, 0.7, [41.0, 41.0, 88.0, 88.0]),  # suppressed
            16 * 16 * 9 + 9 * 10: (1, 0.6, [0.0, 0.0, 30.0, 30.0]),  # on P4
        }
    )
    asked = []

    def masks_at(image, pixels, labels):
        asked.append((image, pixels.tolist(), labels.tolist()))
        return _full(image, pixels, labels)

    (found,) = decode(raw, [SQUARE], masks_at, CONFIG)
    pixel = _anchor(60, 60) // 9
    assert asked == [(0, [pixel, pixel, 16 * 16 + 10], [0, 2, 1])]
    assert len(found.masks) == 3


def test_a_full_map_fills_its_box_in_the_image():
    frame = ImageFrame((64, 256), (128, 128), (128, 128), (2.0, 0.5))
    raw = _raw({_anchor(60, 60): (0, 0.9, [40.0, 40.0, 88.0, 80.0]), _anchor(120, 4): (1, 0.8, [114.0, -6, 140, 14])})
    (found,) = decode(raw, [frame], _full, CONFIG)
    assert_close(found.boxes, torch.tensor([[80.0, 20.0, 176.0, 40.0], [228.0, 0.0, 256.0, 7.0]]))  # the second cut
    mask = found.masks.to_bool()[0]
    assert mask.sum() == 96 * 20
    assert mask[20:40, 80:176].all()


def test_a_box_without_interior_keeps_its_detection_and_has_an_empty_mask():
    (found,) = decode(_raw({_anchor(4, 60): (0, 0.9, [-40.0, 40.0, -8.0, 80.0])}), [SQUARE], _full, CONFIG)
    assert len(found) == 1
    assert found.masks.area().tolist() == [0]


def test_boxes_alone_without_a_mask_head_and_on_request():
    raw = _raw({_anchor(60, 60): (0, 0.9, [40.0, 40.0, 88.0, 80.0])})
    for masks_at, form in ((None, "binary"), (_full, "none")):
        (found,) = decode(raw, [SQUARE], masks_at, CONFIG, form)
        assert found.masks is found.soft_masks is None
        assert len(found) == 1


@pytest.mark.parametrize(
    ("mask_output", "shape"),
    [("bool", (0, 60, 100)), ("prob", (0, 1, 60, 100)), ("lowres", (0, 1, 32, 32)), ("packed", (0,)), ("rle", None)],
)
def test_an_image_without_detections_has_no_masks_in_any_form(mask_output, shape):
    frame = ImageFrame((60, 100), (77, 128), (128, 128), (1.28, 1.28))
    (found,) = decode(_raw({}), [frame], _full, CONFIG, FORM_OF[mask_output])
    masks = found.as_dict(mask_output)["masks"]
    assert masks == [] if shape is None else masks.shape == shape


def test_soft_masks_are_what_is_thresholded():
    raw = _raw({_anchor(60, 60): (0, 0.9, [38.7, 40.2, 88.1, 80.9])})
    logits = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0)) * 3

    def masks_at(image, pixels, labels):
        return logits

    binary, soft, lowres = (decode(raw, [SQUARE], masks_at, CONFIG, form)[0] for form in ("binary", "soft", "lowres"))
    assert_close(lowres.soft_masks, logits.sigmoid())
    assert_close(soft.soft_masks, dense_paste(logits.sigmoid(), soft.boxes, (128, 128)), atol=1e-5, rtol=0)
    assert torch.equal(binary.masks.to_bool(), soft.soft_masks >= 0.5)


@pytest.mark.parametrize("side", [32, 47, 120])
def test_a_mask_survives_being_cut_and_pasted(side):
    size = (160, 180)
    box = torch.tensor([[20.3, 11.8, 20.3 + side, 11.8 + side]])
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    center, reach = (box[0, :2] + box[0, 2:]) / 2, side / 2
    truth = ((x - center[0]) / reach) ** 2 + ((y - center[1]) / reach) ** 2 < 1
    truth &= ~(((x - center[0]).abs() < side / 10) & (y > center[1]))  # a notch
    small = cut_mask(truth.byte(), box[0], 32)
    mask = paste_masks(small[None].float(), box, size).to_bool()[0]
    assert (mask & truth).sum() / (mask | truth).sum() > 0.9


def test_the_score_threshold_is_a_probability():
    assert SPRNetConfig().inference.score_threshold == 0.05
    raw = _raw({_anchor(4, 4): (0, 0.051, [0.0, 0, 20, 20]), _anchor(100, 100): (0, 0.049, [90.0, 90, 110, 110])})
    assert len(select(raw, 0, SQUARE, CONFIG)[0].index) == 1
