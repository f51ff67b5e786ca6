import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from onestage.errors import DatasetError
from onestage.masks import Masks

SIZES = [(1, 1), (5, 7), (8, 1), (1, 9), (30, 20)]


def random_masks(size: tuple[int, int], seed: int, count: int = 6) -> torch.Tensor:
    """[count, *size] bool of several densities; the first is empty, the second full."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(count, 1, 1, generator=generator)
    density[0], density[1] = 0.0, 1.0
    return torch.rand(count, *size, generator=generator) < density


def encoded(masks: torch.Tensor) -> list[str]:
    """What pycocotools makes of dense masks."""
    columns = np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8))
    return [rle["counts"].decode() for rle in coco_mask.encode(columns)]


def test_window_and_pixels_of_a_small_mask_by_hand():
    dense = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]])
    masks = Masks.from_bool(dense)
    assert masks.size == (3, 4)
    assert masks.windows.tolist() == [[1, 1, 3, 3]]
    assert masks.pixels.tolist() == [True, True, True, False]  # column 1, then column 2
    assert masks.area().tolist() == [3]
    assert masks.offsets.tolist() == [0, 4]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("packed", [True, False])
def test_mirrored_masks_are_those_of_the_mirror_image(size, packed):
    dense = random_masks(size, seed=3)
    masks = Masks.from_bool(dense)
    if packed:
        masks = Masks(size, masks.windows, masks.words)
    assert torch.equal(masks.mirrored().to_bool(), dense.flip(-1))
    assert torch.equal(masks.mirrored().mirrored().windows, masks.windows)
    assert len(Masks.empty(size).mirrored()) == 0


def test_run_lengths_by_hand():
    dense = torch.tensor([[[0, 1], [1, 1]], [[1, 1], [0, 0]]])
    runs = [[1, 3], [0, 1, 1, 1, 1]]
    expected = coco_mask.frPyObjects([{"size": [2, 2], "counts": counts} for counts in runs], 2, 2)
    assert [rle["counts"] for rle in Masks.from_bool(dense).to_rle()] == [r["counts"].decode() for r in expected]
    again = Masks.from_rle([{"size": [2, 2], "counts": counts} for counts in runs], (2, 2))
    assert torch.equal(again.to_bool(), dense.bool())


@pytest.mark.parametrize("size", SIZES)
def test_run_lengths_are_those_of_the_dense_masks_to_the_byte(size):
    dense = random_masks(size, seed=size[0])
    masks = Masks.from_bool(dense)
    assert masks.to_rle() == [{"size": list(size), "counts": counts} for counts in encoded(dense)]
    whole = torch.tensor([[0, 0, size[1], size[0]]]).expand(len(dense), 4)
    loose = Masks(size, whole, dense.transpose(1, 2).flatten())
    assert loose.to_rle() == masks.to_rle()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_every_form_gives_the_same_masks_back(height, width, seed):
    dense = random_masks((height, width), seed)
    masks = Masks.from_bool(dense)
    assert torch.equal(masks.to_bool(), dense)
    assert torch.equal(Masks.from_rle(masks.to_rle(), (height, width)).to_bool(), dense)
    assert torch.equal(Masks.from_bits(masks.to_bits(), masks.windows, masks.size).to_bool(), dense)
    assert torch.equal(masks.area(), dense.sum((1, 2)))


def test_bits_are_an_eighth_of_the_pixels():
    masks = Masks.from_bool(torch.ones(3, 5, 7))
    assert masks.to_bits().dtype == torch.uint8
    assert len(masks.to_bits()) == 14  # 105 pixels


def test_polygon_of_a_rectangle_by_hand():
    dense = torch.zeros(1, 6, 8)
    dense[0, 1:4, 2:7] = 1
    (polygons,) = Masks.from_bool(dense).to_polygons()
    corners = {(polygons[0][i], polygons[0][i + 1]) for i in range(0, 8, 2)}
    assert corners == {(2, 1), (7, 1), (7, 4), (2, 4)}
    assert len(polygons) == 1
    assert len(polygons[0]) == 8


def test_polygons_of_masks_without_holes_rasterise_to_the_masks():
    y, x = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    disc = (x - 20) ** 2 + (y - 18) ** 2 < 15**2
    two_parts = ((x - 10) ** 2 + (y - 10) ** 2 < 30) | ((x - 49) ** 2 + (y - 39) ** 2 < 90)
    corner_contact = ((x < 5) & (y < 5)) | ((x >= 5) & (x < 9) & (y >= 5) & (y < 9))
    dense = torch.stack((disc, two_parts, corner_contact, disc & False))
    polygons = Masks.from_bool(dense).to_polygons()
    assert [len(outlines) for outlines in polygons] == [1, 2, 2, 0]
    drawn = [coco_mask.merge(coco_mask.frPyObjects(outlines, 40, 50)) for outlines in polygons[:3]]
    assert [rle["counts"].decode() for rle in drawn] == encoded(dense[:3])


def test_polygons_fill_holes():
    dense = torch.zeros(1, 7, 7)
    dense[0, 1:6, 1:6] = 1
    dense[0, 3, 3] = 0
    (polygons,) = Masks.from_bool(dense).to_polygons()
    assert len(polygons) == 1


def test_selecting_masks_is_selecting_rows_of_the_dense_form():
    dense = random_masks((9, 11), seed=3)
    masks = Masks.from_bool(dense)
    index = torch.tensor([4, 0, 4])
    chosen = torch.tensor([True, False, True, False, True, True])
    assert torch.equal(masks[index].to_bool(), dense[index])
    assert torch.equal(masks[chosen].to_bool(), dense[chosen])
    assert torch.equal(masks[1:3].to_bool(), dense[1:3])
    assert torch.equal(masks[-1].to_bool(), dense[-1:])
    assert torch.equal(Masks.cat([masks[:2], masks[2:]]).to_bool(), dense)


def test_no_masks_have_every_form():
    for masks in (Masks.empty((3, 4)), Masks.from_bool(torch.zeros(0, 3, 4)), Masks.from_rle([], (3, 4))):
        assert len(masks) == 0
        assert masks.to_bool().shape == (0, 3, 4)
        assert masks.to_rle() == []
        assert masks.to_polygons() == []
        assert masks.to_bits().shape == (0,)
        assert masks.area().shape == (0,)
        assert len(masks[:0]) == 0


GOOD = {"size": [2, 3], "counts": [1, 2, 3]}


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ({"size": [3, 2], "counts": [1, 2, 3]}, r"size \[3, 2\], the image has \[2, 3\]"),
        ({"size": [2, 3], "counts": [1, 2]}, "sum to 3, 2 x 3 = 6"),
        ({"size": [2, 3], "counts": [1, -1, 6]}, "below 0"),
        ({"size": [2, 3], "counts": [2**70, 1]}, "above height"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "not whole numbers"),
        ({"size": [2, 3], "counts": "é"}, "damaged"),
        ({"size": [2, 3], "counts": ""}, "damaged"),
        ({"size": [2, 3], "counts": "P"}, "damaged"),  # the last group says that another one follows
        ({"size": [2, 3], "counts": "oooooooo0"}, "damaged"),
        ({"size": [2, 3], "counts": "11"}, "sum to 2"),
        ({"size": [2, 3], "counts": None}, "not whole numbers"),
        ({"counts": [6]}, "not a COCO RLE"),
        ([6], "not a COCO RLE"),
    ],
)
def test_damaged_run_lengths_are_refused_by_number(rle, says):
    with pytest.raises(DatasetError, match="mask 1 .*" + says):
        Masks.from_rle([GOOD, rle], (2, 3))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.text(alphabet=[chr(48 + i) for i in range(64)], max_size=12))
def test_any_compressed_string_is_decoded_or_refused(counts):
    try:
        masks = Masks.from_rle([{"size": [4, 5], "counts": counts}], (4, 5))
    except DatasetError:
        return
    assert masks.to_bool().shape == (1, 4, 5)
