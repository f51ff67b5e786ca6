import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onestage.config import ScheduleConfig
from onestage.engine.memory import LiveBytes, training_peak

PLAIN_SGD = ScheduleConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0)


class Squares(nn.Module):
    """One weight of 4 kB, squared."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, images, targets):
        return {"loss": (self.weight * self.weight).sum()}


def test_storages_count_once_and_until_they_are_released():
    weight = torch.zeros(100)
    live = LiveBytes([weight])
    with live:
        product = weight * 2
        view = product.view(10, 10)
        assert live.current == 800
        del product
        assert live.current == 800  # the view holds it
        del view
        assert live.current == 400
        weight.mul_(2)
    assert live.peak == 800


def test_peak_of_a_step_by_hand():
    image = torch.zeros(3, 2, 2)  # 48 bytes
    peak = training_peak(Squares, [image], [], PLAIN_SGD)
    # The weight, twice gradient x weight and their sum; the squares are released before.
    assert 48 + 4 * 4000 <= peak < 48 + 4 * 4000 + 200


def test_kept_gradients_add_one_copy_of_the_weights():
    image = torch.zeros(3, 2, 2)
    kept, released = (
        training_peak(Squares, [image], [], PLAIN_SGD, keep_gradients=keep, steps=3) for keep in (True, False)
    )
    assert kept - released == 4000


def test_the_true_entries_of_a_real_mask_select_from_what_has_no_numbers():
    with FakeTensorMode(allow_non_fake_inputs=True):
        numbers = torch.empty(100)
    mask = torch.arange(100) < 10
    live = LiveBytes([numbers])
    with live:
        selected = numbers[mask]
        assert selected.shape == (10,)
        numbers[mask] = 1.0
        assert (mask.sum() * 2).item() == 20  # real stays real
        with pytest.raises(RuntimeError):
            selected.sum().item()
    assert live.peak >= 440
