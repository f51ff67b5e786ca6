import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.nn import fcos
from onestage.structures import FORM_OF, ImageFrame
from onestage.testing import coco_like_boxes, dense_masks, dense_soft_masks
from onestage.transforms import plan_resize
from sais.config import DEMO, KEEP_RATIO, R50_768, SAISConfig
from sais.decode import binary_masks, decode, low_resolution_masks, select, soft_masks
from sais.model import RawOutput

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]  # of a 128 x 128 input
SQUARE = ImageFrame((128, 128), (128, 128), (128, 128), (1.0, 1.0))
NEVER = -20.0  # a logit


def _raw(found):
    """Outputs of one image where only some locations answer: {location: (class, score, centerness, ltrb)}."""
    count = sum(h * w for h, w in SIZES)
    logits, centerness = torch.full((1, count, 3), NEVER), torch.zeros(1, count)
    distances = torch.ones(1, count, 4)
    for location, (label, score, center, ltrb) in found.items():
        logits[0, location, label] = math.log(score / (1 - score))
        centerness[0, location] = math.log(center / (1 - center))
        distances[0, location] = torch.tensor(ltrb)
    prototypes = torch.ones(1, 4, 32, 32)
    return RawOutput(fcos.locations(SIZES), SIZES, logits, distances, centerness, [], None, prototypes)


