from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from sipmask.config import DEMO
from sipmask.scoring import MaskScoring, mask_iou


def test_a_score_is_the_largest_response_of_its_class():
    torch.manual_seed(0)
    net = MaskScoring(replace(DEMO, num_classes=4))
    with torch.no_grad():
        net.out.bias.copy_(torch.tensor([0.0, -9.0, 2.0, 5.0]))
        masks = torch.rand(3, 130, 200)
        feature = masks[:, None]
        for conv in net.convs:
            feature = torch.nn.functional.conv2d(feature, conv.weight, conv.bias, stride=2).relu()
        expected = net.out(feature).relu().amax((2, 3))
        assert expected[:, 1].tolist() == [0, 0, 0]
        assert_close(net(masks, torch.tensor([2, 1, 3])), expected[range(3), [2, 1, 3]])


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (127, 127), (128, 160)])
def test_a_canvas_of_any_size_is_scored(size):
    net = MaskScoring(DEMO)
    assert net(torch.rand(2, *size), torch.tensor([0, 2])).shape == (2,)
    assert net(torch.rand(0, *size), torch.tensor([], dtype=torch.int64)).shape == (0,)


def test_mask_iou_by_hand():
    soft, truth = torch.zeros(2, 10, 10), torch.zeros(2, 10, 10, dtype=torch.uint8)
    soft[0, :4, :5], truth[0, :2, :10] = 0.41, 1  # 20 and 20 cells, 10 of them common
    soft[1, :5] = 0.4  # not above the threshold
    truth[1, :5] = 1
    assert_close(mask_iou(soft, truth, 0.4), torch.tensor([10 / 30.1, 0.0]))
