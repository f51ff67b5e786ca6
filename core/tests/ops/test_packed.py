import pytest
import torch

from onestage.masks import Masks
from onestage.ops.packed import dense_masks, num_words, pack_windows, unpack_windows, word_capacity
from onestage.ops.triton.packed import dense_masks_triton

WINDOWS = torch.tensor(
    [[0, 0, 1, 1], [3, 3, 3, 9], [2, 5, 9, 5], [0, 0, 45, 70], [44, 69, 45, 70], [7, 1, 9, 33], [7, 1, 9, 34]]
)
SIZE = (70, 45)


def random_masks(windows=WINDOWS, size=SIZE, seed=0):
    areas = (windows[:, 2:] - windows[:, :2]).prod(1)
    generator = torch.Generator().manual_seed(seed)
    return Masks(size, windows, torch.rand(int(areas.sum()), generator=generator) < 0.5)


def test_words_by_hand():
    # Two columns of 33 rows: the last row of each has a word of its own.
    pixels = torch.zeros(2, 33, dtype=torch.bool)
    pixels[0, 0] = pixels[0, 31] = pixels[0, 32] = pixels[1, 1] = True
    words = pack_windows(torch.tensor([[4, 2, 6, 35]]), pixels.flatten())
    assert words.tolist() == [1 - 2**31, 1, 2, 0]
    assert words.dtype == torch.int32


def test_packing_and_back():
    masks = random_masks()
    words = pack_windows(masks.windows, masks.pixels, 1000)
    assert len(words) == 1000
    assert num_words(WINDOWS).tolist() == [1, 0, 0, 45 * 3, 1, 2, 4]
    assert torch.equal(unpack_windows(masks.windows, words), masks.pixels)
    assert len(pack_windows(WINDOWS[:0], masks.pixels[:0])) == 0
    assert len(unpack_windows(WINDOWS[:0], words[:0])) == 0


def test_the_room_behind_the_windows_does_not_travel_to_the_host():
    masks = random_masks()
    moved = Masks(SIZE, WINDOWS, pack_windows(WINDOWS, masks.pixels, 1000)).to("cpu")
    assert len(moved.stored) == 143
    assert torch.equal(moved.to_bool(), masks.to_bool())


def test_there_is_room_for_masks_as_large_as_the_image():
    whole = torch.tensor([[0, 0, 45, 70]]).expand(3, 4)
    assert int(num_words(whole).sum()) == word_capacity(3, SIZE) == 3 * 45 * 3


def test_packed_masks_have_every_form_of_those_of_pixels():
    masks = random_masks()
    packed = Masks(SIZE, masks.windows, pack_windows(masks.windows, masks.pixels, 1000))
    assert packed.is_packed
    assert not masks.is_packed
    for both in (packed, packed.to("cpu"), packed[torch.arange(len(packed))], packed[:]):
        assert torch.equal(both.pixels, masks.pixels)
        assert torch.equal(both.to_bool(), masks.to_bool())
        assert torch.equal(both.to_bits(), masks.to_bits())
        assert torch.equal(both.area(), masks.area())
        assert both.to_rle() == masks.to_rle()
    assert packed[3].to_polygons() == masks[3].to_polygons()
    index = torch.tensor([6, 0, 3, 3])
    assert packed[index].is_packed
    assert torch.equal(packed[index].to_bool(), masks[index].to_bool())
    assert len(packed[:0]) == 0
    both = Masks.cat([packed[:3], masks[3:]])
    assert torch.equal(both.to_bool(), masks.to_bool())
    assert torch.equal(packed.words[: len(masks.words)], masks.words)


@pytest.mark.parametrize("size", [SIZE, (71, 129)])
def test_the_kernel_writes_dense_masks_as_the_twin(size, device):
    masks = random_masks(size=size)
    words = pack_windows(masks.windows, masks.pixels, 1000)
    dense = dense_masks_triton(WINDOWS.T.contiguous().T.to(device), words.to(device), size)
    assert dense.dtype == torch.bool
    assert torch.equal(dense.cpu(), masks.to_bool())
    spread = torch.stack((words, ~words), 1)[:, 0].to(device)
    assert torch.equal(dense_masks_triton(WINDOWS.to(device), spread, size), dense)


@pytest.mark.parametrize("count", [0, 1, 129])
def test_any_number_of_masks(count, device):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count)) * torch.tensor([8, 7])
    masks = random_masks(corners.long().sort(1).values.flatten(1), (6, 7))
    dense = dense_masks_triton(masks.windows.to(device), masks.words.to(device), (6, 7))
    assert torch.equal(dense.cpu(), masks.to_bool())


def test_packed_masks_are_written_by_the_kernel_if_asked(device, monkeypatch):
    masks = random_masks()
    words = masks.words.to(device)
    monkeypatch.setenv("ONESTAGE_KERNELS", "triton")
    assert torch.equal(Masks(SIZE, WINDOWS.to(device), words).to_bool().cpu(), masks.to_bool())


def test_the_custom_op_is_what_the_compiler_needs():
    torch.library.opcheck(torch.ops.onestage.dense_masks.default, (WINDOWS, random_masks().words, [*SIZE]))
    compiled = torch.compile(dense_masks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(WINDOWS, random_masks().words, SIZE), random_masks().to_bool())
