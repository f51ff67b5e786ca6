"""The parts of the real-time model by hand: anchors, unique matching, mined class loss."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from onestage.nn.retinanet import IGNORED, NEGATIVE
from onestage.structures import Target
from rdsnet.config import YOLACT, YolactConfig
from rdsnet.small import SmallOutput, crop, relative_anchors, whole_pixels
from rdsnet.small_losses import class_loss, compute_losses, match_anchors, on_grid, semantic_loss


def test_published_anchors_are_squares_and_19248_of_them():
    sizes = [(69, 69), (35, 35), (18, 18), (9, 9), (5, 5)]
    anchors = relative_anchors(sizes, (550, 550), YOLACT) * 550
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    assert len(anchors) == 19_248
    torch.testing.assert_close(width, height, atol=1e-3, rtol=0)
    torch.testing.assert_close(width[:3], 24 * torch.tensor([1.0, 0.5**0.5, 2**0.5]), atol=1e-3, rtol=0)
    torch.testing.assert_close(anchors[0, :2] + anchors[0, 2:], torch.full((2,), 550 / 69), atol=1e-3, rtol=0)


def test_without_the_slip_ratios_are_ratios():
    config = replace(YOLACT, yolact=YolactConfig(square_anchors=False, anchor_sides=(24.0,)))
    anchors = relative_anchors([(1, 1)], (100, 200), config) * torch.tensor([200, 100, 200, 100])
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    torch.testing.assert_close(width / height, torch.tensor([1.0, 0.5, 2.0]))
    torch.testing.assert_close((width * height).sqrt(), torch.full((3,), 24.0))


def test_each_truth_claims_an_anchor_of_its_own_best_pairs_first():
    anchors = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.6, 0.6], [0.9, 0.9, 1.0, 1.0]])
    boxes = torch.tensor([[0.0, 0.0, 0.4, 0.38], [0.0, 0.0, 0.4, 0.4]])
    # Both want the first anchor; the second truth has it, the first one takes another, however far it is.
    index = match_anchors(anchors, boxes, boxes[:0])
    assert index[0] == 1
    assert sorted(index.tolist()) == [NEGATIVE, 0, 1]


def test_between_the_thresholds_an_anchor_is_left_out():
    anchors = torch.tensor([[0.0, 0.0, 0.5, height] for height in (0.5, 0.26, 0.22, 0.19)])
    index = match_anchors(anchors, torch.tensor([[0.0, 0.0, 0.5, 0.5]]), anchors[:0])
    assert index.tolist() == [0, 0, IGNORED, NEGATIVE]


def test_background_anchors_in_a_crowd_are_left_out():
    anchors = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.1, 0.0, 0.3, 0.2], [0.7, 0.7, 0.8, 0.8]])
    crowd = torch.tensor([[0.0, 0.0, 0.2, 0.5]])
    assert match_anchors(anchors, crowd[:0], crowd).tolist() == [IGNORED, NEGATIVE, NEGATIVE]


def test_the_class_loss_takes_three_hard_negatives_for_a_positive():
    logits = torch.zeros(8, 3)
    logits[:, 0] = torch.tensor([0.0, 5, 4, 3, 2, 1, -9, -9])  # from background to doubtful; the last is left out
    index = torch.tensor([0, *[NEGATIVE] * 6, IGNORED])
    loss = class_loss(logits, index, torch.zeros(8, dtype=torch.int64), 3.0)
    counted = torch.tensor([0, 6, 5, 4])
    expected = F.cross_entropy(logits[counted], torch.tensor([1, 0, 0, 0]), reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_boxes_in_whole_pixels():
    boxes = torch.tensor([[0.1, 0.26, 0.55, 0.9], [0.5, 0.5, 0.2, 1.3], [-0.2, 0.0, 0.1, 0.1]])
    assert whole_pixels(boxes, (50, 101)).tolist() == [[10, 13, 55, 45], [20, 25, 50, 50], [0, 0, 10, 5]]


def test_a_crop_has_one_cell_more_on_each_side():
    assert crop(torch.tensor([[0.25, 0.5, 0.5, 0.55]]), torch.zeros(1, 20, 40)).tolist() == [[9, 9, 21, 12]]


@pytest.mark.parametrize("count", [0, 2])
def test_the_semantic_target_is_the_union_by_class(count):
    semantic = torch.zeros(1, 3, 4, 4)
    masks = torch.zeros(count, 8, 8, dtype=torch.uint8)
    masks[:, :4] = 1
    target = Target(torch.zeros(count, 4), torch.zeros(count).long(), masks, torch.zeros(count, dtype=torch.bool))
    raw = SmallOutput(semantic, semantic, semantic, [], semantic, torch.full_like(semantic, -20.0))
    wrong = 20 * 0.5 if count else 0.0  # half of one class' cells, at 20 each
    torch.testing.assert_close(semantic_loss(raw, [target]), torch.tensor(wrong), atol=1e-6, rtol=1e-6)
    assert on_grid(masks, (4, 4)).flatten(1).sum(1).tolist() == [8] * count


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_under_autocast_the_losses_of_rounded_outputs_are_not_rounded(half):
    config = replace(YOLACT, num_classes=3, yolact=replace(YOLACT.yolact, anchor_sides=(24.0,)))
    generator = torch.Generator().manual_seed(0)
    anchors = relative_anchors([(4, 4)], (64, 64), config)

    def rounded(*shape):
        return torch.randn(*shape, generator=generator).to(half)

    count = len(anchors)
    raw = SmallOutput(
        rounded(1, count, 4), rounded(1, count, 4), anchors, [], rounded(1, 8, 16, 16), rounded(1, 3, 4, 4)
    )
    vectors = rounded(count, 8)
    boxes = torch.tensor([[5.0, 8.0, 31.0, 30.0], [30.0, 33.0, 50.0, 60.0]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 8:30, 5:31] = masks[1, 33:60, 30:50] = 1
    targets = [Target(boxes, torch.tensor([0, 2]), masks, torch.zeros(2, dtype=torch.bool))]
    whole = SmallOutput(*(part.float() if isinstance(part, torch.Tensor) else part for part in raw))
    expected = compute_losses(whole, targets, lambda _, index: vectors[index].float(), config)
    with torch.autocast("cpu", half):
        ours = compute_losses(raw, targets, lambda _, index: vectors[index], config)
    torch.testing.assert_close(ours, expected)
