import math

import pytest
import torch
from torch.nn import functional as F

from onestage.ops.assemble import assemble_masks, assemble_soft, crop_window
from onestage.testing import coco_like_boxes, dense_masks, dense_soft_masks, dense_two_class_masks

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
    ]
)


def differing(masks, dense):
    assert masks.size == tuple(dense.shape[1:])
    return int((masks.to_bool() != dense).sum())


def test_crop_windows_by_hand():
    boxes = torch.tensor([[10.3, 2.0, 20.7, 4.0], [-5.0, 1.5, 3.0, 99.0]])
    assert crop_window(boxes, (30, 40)).tolist() == [[11, 2, 21, 4], [0, 2, 3, 30]]
    # The example of YOLACT's rule: x from 10.3 to 20.7 keeps columns 10 to 21.
    assert crop_window(boxes, (30, 40), "margin").tolist() == [[10, 1, 22, 5], [0, 1, 4, 30]]
    # Padding: max(1, 0.1 * 11.4) = 1.14 and max(1, 0.1 * 3) = 1; 0.1 * 9 = 0.9 gives 1.
    assert crop_window(boxes, (30, 40), "expand", padding=0.1).tolist() == [[9, 1, 21, 5], [0, 0, 4, 30]]
    assert crop_window(boxes, (30, 40), "expand").tolist() == [[10, 2, 20, 4], [0, 1, 3, 30]]


def test_crop_windows_of_strange_boxes_are_empty_and_inside():
    windows = crop_window(EDGE_BOXES, (12, 14))
    assert (windows[:, 2:] >= windows[:, :2]).all()
    assert (windows >= 0).all()
    assert (windows <= torch.tensor([14, 12, 14, 12])).all()
    areas = (windows[:, 2:] - windows[:, :2]).prod(1)
    assert areas.tolist() == [1, 0, 168, 0, 49, 84, 0, 0]


def test_one_cell_of_one_map_by_hand():
    basis = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    soft = assemble_soft(basis, torch.tensor([[1.0]]), crop_window(boxes, (2, 2)))
    expected = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]).sigmoid() * torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(soft, expected)


def test_sub_regions_meet_just_right_of_the_centre_by_hand():
    basis = torch.ones(1, 1, 9)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 1.0], [0.5, 0.0, 7.5, 1.0]])
    coefficients = torch.tensor([[-9.0, 9.0], [-9.0, 9.0]])
    soft = assemble_soft(basis, coefficients, crop_window(boxes, (1, 9)), boxes=boxes, grid=(1, 2))
    # The border of the first box lies at 4.05: column 4 is still left. Of the second at 0.5 + 3.55.
    assert (soft > 0.5).int().tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1, 0]], [[0, 0, 0, 0, 0, 1, 1, 1, 0]]]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4)])
@pytest.mark.parametrize("upsample", [1, 2, 4])
def test_soft_masks_equal_the_dense_formula(grid, upsample):
    generator = torch.Generator().manual_seed(grid[0])
    basis = torch.randn(5, 7, 9, generator=generator)
    boxes = torch.cat((EDGE_BOXES, torch.rand(8, 4, generator=generator) * 9 * upsample))
    boxes[8:, 2:] += boxes[8:, :2]
    coefficients = torch.randn(len(boxes), grid[0] * grid[1] * 5, generator=generator)
    windows = crop_window(boxes, (7 * upsample, 9 * upsample))
    soft = assemble_soft(basis, coefficients, windows, boxes=boxes, grid=grid, upsample=upsample)
    expected = dense_soft_masks(basis, coefficients, boxes, grid=grid, upsample=upsample)
    torch.testing.assert_close(soft, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("upsample", "grid", "resized_size", "output_size"),
    [
        (1, (1, 1), (41, 53), (41, 53)),
        (1, (2, 2), (13, 90), (13, 90)),  # fewer rows than the grid has
        (4, (2, 2), (96, 120), (91, 113)),  # the padding is cut off
        (4, (2, 2), (95, 119), (97, 121)),  # the floor loses a row: it stays empty
        (2, (3, 3), (48, 60), (30, 61)),
        (4, (1, 2), (48, 60), (48, 60)),
        (1, (1, 1), (1, 1), (1, 1)),
    ],
)
def test_probability_order_equals_the_dense_formula(upsample, grid, resized_size, output_size):
    generator = torch.Generator().manual_seed(upsample)
    height, width = 12 * upsample, 15 * upsample
    basis = torch.randn(6, 15, 12, generator=generator).transpose(1, 2)  # not contiguous
    boxes = torch.cat((EDGE_BOXES, coco_like_boxes(20, (height, width), generator)))
    coefficients = torch.randn(len(boxes), grid[0] * grid[1] * 6, generator=generator)
    masks = assemble_masks(
        basis,
        coefficients,
        crop_window(boxes, (height, width)),
        boxes=boxes,
        grid=grid,
        upsample=upsample,
        threshold=0.4,
        resized_size=resized_size,
        output_size=output_size,
    )
    soft = dense_soft_masks(basis, coefficients, boxes, grid=grid, upsample=upsample)
    assert differing(masks, dense_masks(soft, 0.4, resized_size, output_size)) == 0
    assert len(masks) == 28
    assert masks.area()[3] == 0


