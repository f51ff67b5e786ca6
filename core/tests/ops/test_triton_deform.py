"""The kernel against its twin; sizes stand on both sides of the blocks of 32 or 64 cells and 16 or 32 channels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops

from onestage.ops.deform import deform_conv2d, deform_conv2d_gather
from onestage.ops.triton.deform import CONFIGS, choose_config, deform_conv2d_triton

PLAIN = (1, 1), (1, 1), (1, 1)  # stride, padding, dilation


def case(device, size=(5, 7), channels=8, outputs=6, *, images=1, offset_groups=1, groups=1, kernel=(3, 3), how=PLAIN):
    """x, offset, weight, bias, mask with samples inside, outside and far outside."""
    generator = torch.Generator().manual_seed(channels + 10 * outputs)
    x = torch.randn(images, channels, *size, generator=generator)
    weight = torch.randn(outputs, channels // groups, *kernel, generator=generator)
    out = [
        (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for extent, taps, stride, pad, dilation in zip(size, kernel, *how, strict=True)
    ]
    taps = kernel[0] * kernel[1]
    offset = 2 * torch.randn(images, offset_groups * 2 * taps, *out, generator=generator)
    offset[:, ::5] = offset[:, ::5].round()
    mask = torch.rand(images, offset_groups * taps, *out, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    return tuple(tensor.to(device) for tensor in (x, offset, weight, bias, mask))


def assert_equals_twin(tensors, how=PLAIN, dtype=torch.float32, tolerance=2e-6):
    x, offset, weight, bias, mask = tensors
    rounded = x.to(dtype), weight.to(dtype)
    out = deform_conv2d_triton(rounded[0], offset, rounded[1], bias, *how, mask)
    # torchvision defines several weight groups, which the gather form does not have.
    expected = ops.deform_conv2d(rounded[0].float(), offset, rounded[1].float(), bias, *how, mask)
    assert out.dtype == dtype
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("size", [(1, 1), (1, 31), (4, 8), (3, 11), (8, 8), (5, 13)])  # 1, 31, 32, 33, 64, 65 cells
def test_any_number_of_cells(size, device):
    assert_equals_twin(case(device, size))


@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (15, 63), (16, 64), (17, 65), (33, 3)])
def test_any_number_of_channels(channels, outputs, device):
    assert_equals_twin(case(device, (3, 3), channels, outputs))


@pytest.mark.parametrize(("offset_groups", "groups"), [(4, 1), (1, 2), (2, 4), (4, 2), (3, 2), (12, 12)])
def test_groups_of_offsets_and_of_weights(offset_groups, groups, device):
    assert_equals_twin(case(device, (3, 4), 12, 12, images=2, offset_groups=offset_groups, groups=groups))


@pytest.mark.parametrize(
    ("kernel", "how"),
    [
        ((3, 3), ((2, 2), (1, 1), (1, 1))),
        ((3, 2), ((1, 2), (0, 2), (2, 1))),
        ((1, 1), ((1, 1), (0, 0), (1, 1))),
    ],
)
def test_strides_paddings_dilations_and_other_kernels(kernel, how, device):
    assert_equals_twin(case(device, (7, 9), images=2, offset_groups=2, kernel=kernel, how=how), how)


def test_without_modulation_and_bias(device):
    x, offset, weight, _, _ = case(device)
    assert_equals_twin((x, offset, weight, None, None))


@settings(derandomize=True, deadline=None, max_examples=10)
@given(
    height=st.integers(1, 6), width=st.integers(1, 6), groups=st.sampled_from([1, 2]), scale=st.sampled_from([0.0, 9.0])
)
def test_equals_the_twin(height, width, groups, scale):
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, offset, weight, bias, mask = case(where, (height, width), 8, 5, offset_groups=groups)
    how = (1, 1), (1, 1), (1, 1)
    out = deform_conv2d_triton(x, scale * offset, weight, bias, *how, mask)
    expected = deform_conv2d_gather(x, scale * offset, weight, bias, *how, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6 * max(1.0, expected.abs().max().item()))


def test_half_precision_differs_by_its_rounding_only(device):
    assert_equals_twin(case(device, (4, 9), 40, 20, offset_groups=2), dtype=torch.float16, tolerance=2e-3)
    assert_equals_twin(case(device, (3, 5), 20, 130), dtype=torch.float16, tolerance=2e-3)  # the wide blocks


@pytest.mark.gpu
def test_bfloat16_differs_by_its_rounding_only(device):
    if device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    assert_equals_twin(case(device, (9, 31), 64, 130, offset_groups=4), dtype=torch.bfloat16, tolerance=2e-2)


def test_strided_inputs_are_read_where_they_lie(device):
    x, offset, weight, bias, mask = case(device, (4, 6), images=2)
    expected = deform_conv2d_triton(x, offset, weight, bias, *PLAIN, mask)
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in (x, offset, weight, mask)]
    assert torch.equal(deform_conv2d_triton(*channels_last[:3], bias, *PLAIN, channels_last[3]), expected)
    wide = [torch.stack((t, t + 1), -1)[..., 0] for t in (x, offset, weight, mask)]  # every second number
    every_second = torch.stack((bias, bias + 1), -1)[:, 0]
    assert torch.equal(deform_conv2d_triton(*wide[:3], every_second, *PLAIN, wide[3]), expected)


@pytest.mark.parametrize("modulated", [False, True])
def test_an_image_whose_offsets_or_factors_are_beyond_32_bits_is_refused(modulated):
    groups, size = 128, (2**10, 2**11)
    x, weight = torch.empty(1, groups, *size, device="meta"), torch.empty(1, groups, 3, 3, device="meta")
    offset = torch.empty(1, groups * 18, 1, 1, device="meta").expand(-1, -1, *size)  # takes no room
    mask = torch.empty(1, groups * 9, *size, device="meta")
    if not modulated:
        offset, mask = offset.contiguous(), None
    with pytest.raises(AssertionError):
        deform_conv2d_triton(x, offset, weight, None, *PLAIN, mask)


def test_samples_outside_fade_to_zero_and_far_ones_are_zero(device):
    x = torch.full((1, 1, 2, 2), 8.0, device=device)
    offset = torch.zeros(1, 2, 2, 2, device=device)
    for dy, expected in ((-0.25, 6.0), (-1.0, 0.0), (-1e9, 0.0), (1.5, 4.0), (1e9, 0.0), (torch.inf, 0.0)):
        offset[0, 0, 0, 0] = dy
        out = deform_conv2d_triton(x, offset, torch.ones(1, 1, 1, 1, device=device), None, (1, 1), (0, 0), (1, 1), None)
        assert out[0, 0, 0, 0].item() == expected


def test_a_nan_offset_makes_its_cell_nan_and_no_other(device):
    x, offset, weight, bias, mask = case(device)
    offset[0, 3, 2, 4] = torch.nan
    out = deform_conv2d_triton(x, offset, weight, bias, *PLAIN, mask)
    assert out[0, :, 2, 4].isnan().all()
    assert out.isnan().sum() == out.shape[1]


def test_no_images(device):
    x, offset, weight, bias, mask = case(device)
    out = deform_conv2d_triton(x[:0], offset[:0], weight, bias, *PLAIN, mask[:0])
    assert out.shape == (0, 6, 5, 7)


def test_single_precision_has_a_configuration_of_its_own():
    assert choose_config(torch.float32, 256) != choose_config(torch.bfloat16, 256)
    assert {choose_config(dtype, n) for dtype in (torch.float32, torch.float16) for n in (3, 256)} == set(CONFIGS)


@pytest.mark.gpu
def test_a_graph_replays_with_new_input(device):
    if device.type == "cpu":
        pytest.skip("a CUDA graph needs a CUDA device")
    tensors = case(device, (20, 30), 64, 64, offset_groups=4)
    x, offset, weight, bias, mask = tensors
    deform_conv2d_triton(x, offset, weight, bias, *PLAIN, mask)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = deform_conv2d_triton(x, offset, weight, bias, *PLAIN, mask)
    for seed in range(2):
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(out, deform_conv2d_triton(x, offset, weight, bias, *PLAIN, mask), rtol=0, atol=0)


def test_the_public_function_gives_torchvisions_result_and_gradients(device, monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    results = []
    for convolve in (deform_conv2d, ops.deform_conv2d):
        leaves = [tensor.clone().requires_grad_() for tensor in case(device, (4, 5), images=2, offset_groups=2)]
        x, offset, weight, bias, mask = leaves
        out = convolve(x, offset, weight, bias, padding=1, mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_half_precision_trains_through_float32(device, monkeypatch):
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    x, offset, weight, _, _ = case(device, (3, 3))
    weight.requires_grad_()
    out = deform_conv2d(x.half(), offset, weight, padding=1)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    expected = ops.deform_conv2d(x.half().float(), offset, weight, padding=1)
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(weight.grad, gradient)


def test_the_custom_op_is_what_the_compiler_needs(monkeypatch):
    monkeypatch.delenv("ONESTAGE_KERNELS", raising=False)
    x, offset, weight, bias, mask = (tensor.requires_grad_() for tensor in case("cpu"))
    op = torch.ops.onestage.deform_conv2d.default
    torch.library.opcheck(op, (x, offset, weight, bias, (1, 1), (1, 1), (1, 1), mask))
    torch.library.opcheck(op, (x.detach(), offset.detach(), weight, None, (1, 1), (1, 1), (1, 1), None))
