"""Deformable convolution: by hand, and the gather form against torchvision's op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision import ops

from onestage.errors import UsageError
from onestage.ops.deform import CHUNK, deform_conv2d, deform_conv2d_gather, exported_as


def test_zero_offsets_make_a_plain_convolution():
    x, weight, bias = torch.randn(2, 8, 9, 11), torch.randn(6, 8, 3, 3), torch.randn(6)
    with torch.no_grad():
        out = deform_conv2d(x, torch.zeros(2, 18, 9, 11), weight, bias, padding=1)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=2e-5)


def test_offsets_are_dy_before_dx_and_interpolate():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    offset = torch.zeros(1, 2, 3, 3)
    offset[0, 0, 1, 1] = 0.5  # dy of the centre: between 4 and 7
    offset[0, 1, 0, 0] = 1.0  # dx of the corner: the cell to its right
    with torch.no_grad():
        out = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1))
    assert out[0, 0].tolist() == [[1.0, 1.0, 2.0], [3.0, 5.5, 5.0], [6.0, 7.0, 8.0]]


def test_samples_outside_fade_to_zero_and_far_ones_are_zero():
    x = torch.full((1, 1, 2, 2), 8.0)
    for dy, expected in ((-0.25, 6.0), (-1.0, 0.0), (-1e9, 0.0), (1.5, 4.0), (1e9, 0.0)):
        offset = torch.zeros(1, 2, 2, 2)
        offset[0, 0, 0, 0] = dy
        with torch.no_grad():
            out = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1))
        assert out[0, 0, 0, 0].item() == expected


def test_nan_offset_gives_nan_and_nothing_worse():
    offset = torch.full((1, 2, 2, 2), torch.nan)
    with torch.no_grad():
        out = deform_conv2d(torch.ones(1, 1, 2, 2), offset, torch.ones(1, 1, 1, 1))
    assert out.isnan().all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_gather_equals_torchvision(num_images, num_groups, stride, padding, dilation, modulated, seed):
    x, offset, weight, bias, mask = _case(num_images, num_groups, stride, padding, dilation, modulated, seed)
    out = deform_conv2d_gather(x, offset, weight, bias, (stride,) * 2, (padding,) * 2, (dilation,) * 2, mask)
    expected = ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6 * max(1.0, expected.abs().max().item()))


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.sampled_from([1, 4]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 2**20))
def test_gradients_reach_all_inputs_and_equal_torchvisions(num_groups, stride, modulated, seed):
    tensors = _case(2, num_groups, stride, 1, 1, modulated, seed)
    _compare_gradients(tensors, stride=stride, padding=1)


def test_gradients_at_whole_cells_equal_torchvisions():
    x, offset, weight, bias, mask = _case(1, 1, 1, 1, 1, True, 0)
    _compare_gradients((x, offset.zero_(), weight, bias, mask), stride=1, padding=1)  # as training starts


def test_several_chunks_give_the_same_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    x, offset = torch.randn(2, 4, 28, 40, generator=generator), torch.randn(2, 18, 28, 40, generator=generator)
    assert 2 * CHUNK < 2 * 28 * 40
    _compare_gradients((x, offset, torch.randn(3, 4, 3, 3, generator=generator), None, None), stride=1, padding=1)


def test_gradients_equal_finite_differences():
    tensors = [None if t is None else t.double().requires_grad_() for t in _case(1, 2, 2, 1, 1, True, 1)]
    x, offset, weight, bias, mask = tensors

    def convolve(*tensors):
        return deform_conv2d(*tensors[:4], stride=2, padding=1, mask=tensors[4])

    assert torch.autograd.gradcheck(convolve, (x, offset, weight, bias, mask), fast_mode=True)


def test_a_frozen_input_still_trains_the_rest():
    x, offset, weight, bias, _ = _case(1, 1, 1, 1, 1, False, 2)
    offset.requires_grad_()
    deform_conv2d(x, offset, weight, bias, padding=1).sum().backward()
    assert offset.grad.abs().max() > 0
    assert x.grad is None


@pytest.mark.parametrize("grad", [True, False])
def test_half_precision_is_computed_in_float32(grad):
    x, offset, weight, bias, _ = _case(1, 1, 1, 1, 1, False, 3)
    expected = ops.deform_conv2d(x.bfloat16().float(), offset, weight, bias, padding=1)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        out = deform_conv2d(x.bfloat16(), offset, weight.requires_grad_(grad), bias, padding=1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_weight_groups_are_left_to_torchvision():
    x, offset = torch.randn(1, 4, 5, 5), torch.randn(1, 18, 5, 5)
    weight = torch.randn(6, 2, 3, 3)  # two groups
    with torch.no_grad():
        out = deform_conv2d(x, offset, weight, padding=1)
    torch.testing.assert_close(out, ops.deform_conv2d(x, offset, weight, padding=1))


@pytest.mark.gpu
def test_gpu_equals_cpu(device):
    x, offset, weight, bias, mask = _case(2, 4, 1, 1, 1, True, 5)
    with torch.no_grad():
        cpu = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
        gpu = deform_conv2d(*(t.to(device) for t in (x, offset, weight, bias)), padding=1, mask=mask.to(device))
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-3)


def _compare_gradients(tensors, **options):
    results = []
    for convolve in (deform_conv2d, ops.deform_conv2d):
        x, offset, weight, bias, mask = leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        out = convolve(x, offset, weight, bias, mask=mask, **options)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def _case(num_images, num_groups, stride, padding, dilation, modulated, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_images, 8, 7, 9, generator=generator)
    weight = torch.randn(5, 8, 3, 2, generator=generator)
    height = (7 + 2 * padding - dilation * 2 - 1) // stride + 1
    width = (9 + 2 * padding - dilation - 1) // stride + 1
    offset = torch.randn(num_images, num_groups * 12, height, width, generator=generator) * 3
    mask = torch.rand(num_images, num_groups * 6, height, width, generator=generator) if modulated else None
    return x, offset, weight, torch.randn(5, generator=generator), mask


class _Layer(torch.nn.Module):
    def forward(self, x, offset, weight, bias, mask):
        return deform_conv2d(x, offset, weight, bias, stride=2, padding=1, mask=mask)


@pytest.mark.parametrize(("form", "operator"), [("operator", True), ("gather", False)])
@torch.no_grad()
def test_exported_forms_compute_the_same_at_any_size(form, operator):
    sides = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    with exported_as(form):
        inputs = _sized(2, 12, 10)
        shapes = ({0: torch.export.Dim("batch", min=1, max=8), **{axis: 2 * side for axis, side in sides.items()}},)
        shapes += ({0: shapes[0][0], **sides}, None, None, {0: shapes[0][0], **sides})
        program = torch.export.export(_Layer(), inputs, dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("torchvision.deform_conv2d.default" in targets) == operator
    assert not any("onestage" in target for target in targets)
    x, offset, weight, bias, mask = _sized(3, 6, 16)
    expected = ops.deform_conv2d(x, offset, weight, bias, 2, 1, 1, mask)
    found = program.module(check_guards=False)(x, offset, weight, bias, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_grouped_convolution_is_exported_as_an_operator_only():
    x, offset = torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 5, 5)
    with exported_as("gather"), pytest.raises(UsageError, match="has no gather formulation"):
        deform_conv2d(x, offset, torch.zeros(4, 2, 3, 3), padding=1)


def _sized(batch, height, width):
    """Inputs of a modulated convolution of stride 2 with two offset groups."""
    generator = torch.Generator().manual_seed(height)
    shapes = ((batch, 4, height, width), (batch, 36, height // 2, width // 2), (3, 4, 3, 3), (3,))
    x, offset, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, offset, weight, bias, torch.rand(batch, 18, height // 2, width // 2, generator=generator)
