import numpy as np
import pytest
import torch

from onestage.ops.paste import cut_mask, paste_masks, paste_soft, with_masks
from onestage.structures import Detections
from onestage.testing import coco_like_boxes, dense_paste


def test_a_full_map_fills_its_box_by_hand():
    masks = paste_masks(torch.ones(1, 4, 4), torch.tensor([[2.0, 1.0, 6.0, 4.0]]), (6, 9))
    expected = torch.zeros(1, 6, 9, dtype=torch.bool)
    expected[0, 1:4, 2:6] = True
    assert torch.equal(masks.to_bool(), expected)


def test_half_a_map_fills_half_its_box_by_hand():
    left = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    masks = paste_masks(left, torch.tensor([[0.0, 0.0, 8.0, 4.0]]), (4, 10))
    # Along x the pixels 0 to 3 take 0.625, 0.875, 0.875, 0.625 of the left column, pixel 4 takes 0.375; along y it is
    # 0.75, 1, 1, 0.75, the rest is the zero around the map. 0.625 x 0.75 is below one half.
    outer, inner = [0, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert masks.to_bool()[0].int().tolist() == [outer, inner, inner, outer]


@pytest.mark.parametrize("side", [1, 28, 32])
def test_pasting_equals_dense_sampling(side):
    generator = torch.Generator().manual_seed(side)
    boxes = torch.cat(
        (
            coco_like_boxes(20, (90, 110), generator),
            torch.tensor(
                [[-20.0, -30.0, 200.0, 300.0], [3.2, 4.4, 3.9, 4.9], [100.5, 80.2, 130.0, 99.0], [200, 10, 250, 20]]
            ),
        )
    )
    maps = torch.rand(len(boxes), side, side, generator=generator)
    for threshold in (0.5, 0.2):
        masks = paste_masks(maps, boxes, (90, 110), threshold)
        dense = dense_paste(maps, boxes, (90, 110))
        different = masks.to_bool() != (dense >= threshold)
        assert (different & ((dense - threshold).abs() > 1e-5)).sum() == 0
        assert different.sum() <= 2
    assert masks.area()[-1] == 0


def test_boxes_without_area_have_empty_masks():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [5.0, 9.0, 7.0, 5.0]])
    assert paste_masks(torch.ones(2, 3, 3), boxes, (20, 20)).area().tolist() == [0, 0]
    assert len(paste_masks(torch.ones(0, 3, 3), boxes[:0], (20, 20))) == 0


def test_golden_pasted_masks(golden):
    case = golden("meinst_infer")
    for name in ("many", "few", "thresh_with_ctr"):
        for i, size in enumerate(case["output_sizes"].tolist()):
            found, expected = f"{name}/img{i}/net/", f"{name}/img{i}/post/"
            vertical, horizontal = (torch.tensor(size) / case["image_sizes"][i]).tolist()
            boxes = case[found + "boxes"] * torch.tensor([horizontal, vertical, horizontal, vertical])
            boxes = boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
            kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
            masks = paste_masks(case[found + "masks28"][kept, 0], boxes[kept], tuple(size))
            packed = np.unpackbits(case[expected + "masks_packed"].numpy(), axis=1)[:, : size[0] * size[1]]
            pasted = torch.from_numpy(packed).view(-1, *size).bool()
            assert len(pasted) == len(masks)
            assert (masks.to_bool() != pasted).sum() <= 1e-3 * pasted.sum()


@pytest.mark.gpu
def test_cuda_tensors_give_the_masks_of_the_cpu():
    generator = torch.Generator().manual_seed(2)
    maps, boxes = torch.rand(20, 28, 28, generator=generator), coco_like_boxes(20, (90, 110), generator)
    on_cpu, on_gpu = (paste_masks(maps.to(where), boxes.to(where), (90, 110)) for where in ("cpu", "cuda"))
    assert (on_gpu.to_bool().cpu() != on_cpu.to_bool()).sum() <= 2


def test_soft_pasting_equals_dense_sampling():
    generator = torch.Generator().manual_seed(4)
    boxes = torch.cat((coco_like_boxes(10, (40, 50), generator), torch.tensor([[-9.0, -9.0, 30.0, 60.0]])))
    maps = torch.rand(11, 28, 28, generator=generator)
    torch.testing.assert_close(paste_soft(maps, boxes, (40, 50)), dense_paste(maps, boxes, (40, 50)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("box", [(0, 0, 28, 28), (50, 30, 78, 58), (100, 100, 128, 128)])
def test_a_bitmap_is_read_as_it_is_where_a_cell_is_a_pixel(box):
    generator = torch.Generator().manual_seed(0)
    bitmap = (torch.rand(128, 128, generator=generator) > 0.5).byte()
    mask = cut_mask(bitmap, torch.tensor(box, dtype=torch.float32), 28)
    assert torch.equal(mask, bitmap[box[1] : box[3], box[0] : box[2]])


def test_detections_get_masks_in_the_form_that_is_asked_for():
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 1.0, 16.0, 14.0], [10.0, 3.0, 29.0, 22.0]])
    found = Detections((24, 30), boxes, torch.ones(2), torch.zeros(2, dtype=torch.int64))
    soft = with_masks(found, maps, "soft", 0.4).soft_masks
    assert torch.equal(soft, paste_soft(maps, boxes, (24, 30)))
    assert torch.equal(with_masks(found, maps, "binary", 0.4).masks.to_bool(), soft >= 0.4)
    assert torch.equal(with_masks(found, maps, "lowres", 0.4).soft_masks, maps)
