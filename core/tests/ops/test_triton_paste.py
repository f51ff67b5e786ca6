"""The kernels that paste maps into boxes, against the plain-torch twin."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onestage.masks import Masks
from onestage.ops.packed import num_words, pack_windows
from onestage.ops.paste import paste_masks, paste_masks_torch, paste_soft, paste_soft_torch
from onestage.ops.triton.paste import paste_masks_triton, paste_soft_triton

EDGE_BOXES = torch.tensor(
    [
        [10.0, 5.0, 11.0, 6.0],  # one pixel
        [10.2, 5.4, 10.9, 5.9],  # between pixel centres
        [-20.0, -30.0, 200.0, 300.0],  # beyond every side
        [0.0, 0.0, 43.0, 37.0],  # the whole image
        [-30.0, -40.0, -10.0, -5.0],  # outside
        [100.0, 10.0, 140.0, 20.0],  # outside, right
        [0.0, 12.0, 6.5, 19.0],  # touches the left side
        [5.0, -3.0, 11.3, 90.0],  # full height
        [30.4, 20.1, 43.0, 37.0],  # touches right and bottom
        [9.0, 9.0, 5.0, 5.0],  # turned round
        [2.0, 2.0, 2.0, 8.0],  # no width
    ]
)


def random_maps(count, side, seed=0):
    return torch.rand(count, side, side, generator=torch.Generator().manual_seed(seed))


def differing(device, maps, boxes, size, threshold=0.5):
    """In how many pixels kernels and twin differ; they agree in all else, down to the bits that fill the words up."""
    expected = paste_masks_torch(maps, boxes, size, threshold)
    windows, words = paste_masks_triton(maps.to(device), boxes.to(device), size, threshold)
    assert windows.cpu().tolist() == expected.windows.tolist()
    used = int(num_words(expected.windows).sum())
    # Memory comes filled with the largest integer (conftest.py): what is behind the last window was left alone.
    assert (words[used:] == torch.iinfo(torch.int32).max).all()
    different = words[:used].cpu() ^ pack_windows(expected.windows, expected.pixels)
    return int((different[:, None] >> torch.arange(32, dtype=torch.int32) & 1).sum())


def test_half_a_map_fills_half_its_box_by_hand(device):
    left = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], device=device)
    masks = Masks((4, 10), *paste_masks_triton(left, torch.tensor([[0.0, 0.0, 8.0, 4.0]], device=device), (4, 10), 0.5))
    outer, inner = [0, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert masks.to_bool()[0].int().tolist() == [outer, inner, inner, outer]


@pytest.mark.parametrize("side", [1, 28])
@pytest.mark.parametrize("threshold", [0.5, 0.1])
def test_strange_boxes_equal_the_twin(side, threshold, device):
    assert differing(device, random_maps(len(EDGE_BOXES), side), EDGE_BOXES, (37, 43), threshold) <= 1


@settings(derandomize=True, deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.tuples(st.integers(1, 80), st.integers(1, 80)), side=st.integers(1, 33), seed=st.integers(0, 2**20))
def test_any_size_equals_the_twin(size, side, seed, device):
    corners = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3
    boxes = (corners * torch.tensor([size[1], size[0]])).sort(1).values.flatten(1)
    assert differing(device, random_maps(3, side, seed), boxes, size) <= 1


@pytest.mark.parametrize("count", [0, 1, 128, 129])
def test_any_number_of_maps(count, device):
    boxes = torch.rand(count, 4, generator=torch.Generator().manual_seed(count)) * 5
    boxes[:, 2:] += boxes[:, :2]
    assert differing(device, random_maps(count, 3), boxes, (7, 8)) <= 1


def test_any_strides_and_types_of_the_inputs(device):
    maps, boxes = random_maps(4, 6).transpose(1, 2), EDGE_BOXES[3:7].T.contiguous().T
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert differing(device, maps.to(dtype), boxes, (37, 43)) <= 1


def test_a_value_exactly_at_the_threshold_is_inside(device):
    maps, boxes = torch.full((1, 4, 4), 0.375, device=device), torch.tensor([[0.0, 0.0, 16.0, 8.0]], device=device)
    for threshold, filled in ((0.375, 12 * 6), (0.3750001, 0)):
        masks = Masks((8, 20), *paste_masks_triton(maps, boxes, (8, 20), threshold))
        # The outermost rows and columns mix with the zeros around.
        assert int(masks.to_bool()[0, 1:7, 2:14].sum()) == int(masks.area()) == filled


@pytest.mark.parametrize("side", [1, 5])
def test_soft_pasting_equals_the_twin(side, device):
    maps = random_maps(len(EDGE_BOXES), side)
    soft = paste_soft_triton(maps.to(device), EDGE_BOXES.to(device), (37, 43))
    torch.testing.assert_close(soft.cpu(), paste_soft_torch(maps, EDGE_BOXES, (37, 43)), rtol=0, atol=1e-5)


def test_the_public_functions_run_the_kernels(device, monkeypatch):
    maps, boxes = random_maps(2, 6), torch.tensor([[1.0, 2.0, 20.0, 30.0], [-3.0, -3.0, 50.0, 50.0]])
    masks, soft = paste_masks(maps, boxes, (37, 43)), paste_soft(maps, boxes, (37, 43))
    assert not masks.is_packed
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    ours = paste_masks(maps.to(device), boxes.to(device), (37, 43))
    assert ours.is_packed
    assert ours.to_rle() == masks.to_rle()
    torch.testing.assert_close(paste_soft(maps.to(device), boxes.to(device), (37, 43)).cpu(), soft, rtol=0, atol=1e-5)


class Pasted(torch.nn.Module):
    """Logits and boxes to dense masks, as a model does it."""

    def forward(self, logits, boxes):
        maps = logits.sigmoid()
        masks = paste_masks(maps, boxes, (37, 43))
        return masks.to_bool(), masks.windows, paste_soft(maps, boxes, (37, 43)) * 2


def test_compile_and_export_see_through():
    logits, boxes = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0)), EDGE_BOXES[2:7]
    model = Pasted()
    expected = model(logits, boxes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(logits, boxes), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    count = torch.export.Dim("count", min=2, max=1000)
    program = torch.export.export(model, (logits, boxes), dynamic_shapes=({0: count}, {0: count}))
    for ours, theirs in zip(program.module()(logits[:3], boxes[:3]), expected, strict=True):
        torch.testing.assert_close(ours, theirs[:3])


def test_the_custom_ops_are_what_the_compiler_needs():
    inputs = random_maps(3, 6), EDGE_BOXES[2:5], [37, 43]
    torch.library.opcheck(torch.ops.onestage.paste_masks.default, (*inputs, 0.5))
    torch.library.opcheck(torch.ops.onestage.paste_soft.default, inputs)
