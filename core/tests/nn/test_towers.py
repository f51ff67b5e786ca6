"""Towers: names, shapes, initialisation, and the released head's numbers."""

import math

import pytest
import torch
from torch import nn

from onestage.nn.towers import (
    Scale,
    _patches_of_levels,
    conv_at,
    conv_tower,
    conv_unit,
    flatten_levels,
    init_normal,
    prior_bias,
)


def test_tower_parameters_are_named_by_unit_and_part():
    tower = conv_tower(32, 64, 2, norm="gn", bias=False)
    shapes = {name: tuple(p.shape) for name, p in tower.named_parameters()}
    assert shapes == {
        "0.0.weight": (64, 32, 3, 3),
        "0.1.weight": (64,),
        "0.1.bias": (64,),
        "1.0.weight": (64, 64, 3, 3),
        "1.1.weight": (64,),
        "1.1.bias": (64,),
    }
    assert isinstance(tower[0][1], nn.GroupNorm)


def test_tower_without_norm_has_biases_and_keeps_the_size():
    tower = conv_tower(3, 5, 2, norm="none", bias=True)
    assert [name for name, _ in tower.named_parameters()] == ["0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"]
    out = tower(torch.randn(2, 3, 7, 9))
    assert out.shape == (2, 5, 7, 9)
    assert (out >= 0).all()


def test_tower_of_depth_zero_is_the_identity():
    x = torch.randn(1, 3, 2, 2)
    assert conv_tower(3, 5, 0, norm="none", bias=True)(x) is x


def test_dilated_unit_keeps_the_size():
    assert conv_unit(2, 3, norm="none", bias=True, dilation=6)(torch.randn(1, 2, 5, 5)).shape == (1, 3, 5, 5)


def test_scale_starts_at_one_and_is_one_number():
    scale = Scale()
    assert scale.scale.shape == ()
    assert scale(torch.tensor([3.0])).tolist() == [3.0]


def test_init_normal_sets_convs_and_leaves_norms():
    torch.manual_seed(0)
    tower = conv_tower(64, 64, 1, norm="gn", bias=True)
    nn.init.constant_(tower[0][0].bias, 5.0)
    init_normal(tower, 0.02)
    assert abs(tower[0][0].weight.std().item() - 0.02) < 1e-3
    assert tower[0][0].bias.abs().max() == 0
    assert (tower[0][1].weight == 1).all()


def test_prior_bias_is_the_logit():
    assert prior_bias(0.01) == pytest.approx(-math.log(99))


def test_flattening_goes_level_row_column_anchor():
    # Channel a * 3 + c holds 10 a + c, plus 100 per column and 1000 per row.
    anchor = torch.arange(2).repeat_interleave(3) * 10 + torch.arange(3).repeat(2)
    level = anchor[None, :, None, None] + torch.arange(2)[:, None] * 1000 + torch.arange(2)[None, :] * 100
    flat = flatten_levels([level, level[:, :, :1, :1]], 3)
    assert flat.shape == (1, 10, 3)
    assert flat[0, :, 0].tolist() == [0, 10, 100, 110, 1000, 1010, 1100, 1110, 0, 10]
    assert flat[0, 3].tolist() == [110, 111, 112]


@pytest.mark.golden
@pytest.mark.parametrize(("tower_name", "conv_name", "output"), [("cls_convs", "retina_cls", "cls")])
def test_tower_equals_the_released_head(golden, tower_name, conv_name, output):
    data = golden("rdsnet_heads")
    state = {name.removeprefix("bbox_head."): tensor for name, tensor in data["state_dict"].items()}
    tower = conv_tower(64, 64, 4, norm="gn", bias=False)
    for i, unit in enumerate(tower):
        unit[0].weight.data = state[f"{tower_name}.{i}.conv.weight"]
        unit[1].weight.data, unit[1].bias.data = (
            state[f"{tower_name}.{i}.gn.weight"],
            state[f"{tower_name}.{i}.gn.bias"],
        )
    for feature, expected in zip(data["feats"], data[output], strict=True):
        out = nn.functional.conv2d(tower(feature), state[f"{conv_name}.weight"], state[f"{conv_name}.bias"], padding=1)
        tolerance = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("side", "dilation"), [(3, 1), (3, 2), (3, 6), (1, 1)])
def test_conv_at_some_locations_equals_the_dense_conv(side, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, side, padding=side // 2 * dilation, dilation=dilation)
    levels = [torch.randn(1, 4, height, width) for height, width in ((5, 7), (3, 4), (1, 1))]
    with torch.no_grad():
        dense = flatten_levels([conv(level) for level in levels], 6)[0]
        index = torch.tensor([47, 0, 34, 35, 46, 20, 20])  # corners of the levels, one twice
        torch.testing.assert_close(conv_at(conv, [level[0] for level in levels], index), dense[index])
        assert conv_at(conv, [level[0] for level in levels], index[:0]).shape == (0, 6)
        # What a GPU runs, where a number of locations per level would have to come to the host.
        patches = _patches_of_levels(conv, [level[0] for level in levels], index)
        torch.testing.assert_close(nn.functional.linear(patches, conv.weight.flatten(1), conv.bias), dense[index])


def test_conv_at_some_locations_teaches_as_the_dense_conv():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=2, dilation=2)
    levels = [torch.randn(1, 4, height, width, requires_grad=True) for height, width in ((5, 7), (3, 4))]
    index, weights = torch.tensor([0, 34, 35, 46, 20, 20]), torch.randn(6, 6)
    dense = flatten_levels([conv(level) for level in levels], 6)[0, index]
    gathered = conv_at(conv, [level[0] for level in levels], index)
    for leaf in (*levels, *conv.parameters()):
        expected, found = (torch.autograd.grad((x * weights).sum(), leaf, retain_graph=True) for x in (dense, gathered))
        torch.testing.assert_close(found, expected)