def test_margin_rule_equals_the_dense_formula():
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(32, 40, 40, generator=generator)
    boxes = coco_like_boxes(30, (40, 40), generator)
    coefficients = torch.randn(30, 32, generator=generator)
    windows = crop_window(boxes, (40, 40), "margin")
    masks = assemble_masks(basis, coefficients, windows, output_size=(97, 131))
    soft = dense_soft_masks(basis, coefficients, boxes, rule="margin")
    assert differing(masks, dense_masks(soft, 0.5, (97, 131), (97, 131))) == 0


def test_logits_order_with_two_resizes_equals_the_dense_formula():
    generator = torch.Generator().manual_seed(6)
    basis = torch.randn(8, 10, 14, generator=generator)
    background, foreground = torch.randn(2, 12, 8, generator=generator)
    boxes = torch.cat(
        (coco_like_boxes(9, (71, 99), generator), torch.tensor([[0, 0, 99, 71], [5, 5, 5, 9], [98, 70, 120, 90]]))
    )
    windows = crop_window(boxes, (71, 99), "expand", padding=0.1)
    masks = assemble_masks(
        basis,
        foreground - background,
        windows,
        upsample=4,
        order="logits",
        threshold=0.4,
        valid_size=(38, 53),
        output_size=(71, 99),
        align_corners=True,
    )
    soft = dense_two_class_masks(
        basis, background, foreground, windows, padded_size=(40, 56), resized_size=(38, 53), output_size=(71, 99)
    )
    assert differing(masks, soft > 0.4) == 0
    assert int(masks.area().sum()) > 1000


def test_valid_size_cuts_the_padding_before_the_resize():
    generator = torch.Generator().manual_seed(7)
    basis = torch.randn(4, 10, 12, generator=generator)
    boxes = torch.tensor([[0.0, 0.0, 12.0, 10.0], [1.5, 2.0, 8.0, 9.5]])
    coefficients = torch.randn(2, 4, generator=generator)
    masks = assemble_masks(basis, coefficients, crop_window(boxes, (10, 12)), valid_size=(7, 9), output_size=(25, 30))
    soft = dense_soft_masks(basis, coefficients, boxes)[:, :7, :9]
    assert differing(masks, dense_masks(soft, 0.5, (25, 30), (25, 30))) == 0


def test_a_value_exactly_at_the_threshold_is_outside():
    basis = torch.zeros(1, 4, 4)
    windows = torch.tensor([[0, 0, 4, 4]])
    for order in ("prob", "logits"):
        masks = assemble_masks(basis, torch.ones(1, 1), windows, order=order, output_size=(4, 4))
        assert masks.area().tolist() == [0]
    above = assemble_masks(
        basis, torch.ones(1, 1), windows, threshold=math.nextafter(0.5, 0) - 1e-6, output_size=(4, 4)
    )
    assert above.area().tolist() == [16]


def test_no_detections_give_no_masks():
    masks = assemble_masks(
        torch.rand(3, 4, 5),
        torch.rand(0, 12),
        torch.zeros(0, 4, dtype=torch.int64),
        boxes=torch.rand(0, 4),
        grid=(2, 2),
        output_size=(8, 9),
    )
    assert len(masks) == 0
    assert masks.size == (8, 9)
    assert assemble_soft(torch.rand(3, 4, 5), torch.rand(0, 3), masks.windows).shape == (0, 4, 5)