def _at(x, y):
    return (y // 8) * 16 + x // 8  # on P3


def test_the_threshold_is_on_the_class_score_and_the_order_on_the_product():
    raw = _raw(
        {
            _at(12, 12): (0, 0.06, 0.1, [5.0, 5, 5, 5]),  # product 0.006, stays
            _at(60, 12): (0, 0.04, 0.9, [5.0, 5, 5, 5]),  # product 0.036, goes
            _at(60, 60): (1, 0.9, 0.5, [5.0, 5, 5, 5]),
            _at(100, 100): (1, 0.6, 0.9, [5.0, 5, 5, 5]),
        }
    )
    kept, boxes = select(raw, 0, SQUARE, DEMO)
    assert_close(kept.scores, torch.tensor([0.54, 0.45, 0.006]))
    assert kept.labels.tolist() == [1, 1, 0]
    assert kept.index.tolist() == [_at(100, 100), _at(60, 60), _at(12, 12)]
    assert boxes[2].tolist() == [7.0, 7.0, 17.0, 17.0]


def test_nms_is_by_class_and_on_the_product():
    raw = _raw(
        {
            _at(60, 60): (0, 0.9, 0.3, [20.0, 20, 28, 20]),  # product 0.27
            _at(68, 60): (0, 0.6, 0.9, [28.0, 20, 20, 20]),  # product 0.54, the same box, wins
            _at(60, 68): (1, 0.5, 0.5, [20.0, 28, 28, 12]),  # the same box in another class
        }
    )
    kept, boxes = select(raw, 0, SQUARE, DEMO)
    assert kept.index.tolist() == [_at(68, 60), _at(60, 68)]
    assert (boxes == torch.tensor([40.0, 40.0, 88.0, 80.0])).all()


def test_boxes_of_iou_one_half_both_stay():
    # IoU exactly 1/2 is not above the threshold: 24 x 48 in 48 x 48.
    raw = _raw(
        {_at(60, 60): (0, 0.9, 0.5, [24.0, 24, 24, 24]), _at(68, 60): (0, 0.8, 0.5, [8.0, 24, 16, 24])},
    )
    assert len(select(raw, 0, SQUARE, DEMO)[0].index) == 2


def test_boxes_in_the_padding_are_dropped_and_others_end_where_it_begins():
    frame = ImageFrame((128, 64), (128, 64), (128, 128), (1.0, 1.0))
    raw = _raw({_at(100, 60): (0, 0.9, 0.9, [20.0] * 4), _at(60, 60): (0, 0.8, 0.9, [20.0] * 4)})
    kept, boxes = select(raw, 0, frame, DEMO)
    assert kept.index.tolist() == [_at(60, 60)]
    assert boxes.tolist() == [[40.0, 40.0, 64.0, 80.0]]


def test_each_level_offers_its_best_locations():
    raw = _raw({_at(12, 12): (0, 0.9, 0.9, [4.0] * 4), _at(60, 60): (0, 0.8, 0.9, [4.0] * 4)})
    config = replace(DEMO, inference=replace(DEMO.inference, candidates_per_level=1))
    assert select(raw, 0, SQUARE, config)[0].index.tolist() == [_at(12, 12)]


def test_boxes_return_to_the_image_by_both_scale_factors():
    frame = ImageFrame((64, 256), (128, 128), (128, 128), (2.0, 0.5))
    raw = _raw({_at(60, 60): (0, 0.9, 0.9, [20.0, 20, 28, 30]), _at(124, 4): (1, 0.8, 0.9, [10.0, 10, 10, 10])})
    (found,) = decode(raw, [frame], lambda image, index: torch.ones(len(index), 4), DEMO)
    assert_close(found.boxes[0], torch.tensor([80.0, 20.0, 176.0, 45.0]))
    assert_close(found.boxes[1], torch.tensor([228.0, 0.0, 256.0, 7.0]))  # clipped
    assert found.masks.size == (64, 256)
    # Everything is object inside the crop, which reaches one cell further: 4 input pixels.
    assert found.masks[:1].to_bool()[0, 30, 80:176].all()
    assert not found.masks[:1].to_bool()[0, 30, 192:].any()


def test_coefficients_are_read_where_the_kept_boxes_are():
    raw = _raw({_at(60, 60): (0, 0.9, 0.9, [20.0] * 4)})
    raw.logits[0, _at(60, 60), 2] = 1.0  # a second class at the same place
    asked = []

    def coefficients_at(image, index):
        asked.append((image, index.tolist()))
        return torch.ones(len(index), 4)

    decode(raw, [SQUARE], coefficients_at, DEMO)
    assert asked == [(0, [_at(60, 60)] * 2)]


@pytest.mark.parametrize(
    ("mask_output", "shape"),
    [("bool", (0, 60, 100)), ("prob", (0, 1, 60, 100)), ("lowres", (0, 1, 32, 32)), ("packed", (0,)), ("rle", None)],
)
def test_an_image_without_detections_has_no_masks_in_any_form(mask_output, shape):
    frame = ImageFrame((60, 100), (77, 128), (128, 128), (1.28, 1.28))
    (found,) = decode(_raw({}), [frame], lambda image, at: torch.ones(len(at), 4), DEMO, FORM_OF[mask_output])
    masks = found.as_dict(mask_output)["masks"]
    assert masks == [] if shape is None else masks.shape == shape


def test_the_crop_keeps_one_cell_more_on_each_side():
    box = torch.tensor([[41.2, 0.0, 82.8, 127.0]])  # 10.3 to 20.7 cells
    prototypes, coefficients = torch.zeros(2, 32, 32), torch.zeros(1, 2)
    soft = low_resolution_masks(prototypes, coefficients, box)
    columns = (soft[0] > 0).any(0).nonzero().flatten()
    assert columns.tolist() == list(range(10, 22))
    assert soft[0, 0, 10] == 0.5
    assert soft[0, :, :10].eq(0).all()
    assert soft[0, :, 22:].eq(0).all()


def test_assembly_equals_three_loops():
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(3, 8, 10, generator=generator)
    coefficients = torch.rand(4, 3, generator=generator) * 2 - 1
    boxes = torch.tensor([[4.0, 4, 20, 20], [-3, 2, 50, 9], [13, 13, 14, 14], [30, 25, 39, 31]])
    soft = low_resolution_masks(prototypes, coefficients, boxes)
    for n, (x1, y1, x2, y2) in enumerate((boxes / 4).tolist()):
        for i in range(8):
            for j in range(10):
                inside = x1 - 1 <= j < x2 + 1 and y1 - 1 <= i < y2 + 1
                logit = sum(coefficients[n, d] * prototypes[d, i, j] for d in range(3))
                expected = 1 / (1 + math.exp(-logit)) if inside else 0.0
                assert soft[n, i, j].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [(427, 640), (300, 150)])
