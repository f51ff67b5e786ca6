"""The kernels of mask assembly against the plain-torch twin: in Triton's interpreter, or compiled where a GPU is."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onestage.masks import Masks
from onestage.ops.assemble import (
    assemble_masks,
    assemble_masks_torch,
    assemble_soft,
    assemble_soft_torch,
    crop_window,
    crop_window_torch,
)
from onestage.ops.packed import num_words, pack_windows
from onestage.ops.triton.assemble import assemble_masks_triton, assemble_soft_triton, crop_window_triton

EDGE_BOXES = torch.tensor(
    [
        [3.0, 4.0, 4.0, 5.0],  # one cell
        [3.2, 4.4, 3.9, 4.9],  # between cells
        [0.0, 0.0, 1000.0, 1000.0],  # beyond every side
        [-30.0, -40.0, -10.0, -5.0],  # outside
        [0.0, 2.0, 6.5, 9.0],  # touches the left side
        [5.0, -3.0, 11.3, 1000.0],  # full height
        [9.0, 9.0, 5.0, 5.0],  # turned round
        [2.0, 2.0, 2.0, 8.0],  # no width
        [700.0, 800.0, 900.0, 900.0],  # behind the last cell
        [6.3, 5.7, 900.0, 11.2],  # touches the right side
    ]
)


def inputs(size, count, depth, grid=(1, 1), seed=0):
    """Basis, coefficients of sub-regions, and a generator for more."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(depth, *size, generator=generator)
    return basis, torch.randn(count, grid[0] * grid[1] * depth, generator=generator), generator


def differing(device, basis, coefficients, windows, *, boxes=None, **how):
    """In how many pixels kernels and twin differ; they agree in all else, down to the bits that fill the words up."""
    expected = assemble_masks_torch(basis, coefficients, windows, boxes=boxes, **how)
    image_windows, words = assemble_masks_triton(
        basis.to(device),
        coefficients.to(device),
        windows.to(device),
        boxes=None if boxes is None else boxes.to(device),
        **how,
    )
    assert image_windows.cpu().tolist() == expected.windows.tolist()
    used = int(num_words(expected.windows).sum())
    # Memory comes filled with the largest integer (conftest.py): what is behind the last window was left alone.
    assert (words[used:] == torch.iinfo(torch.int32).max).all()
    different = words[:used].cpu() ^ pack_windows(expected.windows, expected.pixels)
    shifts = torch.arange(32, dtype=torch.int32)
    return int((different[:, None] >> shifts & 1).sum())


@settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    boxes=st.lists(st.lists(st.floats(-40, 90, width=32) | st.integers(-3, 30).map(float), min_size=4, max_size=4)),
    rule=st.sampled_from(["half_open", "margin", "expand"]),
    padding=st.sampled_from([0.0, 0.05, 0.1]),
)
def test_crop_windows_equal_the_twin(boxes, rule, padding, device):
    boxes = torch.tensor([*boxes, *EDGE_BOXES.tolist()])
    windows = crop_window_triton(boxes.to(device), (31, 47), rule, padding)
    assert windows.tolist() == crop_window_torch(boxes, (31, 47), rule, padding).tolist()


def test_crop_windows_of_any_number_and_stride(device, monkeypatch):
    boxes = torch.rand(129, 8, generator=torch.Generator().manual_seed(0)).mul(40)[:, ::2]
    expected = crop_window(boxes, (31, 47))
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    assert crop_window(boxes.to(device), (31, 47)).tolist() == expected.tolist()
    assert crop_window(boxes[:0].to(device), (31, 47)).shape == (0, 4)
    nowhere = crop_window(torch.full((1, 4), torch.nan, device=device), (31, 47))[0].tolist()
    assert 0 <= nowhere[0] <= nowhere[2] <= 47
    assert 0 <= nowhere[1] <= nowhere[3] <= 31


@pytest.mark.parametrize(
    ("upsample", "grid", "valid_size", "resized_size", "output_size", "align_corners"),
    [
        (1, (1, 1), None, None, (41, 70), False),  # one resize, any scale
        (1, (1, 1), (8, 9), (33, 64), (29, 70), True),  # padding, and a canvas that is cut off and too narrow
        (1, (2, 2), None, None, (7, 9), False),  # smaller than the basis
        (1, (3, 1), None, None, (65, 31), False),
        (4, (2, 2), (39, 45), (72, 60), (70, 61), False),  # SipMask's two steps
        (2, (1, 2), None, (24, 28), (24, 28), False),
        (1, (1, 1), None, None, (1, 1), False),
    ],
)
def test_probability_order_equals_the_twin(
    upsample, grid, valid_size, resized_size, output_size, align_corners, device
):
    basis, coefficients, generator = inputs((12, 11), len(EDGE_BOXES) + 2, 5, grid)
    more = torch.rand(2, 4, generator=generator) * 10
    boxes = torch.cat((EDGE_BOXES * upsample, torch.cat((more[:, :2], more.sum(1, keepdim=True) + more[:, 2:]), 1)))
    windows = crop_window(boxes, (12 * upsample, 11 * upsample))
    how = {"valid_size": valid_size, "resized_size": resized_size, "align_corners": align_corners, "threshold": 0.4}
    how |= {"boxes": boxes, "grid": grid, "upsample": upsample, "output_size": output_size}
    assert differing(device, basis, coefficients, windows, **how) <= 1