def test_half_precision_inputs_are_computed_in_float32():
    generator = torch.Generator().manual_seed(8)
    basis = torch.randn(16, 9, 9, generator=generator).bfloat16()
    coefficients = torch.randn(3, 16, generator=generator).bfloat16()
    windows = torch.tensor([[0, 0, 9, 9], [2, 1, 8, 4], [0, 5, 3, 9]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft = assemble_soft(basis, coefficients, windows)
    torch.testing.assert_close(soft, assemble_soft(basis.float(), coefficients.float(), windows))


def test_sub_regions_in_logits_order_are_refused():
    windows = torch.tensor([[0, 0, 4, 4]])
    with pytest.raises(ValueError, match="no sub-regions"):
        assemble_masks(torch.rand(1, 4, 4), torch.rand(1, 4), windows, grid=(2, 2), order="logits", output_size=(4, 4))


def test_golden_sub_region_masks(golden):
    case = golden("sipmask_smp")
    grids = {"2x2": {"cof": case["cof"], "pruned": case["pruned"], "rows": 2, "cols": 2}, **case["grids"]}
    boxes = case["boxes_mask_px"]
    windows = crop_window(boxes, tuple(case["basis"].shape[1:]))
    for expected in grids.values():
        grid = (expected["rows"], expected["cols"])
        soft = assemble_soft(case["basis"], expected["cof"], windows, boxes=boxes, grid=grid)
        torch.testing.assert_close(soft, expected["pruned"].permute(2, 0, 1), rtol=0, atol=1e-5)
        dense = dense_soft_masks(case["basis"], expected["cof"], boxes, grid=grid)
        torch.testing.assert_close(dense, expected["pruned"].permute(2, 0, 1), rtol=0, atol=1e-5)


def test_golden_crop_of_ground_truth(golden):
    case = golden("sipmask_smp")
    for (x0, y0, x1, y1), whole, cropped in zip(
        crop_window(case["boxes_mask_px"], tuple(case["basis"].shape[1:])).tolist(),
        case["gt_half"].permute(2, 0, 1),
        case["gt_cropped"].permute(2, 0, 1),
        strict=True,
    ):
        expected = torch.zeros_like(whole)
        expected[y0:y1, x0:x1] = whole[y0:y1, x0:x1]
        assert torch.equal(expected, cropped)


def test_golden_upsampled_masks_agree_in_every_pixel(golden):
    case = golden("sipmask_smp")
    boxes, size = case["boxes_mask_px"], tuple(case["infer"]["out_hw"])
    windows = crop_window(boxes, tuple(case["basis"].shape[1:]))
    for name, threshold in (("bin_040", 0.4), ("bin_050", 0.5)):
        masks = assemble_masks(
            case["basis"],
            case["cof"],
            windows,
            boxes=boxes,
            grid=(2, 2),
            threshold=threshold,
            output_size=size,
        )
        assert differing(masks, case["infer"][name] > 0) == 0
    soft = assemble_soft(case["basis"], case["cof"], windows, boxes=boxes, grid=(2, 2))
    resized = F.interpolate(soft[None], size=size, mode="bilinear")[0]
    torch.testing.assert_close(resized, case["infer"]["soft_up"], rtol=0, atol=1e-5)


def test_golden_correlation_masks_of_both_crops(golden):
    case = golden("rdsnet_corr_crop")
    for i, meta in enumerate(case["metas"]):
        padded, resized = tuple(meta["pad_shape"].tolist()), tuple(meta["img_shape"].tolist())
        size = tuple(meta["ori_shape"].tolist())
        basis = case["pixel_reps"][i][:, : padded[0] // 4, : padded[1] // 4]
        background, foreground = case["obj_reps"][i].split(32, 1)
        boxes = case["boxes_ori"][i]
        cropped = (case["masks_cropped_r12"][i] > 0.4, case["masks_cropped_r10"][i] > 0)
        for padding, expected in zip((0.1, 0.0), cropped, strict=True):
            masks = assemble_masks(
                basis,
                foreground - background,
                crop_window(boxes, size, "expand", padding=padding),
                upsample=4,
                order="logits",
                threshold=0.4,
                valid_size=resized,
                output_size=size,
                align_corners=True,
            )
            assert differing(masks, expected) <= 1e-3 * expected.sum()
        windows = crop_window(boxes, size, "expand", padding=0.1)
        soft = dense_two_class_masks(
            basis, background, foreground, windows, padded_size=padded, resized_size=resized, output_size=size
        )
        torch.testing.assert_close(soft, case["masks_cropped_r12"][i], rtol=0, atol=1e-5)


def test_golden_prototype_masks_with_margin(golden):
    case = golden("rdsnet_yolact_lc")
    for prototypes, found in zip(case["proto"], case["detections"], strict=True):
        basis, boxes = prototypes.permute(2, 0, 1), found["box_rel"][:15] * 40
        width, height = found["size_wh"].tolist()
        windows = crop_window(boxes, (40, 40), "margin")
        coefficients = found["coeff"][:15]
        soft = assemble_soft(basis, coefficients, windows)
        torch.testing.assert_close(soft, found["soft_proto_res"], rtol=0, atol=1e-5)
        masks = assemble_masks(basis, coefficients, windows, output_size=(height, width))
        assert differing(masks, found["masks"] > 0) <= 1e-4 * found["masks"].numel()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["prob", "logits"])
def test_cuda_tensors_give_the_masks_of_the_cpu(order):
    generator = torch.Generator().manual_seed(9)
    basis, boxes = torch.randn(8, 20, 24, generator=generator), coco_like_boxes(20, (80, 96), generator)
    grid = (2, 2) if order == "prob" else (1, 1)
    coefficients = torch.randn(20, 8 * grid[0] * grid[1], generator=generator)
    masks = [
        assemble_masks(
            basis.to(where),
            coefficients.to(where),
            crop_window(boxes.to(where), (80, 96)),
            boxes=boxes.to(where),
            grid=grid,
            upsample=4,
            order=order,
            output_size=(120, 150),
        )
        for where in ("cpu", "cuda")
    ]
    assert masks[1].device.type == "cuda"
    assert torch.equal(masks[1].windows.cpu(), masks[0].windows)
    assert (masks[1].to_bool().cpu() != masks[0].to_bool()).sum() <= 2
    assert len(masks[1].to_rle()) == 20
