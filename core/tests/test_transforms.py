from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.config import CAFFE_MEAN, InputConfig
from onestage.errors import UsageError
from onestage.structures import Reference, Target
from onestage.transforms import move_target, plan_resize, prepare_batch

KEEP = InputConfig(test_size=(800, 1333), train_sizes=((640, 1333), (800, 1333)), train_draw="range")
FIXED = replace(KEEP, resize="fixed", test_size=(64, 96), train_sizes=((64, 96),))


def _target(boxes, size):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), masks, torch.zeros(len(boxes), dtype=torch.bool))


@pytest.mark.parametrize(
    ("image", "expected", "factor"),
    [((480, 640), (800, 1067), 800 / 480), ((400, 1000), (533, 1333), 1.333), ((640, 480), (1067, 800), 800 / 480)],
)
def test_kept_aspect_fits_short_and_long_side(image, expected, factor):
    frame = plan_resize(image, (800, 1333), KEEP)
    assert frame.input_size == expected
    assert frame.scale == pytest.approx((factor, factor))


def test_fixed_size_scales_each_axis_by_itself():
    frame = plan_resize((32, 24), (64, 96), FIXED)
    assert frame.input_size == (64, 96)
    assert frame.scale == (2.0, 4.0)


def test_a_batch_is_padded_to_the_multiple_with_zeros_after_normalising():
    config = replace(FIXED, test_size=(40, 50))
    batch = prepare_batch([torch.zeros(3, 40, 50, dtype=torch.uint8)], None, config, training=False)
    assert batch.pixels.shape == (1, 3, 64, 64)
    assert batch.frames[0].padded_size == (64, 64)
    assert (batch.pixels[:, :, 40:] == 0).all()
    assert (batch.pixels[:, :, :40, :50] != 0).all()


def test_caffe_input_is_bgr_minus_mean():
    config = replace(FIXED, test_size=(32, 32), channel_order="bgr", mean=CAFFE_MEAN, std=(1.0, 1.0, 1.0))
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0] = 200
    pixels = prepare_batch([red], None, config, training=False).pixels[0, :, 0, 0]
    assert_close(pixels, torch.tensor([0 - CAFFE_MEAN[0], 0 - CAFFE_MEAN[1], 200 - CAFFE_MEAN[2]]))


def test_float_images_count_in_0_to_1():
    image = torch.full((3, 64, 96), 51, dtype=torch.uint8)
    both = [prepare_batch([x], None, FIXED, training=False).pixels for x in (image, image / 255)]
    assert_close(both[0], both[1], atol=1e-4, rtol=0)


def test_targets_move_with_the_image():
    frame = plan_resize((32, 24), (64, 96), FIXED)
    moved = move_target(_target([[2, 4, 10, 20]], (32, 24)), frame)
    assert moved.boxes.tolist() == [[8.0, 8.0, 40.0, 40.0]]
    assert moved.masks[0].nonzero().amin(0).tolist() == [8, 8]
    assert moved.masks[0].nonzero().amax(0).tolist() == [39, 39]


def test_legacy_boxes_lose_their_last_pixel_before_scaling_and_stop_at_the_last_pixel():
    frame = plan_resize((32, 24), (64, 96), FIXED)
    moved = move_target(_target([[2, 4, 10, 20], [0, 0, 24, 32]], (32, 24)), frame, legacy_boxes=True)
    assert moved.boxes.tolist() == [[8.0, 8.0, 36.0, 38.0], [0.0, 0.0, 92.0, 62.0]]


def test_polygons_move_with_the_image():
    frame = plan_resize((32, 24), (64, 96), FIXED)
    target = replace(_target([[2, 4, 10, 20]], (32, 24)), polygons=(((2.0, 4.0, 10.0, 4.0, 10.0, 20.0),),))
    assert move_target(target, frame).polygons == (((8.0, 8.0, 40.0, 8.0, 40.0, 40.0),),)


def test_training_draws_whole_numbers_between_the_sizes_and_both_ends_occur():
    torch.manual_seed(0)
    config = replace(KEEP, train_sizes=((64, 200), (67, 200)))
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    sizes = {prepare_batch([image], None, config, training=True).frames[0].input_size[0] for _ in range(60)}
    assert sizes == {64, 65, 66, 67}


def test_training_draws_one_of_the_choices():
    torch.manual_seed(0)
    config = replace(KEEP, train_draw="choice", train_sizes=((64, 200), (67, 200)))
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    sizes = {prepare_batch([image], None, config, training=True).frames[0].input_size[0] for _ in range(30)}
    assert sizes == {64, 67}


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(UsageError, match=r"image is \(64, 96, 3\)"):
        prepare_batch([torch.zeros(64, 96, 3)], None, FIXED, training=False)


@pytest.mark.parametrize(("images", "message"), [([], "no images"), (["photo.jpg"], "an image is a str, not a tensor")])
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(UsageError, match=message):
        prepare_batch(images, None, InputConfig(), training=False)


def test_a_reference_frame_is_resized_like_its_image():
    images = [torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8) for _ in range(2)]
    targets = [
        replace(
            _target([[10, 10, 20, 30]], (60, 100)),
            track_ids=torch.tensor([3]),
            reference=Reference(image, torch.tensor([[20.0, 10.0, 40.0, 60.0]]), torch.tensor([3])),
        )
        for image in images
    ]
    config = replace(KEEP, train_sizes=((30, 400), (90, 400)))
    batch = prepare_batch(images, targets, config, training=True, legacy_boxes=True)
    assert len({frame.input_size for frame in batch.frames}) == 2  # each pair draws its own size
    assert torch.equal(batch.references, batch.pixels)  # the same image was given as both frames
    for target, frame in zip(batch.targets, batch.frames, strict=True):
        factor = frame.scale[0]
        assert_close(target.reference.boxes[0, :3], torch.tensor([20.0, 10.0, 39.0]) * factor)
        assert target.reference.boxes[0, 3] == min(59 * factor, frame.input_size[0] - 1)
    assert prepare_batch(images, [targets[0], _target([], (60, 100))], config, training=True).references is None
