"""The pyramid's variations."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn.fpn import FPN


def test_levels_halve_and_odd_sizes_round_up():
    fpn = FPN((4, 6, 8), 16)
    levels = fpn([torch.randn(1, 4, 20, 25), torch.randn(1, 6, 10, 13), torch.randn(1, 8, 5, 7)])
    assert [tuple(x.shape[1:]) for x in levels] == [(16, 20, 25), (16, 10, 13), (16, 5, 7), (16, 3, 4), (16, 2, 2)]


def test_parameter_names():
    names = {name.rsplit(".", 1)[0] for name, _ in FPN((4, 6, 8), 16).named_parameters()}
    assert names == {f"{part}.{i}" for part in ("lateral", "output") for i in range(3)} | {"extra.0", "extra.1"}


def test_p6_reads_p5_or_c5():
    features = _features()
    fpn = FPN((4, 6, 8), 16, extra="p5")
    levels = fpn(features)
    torch.testing.assert_close(levels[3], fpn.extra[0](levels[2]))
    fpn = FPN((4, 6, 8), 16, extra="c5")
    torch.testing.assert_close(fpn(features)[3], fpn.extra[0](features[2]))
    assert len(FPN((4, 6, 8), 16, extra="none")(features)) == 3


def test_p7_has_a_relu_before_it_only_if_asked_and_p6_never():
    features = _features()
    for relu in (True, False):
        torch.manual_seed(1)
        fpn = FPN((4, 6, 8), 16, relu_p7=relu)
        levels = fpn(features)
        assert (levels[3] < 0).any()
        torch.testing.assert_close(levels[4], fpn.extra[1](levels[3].relu() if relu else levels[3]))


def test_relu_outputs_reach_p6_but_not_p6_itself():
    fpn = FPN((4, 6, 8), 16, relu_outputs=True, relu_p7=False)
    levels = fpn(_features())
    assert all((x >= 0).all() for x in levels[:3])
    assert (levels[3] < 0).any()
    torch.testing.assert_close(levels[3], fpn.extra[0](levels[2]))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_top_down_sum_by_formula(mode):
    features = _features()
    fpn = FPN((4, 6, 8), 16, top_down=mode)
    m5 = fpn.lateral[2](features[2])
    m4 = fpn.lateral[1](features[1]) + F.interpolate(m5, size=(4, 6), mode=mode)
    m3 = fpn.lateral[0](features[0]) + F.interpolate(m4, size=(8, 12), mode=mode)
    torch.testing.assert_close(fpn(features)[0], fpn.output[0](m3))


def test_another_merge_is_called_per_level_and_owns_its_parameters():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([7.0, 5.0]))
            self.levels: list[int] = []

        def forward(self, lateral: Tensor, upsampled: Tensor, level: int) -> Tensor:
            self.levels.append(level)
            return lateral * self.weight[level] + upsampled * 0

    merge = Weighted()
    fpn = FPN((4, 6, 8), 16, merge=merge)
    features = _features()
    levels = fpn(features)
    assert merge.levels == [1, 0]
    assert fpn.merge.weight.tolist() == [7.0, 5.0]
    assert "merge.weight" in fpn.state_dict()
    torch.testing.assert_close(levels[0], fpn.output[0](fpn.lateral[0](features[0]) * 7.0))


@pytest.mark.parametrize(
    ("init", "bound"), [("xavier", (6 / (256 * 9 + 256 * 9)) ** 0.5), ("kaiming", (3 / 2304) ** 0.5)]
)
def test_initial_weights_fill_their_range_and_biases_are_zero(init, bound):
    conv = FPN((8, 8, 8), 256, init=init).output[0]
    assert 0.99 * bound < conv.weight.abs().max().item() <= bound
    assert conv.bias.abs().max() == 0


@pytest.mark.golden
def test_pyramid_equals_the_released_code_with_p6_from_c5(golden):
    data = golden("rdsnet_fpn")
    features = [data["c3"], data["c4"], data["c5"]]
    fpn = FPN([x.shape[1] for x in features], data["outs"][0].shape[1], extra="c5", relu_p7=False)
    _load(fpn, {name.removeprefix("neck."): tensor for name, tensor in data["state_dict"].items()}, _mmdetection_name)
    _compare(fpn(features), data["outs"])


@pytest.mark.golden
def test_pyramid_equals_the_released_code_with_bilinear_top_down(golden):
    data = golden("rdsnet_yolact_lc")
    features = [data["c3"], data["c4"], data["c5"]]
    fpn = FPN(
        [x.shape[1] for x in features], data["fpn"][0].shape[1], relu_p7=False, top_down="bilinear", relu_outputs=True
    )
    state = {name[4:]: tensor for name, tensor in data["state_dict"].items() if name.startswith("fpn.")}
    _load(fpn, state, _yolact_name)
    _compare(fpn(features), data["fpn"])


def _features():
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 8, 12), (1, 6, 4, 6), (1, 8, 2, 3))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _load(fpn, state, rename):
    fpn.load_state_dict({rename(name): tensor for name, tensor in state.items()})


def _mmdetection_name(name):
    part, number, _, field = name.split(".")
    if part == "lateral_convs":
        return f"lateral.{number}.{field}"
    return f"output.{number}.{field}" if int(number) < 3 else f"extra.{int(number) - 3}.{field}"


def _yolact_name(name):
    part, number, field = name.split(".")  # laterals and outputs are stored coarse to fine
    if part == "downsample_layers":
        return f"extra.{number}.{field}"
    return f"{'lateral' if part == 'lat_layers' else 'output'}.{2 - int(number)}.{field}"


def _compare(levels, expected):
    for level, reference in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, reference, rtol=0, atol=1e-5 * max(1.0, reference.abs().max().item()))