@pytest.mark.parametrize(
    ("upsample", "valid_size", "output_size", "align_corners"),
    [(1, None, (41, 70), False), (4, (38, 40), (35, 43), True), (4, None, (48, 44), False), (2, (1, 1), (33, 3), True)],
)
def test_logits_order_equals_the_twin(upsample, valid_size, output_size, align_corners, device):
    basis, coefficients, _ = inputs((12, 11), len(EDGE_BOXES), 6)
    windows = crop_window(EDGE_BOXES * 3, output_size, "expand", padding=0.1)
    how = {"valid_size": valid_size, "align_corners": align_corners, "threshold": 0.4, "order": "logits"}
    assert differing(device, basis, coefficients, windows, upsample=upsample, output_size=output_size, **how) <= 1


@settings(derandomize=True, deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    output_size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    depth=st.integers(1, 40),
    grid=st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]),
    upsample=st.sampled_from([1, 1, 2, 3]),
    order=st.sampled_from(["prob", "logits"]),
    seed=st.integers(0, 2**20),
)
def test_any_size_equals_the_twin(size, output_size, depth, grid, upsample, order, seed, device):
    grid = grid if order == "prob" else (1, 1)
    basis, coefficients, generator = inputs(size, 3, depth, grid, seed)
    extent = (size[0] * upsample, size[1] * upsample) if order == "prob" else output_size
    corners = (torch.rand(3, 2, 2, generator=generator) * 1.4 - 0.2) * torch.tensor([extent[1], extent[0]])
    boxes = corners.sort(1).values.flatten(1)
    windows = crop_window(boxes, extent, "margin")
    how = {"boxes": boxes, "grid": grid, "upsample": upsample, "order": order, "output_size": output_size}
    assert differing(device, basis, coefficients, windows, **how) <= 1


@pytest.mark.parametrize(
    ("count", "grid"), [(0, (1, 1)), (1, (1, 1)), (128, (1, 1)), (129, (1, 1)), (0, (2, 2)), (33, (2, 2))]
)
def test_any_number_of_detections(count, grid, device):
    basis, coefficients, generator = inputs((5, 6), count, 3, grid)
    boxes = torch.rand(count, 4, generator=generator) * 4
    boxes[:, 2:] += boxes[:, :2]
    windows = crop_window(boxes, (5, 6))
    assert differing(device, basis, coefficients, windows, boxes=boxes, grid=grid, output_size=(7, 8)) <= 1


@pytest.mark.parametrize("depth", [1, 4, 33, 70])
def test_any_number_of_channels(depth, device):
    basis, coefficients, _ = inputs((9, 17), 3, depth)
    windows = torch.tensor([[0, 0, 17, 9], [4, 3, 5, 4], [7, 0, 17, 2]])
    assert differing(device, basis, coefficients, windows, output_size=(20, 30)) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_strides_and_types_of_the_inputs(dtype, device):
    basis, coefficients, _ = inputs((9, 17), 3, 6)
    windows = torch.tensor([[0, 0, 17, 9], [4, 3, 5, 4], [7, 0, 17, 2]])
    last = basis.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided = coefficients.T.contiguous().T
    columns = windows.T.contiguous().T
    assert differing(device, last.to(dtype), strided.to(dtype), columns, output_size=(20, 30)) <= 1
    view = torch.stack((basis, -basis), 3)[..., 0]
    assert differing(device, view, strided, columns, output_size=(20, 30)) <= 1


