"""From window masks to where their runs begin and end, in COCO's order: all that run lengths need of a mask.

A *change* is a position, counted column by column through the image, whose pixel differs from the one before it; before
the first pixel there are zeros, and a mask that fills its last column changes at height * width. A mask of a photograph
has some hundred changes, so they are what leaves a GPU, not the pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from onestage.ops import host
from onestage.ops.dispatch import wants_triton
from onestage.ops.packed import unpack_windows

USUAL_CHANGES = 1024  # of a mask; a fifth of it is usual in COCO


def mask_changes(windows: Tensor, words: Tensor, size: tuple[int, int], capacity: int) -> tuple[Tensor, Tensor]:
    """The changes of N masks, without the host knowing how many.

    Args:
        windows: [N, 4] int64 x0, y0, x1, y1, half-open, inside the image.
        words: [at least the windows' words] int32, the packed masks (`onestage.ops.packed`).
        size: (height, width) of the image, pixels; height * width below 2**31.
        capacity: How many changes there is room for.

    Returns:
        [capacity] int32, the changes of one mask after those of another, each mask's ascending: as many as there are
        or as there is room for, and anything behind them. [N] int64, one past each mask's last change; the last one
        says how much room there has to be.
    """
    if wants_triton(words) or torch.compiler.is_compiling():
        return _changes_op(windows, words, list(size), capacity)
    return mask_changes_torch(windows, words, size, capacity)


def split_changes(windows: Tensor, words: Tensor, size: tuple[int, int]) -> list[np.ndarray]:
    """The changes of each of N masks on the host, which waits once; arguments as of `mask_changes`.

    Copied is the room for as many changes as are usual, 4 KB a mask, with their numbers: cheaper than to wait for these
    first. Masks with more changes are looked at, and waited for, a second time.
    """
    if len(windows) == 0:
        return []
    room = USUAL_CHANGES * len(windows)
    changes, ends = host.to_host(*mask_changes(windows, words, size, room))
    split = ends.tolist()
    if split[-1] > room:
        (changes,) = host.to_host(mask_changes(windows, words, size, split[-1])[0])
    return np.split(np.asarray(changes)[: split[-1]], split[:-1])


def mask_changes_torch(windows: Tensor, words: Tensor, size: tuple[int, int], capacity: int) -> tuple[Tensor, Tensor]:
    """Plain-torch twin: defines the result, runs anywhere."""
    pixels = unpack_windows(windows, words).cpu().numpy()
    changes, ends, first = [np.zeros(0, dtype=np.int64)], [], 0
    for x0, y0, x1, y1 in windows.tolist():
        area = (x1 - x0) * (y1 - y0)
        changes.append(window_changes(pixels[first : first + area].reshape(x1 - x0, y1 - y0), x0, y0, size[0]))
        ends.append(len(changes[-1]))
        first += area
    found = torch.from_numpy(np.concatenate(changes)).int().to(words.device)[:capacity]
    room = torch.nn.functional.pad(found, (0, capacity - len(found)))
    return room, torch.tensor(ends, dtype=torch.int64, device=words.device).cumsum(0)


def window_changes(columns: np.ndarray, x0: int, y0: int, height: int) -> np.ndarray:
    """The changes of one mask given pixel by pixel.

    Args:
        columns: [x1 - x0, y1 - y0] bool, the mask's window.
        x0, y0: Its corner in the image.
        height: Of the image.

    Returns:
        [any] int64.
    """
    num_columns, num_rows = columns.shape
    # A guard row of zeros ends every run with its column, and the leading zero starts the first.
    guarded = np.zeros(num_columns * (num_rows + 1) + 1, dtype=bool)
    guarded[1:].reshape(num_columns, num_rows + 1)[:, :num_rows] = columns
    column, row = np.divmod(np.flatnonzero(guarded[1:] != guarded[:-1]), num_rows + 1)
    changes = (column + x0) * height + row + y0
    if num_rows == height:
        touching = np.flatnonzero(changes[1:-1:2] == changes[2::2]) * 2 + 1
        changes = np.delete(changes, np.concatenate((touching, touching + 1)))
    return changes


@torch.library.custom_op("onestage::mask_changes", mutates_args=())
def _changes_op(windows: Tensor, words: Tensor, size: list[int], capacity: int) -> tuple[Tensor, Tensor]:
    if wants_triton(words):
        from onestage.ops.triton.runs import mask_changes_triton

        return mask_changes_triton(windows, words, (size[0], size[1]), capacity)
    return mask_changes_torch(windows, words, (size[0], size[1]), capacity)


@_changes_op.register_fake
def _(windows: Tensor, words: Tensor, size: list[int], capacity: int) -> tuple[Tensor, Tensor]:
    return words.new_empty(capacity), windows.new_empty(windows.shape[0])
