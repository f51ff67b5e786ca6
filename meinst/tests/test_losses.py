import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from meinst.codec import MaskCodec, PixelCodec
from meinst.config import MEInstConfig
from meinst.losses import box_loss, mask_loss

CONFIG = MEInstConfig(mask_size=2, code_length=2, noisy_logits=False, whiten=False)


class _Codec(MaskCodec):
    """Knows the codes of masks from outside."""

    def encode(self, masks, labels=None, noise=None):
        return torch.tensor([[3.0, 4.0], [0.5, 0.0]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l2", [25.0, 0.25]),
        ("l1", [7.0, 0.5]),
        ("smooth_l1", [2.5 + 3.5, 0.125]),
        ("cosine", [1.0, 1.0]),  # of a zero vector
    ],
)
def test_the_four_losses_between_codes_by_hand(name, expected):
    config = replace(CONFIG, mask_loss=name)
    losses = mask_loss(torch.zeros(2, 2), torch.zeros(2, 2, 2), torch.zeros(2), _Codec(config), config)
    assert_close(losses, torch.tensor(expected))


def test_cosine_looks_at_directions_only():
    config = replace(CONFIG, mask_loss="cosine")
    codes = torch.tensor([[30.0, 40.0], [0.0, 1.0]])
    losses = mask_loss(codes, torch.zeros(2, 2, 2), torch.zeros(2), _Codec(config), config)
    assert_close(losses, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_without_an_encoding_the_loss_is_cross_entropy_of_the_pixels():
    config = replace(CONFIG, encoding="none")
    codes = torch.tensor([[0.0, 0.0, 0.0, math.log(3)]])
    masks = torch.tensor([[[1, 0], [1, 1]]])
    losses = mask_loss(codes, masks, torch.zeros(1), PixelCodec(config), config)
    assert_close(losses, torch.tensor([3 * math.log(2) - math.log(0.75)]))


def test_the_implicit_loss_equals_cross_entropy_of_the_decoded_mask():
    config = replace(CONFIG, loss_on_mask=True, noisy_logits=True)
    codec, codes = MaskCodec(config), torch.randn(3, 2)
    masks = torch.randint(0, 2, (3, 2, 2))
    soft = codec.decode(codes).flatten(1)
    expected = torch.nn.functional.binary_cross_entropy(soft, masks.flatten(1).float(), reduction="none").sum(1)
    assert_close(mask_loss(codes, masks, torch.zeros(3), codec, config), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("giou", 0.75 + 2 / 9), ("iou", math.log(4)), ("linear_iou", 0.75)])
def test_box_losses_by_hand(name, expected):
    pred = torch.tensor([[2.0, 0.0, 0.0, 2.0]])  # 2 x 2, shares a unit square with the other; 3 x 3 around both
    losses = box_loss(pred, torch.ones(1, 4), replace(CONFIG, box_loss=name))
    assert_close(losses, torch.tensor([expected]))