@pytest.mark.parametrize("order", ["prob", "logits"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_a_value_exactly_at_the_threshold_is_outside(order, upsample, device):
    zeros = torch.zeros(2, 6, 6, device=device)
    for output_size, windows in (((6, 6), [[0, 0, 6, 6]]), ((13, 35), [[0, 0, 35, 13]])):
        rest = torch.ones(1, 2, device=device), torch.tensor(windows, device=device)
        how = {"order": order, "upsample": upsample, "output_size": output_size}
        assert int(Masks(output_size, *assemble_masks_triton(zeros, *rest, **how)).area()) == 0
        inside = Masks(output_size, *assemble_masks_triton(zeros, *rest, threshold=0.499999, **how))
        assert int(inside.area()) == int((inside.windows[0, 2:] - inside.windows[0, :2]).prod()) > 0


def test_maxima_of_columns_and_rows_equal_the_twins(device):
    basis, coefficients, _ = inputs((10, 12), 4, 4)
    windows = torch.tensor([[0, 0, 70, 37], [12, 8, 41, 30], [3, 3, 3, 3], [69, 36, 70, 37]])
    how = {"upsample": 4, "order": "logits", "valid_size": (38, 47), "output_size": (37, 70), "align_corners": True}
    expected, ours = ([torch.full((4, extent), -torch.inf) for extent in (70, 37)] for _ in range(2))
    assemble_masks_torch(basis, coefficients, windows, maxima=(expected[0], expected[1]), **how)
    columns, rows = (part.to(device) for part in ours)
    moved = basis.to(device), coefficients.to(device), windows.to(device)
    assemble_masks_triton(*moved, maxima=(columns, rows), **how)
    torch.testing.assert_close(columns.cpu(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.cpu(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("grid", "upsample"), [((1, 1), 1), ((1, 1), 4), ((2, 2), 1), ((3, 2), 4)])
def test_soft_masks_equal_the_twin(grid, upsample, device):
    basis, coefficients, _ = inputs((12, 11), len(EDGE_BOXES), 5, grid)
    boxes = EDGE_BOXES * upsample
    windows = crop_window(boxes, (12 * upsample, 11 * upsample))
    expected = assemble_soft_torch(basis, coefficients, windows, boxes=boxes, grid=grid, upsample=upsample)
    moved = basis.to(device), coefficients.to(device), windows.to(device)
    soft = assemble_soft_triton(*moved, boxes=boxes.to(device), grid=grid, upsample=upsample)
    torch.testing.assert_close(soft.cpu(), expected, rtol=0, atol=2e-6)


def test_sub_regions_in_logits_order_are_refused():
    windows = torch.tensor([[0, 0, 4, 4]])
    with pytest.raises(ValueError, match="no sub-regions"):
        assemble_masks_triton(
            torch.rand(1, 4, 4), torch.rand(1, 4), windows, grid=(2, 2), order="logits", output_size=(4, 4)
        )


def test_the_public_functions_run_the_kernels(device, monkeypatch):
    basis, coefficients, _ = inputs((6, 7), 2, 3)
    windows = torch.tensor([[0, 0, 7, 6], [2, 1, 5, 3]])
    masks = assemble_masks(basis, coefficients, windows, output_size=(20, 30))
    soft = assemble_soft(basis, coefficients, windows)
    assert not masks.is_packed
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    moved = basis.to(device), coefficients.to(device), windows.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = assemble_masks(*moved, output_size=(20, 30))
        our_soft = assemble_soft(*moved)
    assert ours.is_packed
    assert ours.to_rle() == masks.to_rle()
    torch.testing.assert_close(our_soft.cpu(), soft)


def test_the_custom_ops_are_what_the_compiler_needs():
    basis, coefficients, _ = inputs((6, 7), 2, 3, (2, 2))
    boxes = torch.tensor([[0.0, 0.0, 7.0, 6.0], [2.2, 1.0, 5.0, 3.7]])
    inside = basis, coefficients, crop_window(boxes, (6, 7)), boxes
    how = {"grid": [2, 2], "upsample": 1, "order": "prob", "threshold": 0.5, "valid_size": None}
    how |= {"resized_size": None, "output_size": [20, 30], "align_corners": False}
    torch.library.opcheck(torch.ops.onestage.assemble_masks.default, inside, how)
    torch.library.opcheck(torch.ops.onestage.assemble_soft.default, inside, {"grid": [2, 2], "upsample": 2})
    torch.library.opcheck(torch.ops.onestage.crop_window.default, (boxes, [6, 7], "expand", 0.1))


class Assembled(torch.nn.Module):
    """Boxes and coefficients to dense masks and packed words, as a model does it."""

    def forward(self, basis, coefficients, boxes):
        windows = crop_window(boxes, (12, 14))
        masks = assemble_masks(basis, coefficients, windows, upsample=2, output_size=(20, 30))
        return masks.to_bool(), masks.windows, assemble_soft(basis, coefficients, windows, upsample=2) * 2


def test_compile_and_export_see_through():
    basis, coefficients, _ = inputs((6, 7), 4, 3)
    boxes = torch.tensor([[0.0, 0.0, 14.0, 12.0], [2.2, 1.0, 5.0, 3.7], [3, 3, 3, 3], [9, 9, 14, 10]])
    model = Assembled()
    expected = model(basis, coefficients, boxes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(basis, coefficients, boxes), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    count = torch.export.Dim("count", min=2, max=1000)
    program = torch.export.export(model, (basis, coefficients, boxes), dynamic_shapes=(None, {0: count}, {0: count}))
    fewer = program.module()(basis, coefficients[:3], boxes[:3])
    for ours, theirs in zip(fewer, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:3])
