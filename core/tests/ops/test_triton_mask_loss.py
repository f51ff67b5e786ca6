"""The kernels against their twin, and the custom op around them; blocks are 64 pixels, tiles 8 x 8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.ops import mask_loss
from onestage.ops.mask_loss import window_mask_loss
from onestage.ops.triton.mask_loss import window_loss_backward_triton, window_loss_triton

SMALL_WINDOWS = [(i % 4, i % 3, i % 4 + 1, i % 3 + 1 + i % 2) for i in range(129)]


def case(device, size=(9, 13), depth=3, windows=((0, 0, 13, 9), (2, 3, 7, 8)), masks=2):
    """basis [h, w, D], weights [S, D], windows [S, 4], masks [G, h, w], mask_index [S]."""
    generator = torch.Generator().manual_seed(depth)
    num_windows = len(windows)
    tensors = (
        torch.randn(*size, depth, generator=generator),
        torch.randn(num_windows, depth, generator=generator),
        torch.tensor(windows, dtype=torch.int64).view(-1, 4),
        (torch.rand(masks, *size, generator=generator) < 0.5).byte(),
        torch.randint(masks, (num_windows,), generator=generator),
    )
    return tuple(tensor.to(device) for tensor in tensors)


def assert_equals_twin(tensors):
    basis, weights, windows, masks, index = tensors
    maps = basis.permute(2, 0, 1)
    losses, pull = window_loss_triton(*tensors)
    expected, _, passes, slopes = mask_loss._losses(maps, weights, windows, masks, index, index, None)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-1.0, 2.0, len(weights), device=basis.device)
    for_basis = window_loss_backward_triton(upstream, *tensors)
    for_maps, for_weights = mask_loss._gradients(upstream, maps, weights, passes, slopes)
    torch.testing.assert_close(pull * upstream[:, None], for_weights, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(for_basis, for_maps.permute(1, 2, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "window",
    [
        (4, 5, 5, 6),
        (3, 3, 3, 7),
        (0, 0, 1, 9),
        (12, 0, 13, 9),
        (0, 8, 13, 9),
        (0, 0, 13, 9),
        (7, 7, 9, 9),
        (5, 0, 9, 0),
    ],
    ids=["pixel", "no width", "left", "right", "bottom", "whole", "corner of four tiles", "no height"],
)
def test_one_window(window, device):
    assert_equals_twin(case(device, windows=(window,)))


@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 64])
def test_any_number_of_basis_maps(depth, device):
    assert_equals_twin(case(device, (3, 5), depth, ((0, 0, 5, 3), (1, 1, 2, 2))))


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (8, 8), (21, 25)])  # the last: more than PARTS blocks of 64
def test_any_size(size, device):
    height, width = size
    assert_equals_twin(case(device, size, windows=((0, 0, width, height), (0, 0, 1, 1))))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_windows(count, device):
    assert_equals_twin(case(device, (4, 5), 2, SMALL_WINDOWS[:count]))


@pytest.mark.parametrize("count", [128, 129])
def test_many_windows_meet_in_one_tile_of_the_backward(count, device):
    basis, weights, windows, masks, index = tensors = case(device, (4, 5), 2, SMALL_WINDOWS[:count])
    maps, upstream = basis.permute(2, 0, 1), torch.linspace(-1.0, 2.0, count, device=device)
    _, _, passes, slopes = mask_loss._losses(maps, weights, windows, masks, index, index, None)
    expected, _ = mask_loss._gradients(upstream, maps, weights, passes, slopes)
    ours = window_loss_backward_triton(upstream, *tensors)
    torch.testing.assert_close(ours, expected.permute(1, 2, 0), rtol=1e-5, atol=1e-5)


def test_bool_masks_and_strided_inputs(device):
    basis, weights, windows, masks, index = case(device)
    index = torch.ones_like(index)
    expected = window_loss_triton(basis, weights, windows, masks, index)
    strided = weights.T.contiguous().T, windows.T.contiguous().T, masks.bool().mT.contiguous().mT
    spread = torch.stack((index, 1 - index), 1)[:, 0]
    for ours, other in zip(window_loss_triton(basis, *strided, spread), expected, strict=True):
        assert torch.equal(ours, other)
    upstream = torch.linspace(-1.0, 2.0, len(index), device=device)
    for_basis = window_loss_backward_triton(upstream, basis, weights, windows, masks, index)
    assert torch.equal(window_loss_backward_triton(upstream, basis, *strided, spread), for_basis)


def test_certain_pixels_lose_nothing_and_wrong_ones_stay_finite(device):
    basis = torch.full((2, 2, 1), 200.0, device=device)
    windows = torch.tensor([[0, 0, 2, 2]] * 3, device=device)
    weights = torch.tensor([[1.0], [-1.0], [-0.05]], device=device)
    masks, index = torch.zeros(1, 2, 2, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    losses, pull = window_loss_triton(basis, weights, windows, masks, index)
    small = 4 * torch.nn.functional.softplus(torch.tensor(-10.0))  # where 1 + e rounds
    torch.testing.assert_close(losses.cpu(), torch.tensor([800.0, 0.0, small]), rtol=1e-5, atol=0)
    assert pull[1].item() == 0


@settings(derandomize=True, deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**20))
def test_random_windows(seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, 12, (3, 2, 2), generator=generator).sort(1).values
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_equals_twin(case(where, (11, 11), 4, ends.flatten(1).tolist()))


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_the_public_function_gives_the_twins_losses_and_gradients(grid, device, monkeypatch):
    generator = torch.Generator().manual_seed(7)
    basis = torch.randn(12, 4, 10, generator=generator).transpose(0, 1).to(device)  # not contiguous
    coefficients = torch.randn(3, 4 * grid[0] * grid[1], generator=generator).to(device)
    boxes = torch.tensor([[1.0, 2, 7.3, 8.1], [-2, 3.2, 5, 20], [5, 5, 5, 9]], device=device)
    masks = (torch.rand(2, 12, 10, generator=generator) < 0.5).byte().to(device)
    index = torch.tensor([0, 1, 1], device=device)
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv("ONESTAGE_KERNELS", choice)
        inputs = basis.clone().requires_grad_(), coefficients.clone().requires_grad_()
        losses = window_mask_loss(*inputs, boxes, masks, index, grid=grid)
        results.append((losses, *torch.autograd.grad((losses * torch.arange(1.0, 4.0, device=device)).sum(), inputs)))
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


def test_the_custom_op_is_what_the_compiler_needs():
    basis, weights, *rest = case("cpu")
    torch.library.opcheck(
        torch.ops.onestage.window_loss.default, (basis.requires_grad_(), weights.requires_grad_(), *rest)
    )
    # Compiled code reads what the fake promises, whatever strides come in.
    strided = weights.detach().T.contiguous().T
    assert all(value.is_contiguous() for value in torch.ops.onestage.window_loss(basis.detach(), strided, *rest))


def test_the_custom_ops_compute_in_float32_under_autocast():
    inputs = case("cpu")
    upstream = torch.linspace(-1.0, 2.0, len(inputs[1]))
    results = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for_basis = torch.ops.onestage.window_loss_backward(upstream, *inputs)
            results.append((*torch.ops.onestage.window_loss(*inputs), for_basis))
    for single, under_autocast in zip(*results, strict=True):
        assert torch.equal(single, under_autocast)