@pytest.mark.parametrize("resize", ["fixed", "keep_ratio"])
def test_masks_equal_the_published_dense_formula(size, resize):
    generator = torch.Generator().manual_seed(size[0])
    config = R50_768 if resize == "fixed" else replace(R50_768, input=replace(KEEP_RATIO, test_size=(256, 448)))
    frame = _padded(plan_resize(size, config.input.test_size, config.input))
    height, width = (side // 4 for side in frame.padded_size)
    prototypes = torch.rand(8, height, width, generator=generator)
    coefficients = torch.rand(12, 8, generator=generator) * 2 - 1
    boxes = coco_like_boxes(12, frame.input_size, generator)
    masks = binary_masks(prototypes, coefficients, boxes, frame, config)
    resized = tuple(round(p * i / u) for p, i, u in zip(frame.padded_size, size, frame.input_size, strict=True))
    low = dense_soft_masks(prototypes, coefficients, boxes / 4, rule="margin")
    differing = masks.to_bool() != dense_masks(low, 0.5, resized, size)
    soft = soft_masks(prototypes, coefficients, boxes, frame, config)
    assert ((soft[differing] - 0.5).abs() < 1e-5).all()
    assert differing.sum() < 10
    assert masks.area().sum() > 0


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (200, 400), (1000, 333)])
@pytest.mark.parametrize("resize", ["fixed", "keep_ratio"])
def test_a_mask_survives_distortion_and_padding(size, resize):
    assert _round_trip(size, R50_768 if resize == "fixed" else replace(R50_768, input=KEEP_RATIO)) > 0.95


def test_the_padding_bug_shifts_masks_of_padded_images_only():
    config = replace(R50_768, input=KEEP_RATIO)
    broken = replace(config, inference=replace(config.inference, emulate_padding_bug=True))
    # 427 x 640 becomes 800 x 1199, padded to 1216.
    assert _round_trip((427, 640), broken) < _round_trip((427, 640), config) - 0.01
    fixed = replace(R50_768, inference=replace(config.inference, emulate_padding_bug=True))
    assert _round_trip((427, 640), fixed) == _round_trip((427, 640), R50_768)


def _round_trip(size: tuple[int, int], config: SAISConfig) -> float:
    """IoU of an ellipse with itself after becoming one prototype at stride 4 and coming back to the image."""
    height, width = size
    frame = _padded(plan_resize(size, config.input.test_size, config.input))
    box = torch.tensor([0.2 * width, 0.3 * height, 0.9 * width, 0.95 * height])
    center, reach = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2

    def ellipse(rows, columns, vertical, horizontal):
        y = ((torch.arange(rows) + 0.5) / vertical - center[1]) / reach[1]
        x = ((torch.arange(columns) + 0.5) / horizontal - center[0]) / reach[0]
        return y[:, None] ** 2 + x**2 < 1

    vertical, horizontal = frame.scale
    fine = ellipse(*frame.padded_size, vertical, horizontal)
    # +1 inside and -1 outside, as sharp as sigmoids get.
    prototype = torch.nn.functional.avg_pool2d(fine[None].float(), 4) * 40 - 20
    boxes = (box * torch.tensor([horizontal, vertical, horizontal, vertical]))[None]
    mask = binary_masks(prototype, torch.ones(1, 1), boxes, frame, config).to_bool()[0]
    truth = ellipse(height, width, 1.0, 1.0)
    return ((mask & truth).sum() / (mask | truth).sum()).item()


def _padded(frame: ImageFrame) -> ImageFrame:
    return replace(frame, padded_size=tuple(-(-side // 32) * 32 for side in frame.input_size))
