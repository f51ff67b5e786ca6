"""Packed window masks: 32 pixels of a column in an int32 word, as kernels write them.

Column x of a window takes `ceil((y1 - y0) / 32)` words, the first holds its 32 upper rows, lowest bit first, and the
columns of a window follow one another, as the windows do. Bits below the last row are 0. What lies behind the last
window is room for larger ones and holds anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onestage.ops.dispatch import wants_triton

WORD = 32


def word_capacity(count: int, size: tuple[int, int]) -> int:
    """Words that `count` masks take at most in an image of `size` (height, width): an eighth of a byte for a pixel."""
    return count * size[1] * -(-size[0] // WORD)


def num_words(windows: Tensor) -> Tensor:
    """[N] int64, the words of each window [N, 4]."""
    return (windows[:, 2] - windows[:, 0]) * ((windows[:, 3] - windows[:, 1] + WORD - 1) // WORD)


def pack_windows(windows: Tensor, pixels: Tensor, capacity: int | None = None) -> Tensor:
    """Words of masks given pixel by pixel.

    Args:
        windows: [N, 4] int64 x0, y0, x1, y1, half-open.
        pixels: [sum of window areas] bool, the windows one after the other, each column by column.
        capacity: Length of the result, if not as short as possible.

    Returns:
        [capacity] int32.
    """
    parts = [windows.new_zeros(0, dtype=torch.int32)]
    shifts = torch.arange(WORD, dtype=torch.int64, device=windows.device)
    sizes = (windows[:, 2:] - windows[:, :2]).tolist()
    for part, (columns, rows) in zip(pixels.split([a * b for a, b in sizes]), sizes, strict=True):
        padded = torch.nn.functional.pad(part.view(columns, rows).long(), (0, -rows % WORD))
        packed = (padded.view(columns, -(-rows // WORD), WORD) << shifts).sum(2).flatten()
        parts.append(torch.where(packed < 2**31, packed, packed - 2**32).int())
    words = torch.cat(parts)
    return words if capacity is None else torch.nn.functional.pad(words, (0, capacity - len(words)))


def unpack_windows(windows: Tensor, words: Tensor) -> Tensor:
    """[sum of window areas] bool, the way back from `pack_windows`."""
    parts = [words.new_zeros(0, dtype=torch.bool)]
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    first = 0
    for columns, rows in (windows[:, 2:] - windows[:, :2]).tolist():
        per_column = -(-rows // WORD)
        some = words[first : first + columns * per_column].view(columns, per_column, 1)
        parts.append((some >> shifts & 1).bool().view(columns, per_column * WORD)[:, :rows].flatten())
        first += columns * per_column
    return torch.cat(parts)


def dense_masks(windows: Tensor, words: Tensor, size: tuple[int, int]) -> Tensor:
    """The masks at image size.

    Args:
        windows: [N, 4] int64 x0, y0, x1, y1, half-open, inside the image.
        words: [at least the windows' words] int32.
        size: (height, width) of the image.

    Returns:
        [N, height, width] bool.
    """
    if wants_triton(words) or torch.compiler.is_compiling():
        return _dense_op(windows, words, list(size))
    return dense_masks_torch(windows, words, size)


def dense_masks_torch(windows: Tensor, words: Tensor, size: tuple[int, int]) -> Tensor:
    """Plain-torch twin: defines the result, runs anywhere."""
    return place_windows(windows, unpack_windows(windows, words), size)


def place_windows(windows: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, height, width] bool of masks given pixel by pixel, as for `pack_windows`."""
    dense = torch.zeros(len(windows), *size, dtype=torch.bool, device=pixels.device)
    first = 0
    for mask, (x0, y0, x1, y1) in zip(dense, windows.tolist(), strict=True):
        area = (x1 - x0) * (y1 - y0)
        mask[y0:y1, x0:x1] = pixels[first : first + area].view(x1 - x0, y1 - y0).T
        first += area
    return dense


@torch.library.custom_op("onestage::dense_masks", mutates_args=())
def _dense_op(windows: Tensor, words: Tensor, size: list[int]) -> Tensor:
    if wants_triton(words):
        from onestage.ops.triton.packed import dense_masks_triton

        return dense_masks_triton(windows, words, (size[0], size[1]))
    return dense_masks_torch(windows, words, (size[0], size[1]))


@_dense_op.register_fake
def _(windows: Tensor, words: Tensor, size: list[int]) -> Tensor:
    return words.new_empty(windows.shape[0], *size, dtype=torch.bool)
