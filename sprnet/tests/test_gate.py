import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onestage.nn.fpn import FPN
from sprnet.gate import GatedMerge


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 8, 5, 7), torch.randn(2, 8, 5, 7)


def test_without_scores_a_merge_is_half_the_sum(maps):
    merge = GatedMerge(8, 2)
    nn.init.zeros_(merge.gates[1].pointwise.weight)
    assert_close(merge(*maps, 1), sum(maps) / 2)


def test_each_map_is_weighed_by_its_own_score_of_one_gate(maps):
    merge = GatedMerge(8, 2)
    gate = merge.gates[0]
    expected = sum(x * torch.sigmoid(gate.pointwise(gate.depthwise(x))) for x in maps)
    assert_close(merge(*maps, 0), expected)
    assert_close(merge(*maps, 0), merge(*reversed(maps), 0))
    assert not torch.allclose(merge(*maps, 0), merge(*maps, 1))


def test_shared_levels_use_one_gate(maps):
    merge = GatedMerge(8, 3, share_levels=True)
    assert_close(merge(*maps, 0), merge(*maps, 2))
    assert len(merge.gates) == 1


def test_spatial_scores_are_the_same_for_all_channels(maps):
    merge = GatedMerge(8, 1, scores="spatial")
    nothing = torch.zeros_like(maps[0])
    score = merge(maps[0], nothing, 0) / maps[0]
    assert_close(score, score[:, :1].expand_as(score))
    assert (score.diff(dim=2).abs() > 1e-6).any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2 * 68_096),
        ({"share_levels": True}, 68_096),
        ({"scores": "spatial"}, 2 * 2_561),
        ({"scores": "spatial", "share_levels": True}, 2_561),
    ],
    ids=str,
)
def test_numbers_of_parameters(options, expected):
    # The paper has 0.05 % of RetinaNet's; full scores are 0.36 %, and no reading gives 0.05.
    assert _count(GatedMerge(256, 2, **options)) == expected


def test_gates_start_close_to_one_half():
    torch.manual_seed(0)
    merge, x = GatedMerge(256, 1), torch.randn(1, 256, 12, 12)
    score = merge(x, torch.zeros_like(x), 0) / x
    assert abs(score.mean() - 0.5) < 0.01
    assert 0.01 < score.std() < 0.04


def test_the_gradient_to_the_coarser_map_is_scaled_not_blocked(maps):
    lateral, upsampled = (x.requires_grad_() for x in maps)
    GatedMerge(8, 1)(lateral, upsampled, 0).sum().backward()
    assert (upsampled.grad != 0).all()


def test_a_pyramid_takes_it_and_upsamples_what_is_already_merged():
    torch.manual_seed(0)
    merge = GatedMerge(8, 2)
    pyramid = FPN((4, 6, 10), 8, extra="c5", merge=merge)
    features = [torch.randn(1, 4, 25, 25), torch.randn(1, 6, 13, 13), torch.randn(1, 10, 7, 7)]
    found = pyramid(features)
    p5, p4, p3 = (pyramid.lateral[i](features[i]) for i in (2, 1, 0))
    p4 = merge(p4, nn.functional.interpolate(p5, size=(13, 13)), 1)
    p3 = merge(p3, nn.functional.interpolate(p4, size=(25, 25)), 0)
    for level, expected in enumerate((p3, p4, p5)):
        assert_close(found[level], pyramid.output[level](expected))
    assert [tuple(level.shape[2:]) for level in found] == [(25, 25), (13, 13), (7, 7), (4, 4), (2, 2)]
    assert {name for name, _ in pyramid.named_parameters() if name.startswith("merge.")} == {
        f"merge.gates.{i}.{part}"
        for i in range(2)
        for part in ("depthwise.weight", "pointwise.weight", "pointwise.bias")
    }
