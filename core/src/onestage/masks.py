"""`Masks`: N instance masks of one image, kept as the pixels of N box windows.

Dense [N, H, W] masks cost most of the time and memory of mask post-processing, so they exist only on request. A window
holds its pixels column by column, the order of COCO run lengths; outside its window a mask is zero. The pixels come
from the CPU path as bool and from kernels packed into words, whose number the host need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from onestage.errors import DatasetError
from onestage.ops import host
from onestage.ops.packed import (
    dense_masks,
    num_words,
    pack_windows,
    place_windows,
    unpack_windows,
    word_capacity,
)
from onestage.ops.runs import split_changes, window_changes


@dataclass(frozen=True, eq=False)
class Masks:
    """N masks of one image.

    Args:
        size: (height, width) of the image, pixels.
        windows: [N, 4] int64 x0, y0, x1, y1 in image pixels, half-open, inside the image; x0 == x1 or y0 == y1 where
            a mask has no window.
        stored: The windows one after the other, each column by column ([x][y]): [sum of window areas] bool, or packed,
            [the windows' words or more] int32 as `onestage.ops.packed` says. The host waits for packed masks on a GPU
            when they are asked for another form than `to_bool`, and not before.
    """

    size: tuple[int, int]
    windows: Tensor
    stored: Tensor

    def __post_init__(self) -> None:
        assert self.windows.shape[1:] == (4,)
        assert self.windows.dtype == torch.int64
        assert self.stored.ndim == 1
        assert self.stored.dtype in (torch.bool, torch.int32)

    @staticmethod
    def empty(size: tuple[int, int], device: torch.device | str = "cpu") -> Masks:
        """No masks of an image of `size` (height, width)."""
        windows = torch.zeros(0, 4, dtype=torch.int64, device=device)
        return Masks(size, windows, torch.zeros(0, dtype=torch.bool, device=device))

    @staticmethod
    def from_bool(masks: Tensor) -> Masks:
        """Masks from a dense tensor.

        Args:
            masks: [N, H, W], non-zero where the instance is.
        """
        masks = masks != 0
        size = (int(masks.shape[1]), int(masks.shape[2]))
        x0, x1 = _first_and_end(masks.any(1))
        y0, y1 = _first_and_end(masks.any(2))
        windows = torch.stack((x0, y0, x1, y1), 1)
        parts = [mask[t:b, left:r].T.flatten() for mask, (left, t, r, b) in zip(masks, windows.tolist(), strict=True)]
        return Masks(size, windows, torch.cat(parts) if parts else masks.flatten())

    @staticmethod
    def from_rle(rles: Sequence[dict[str, Any]], size: tuple[int, int]) -> Masks:
        """Masks from COCO run lengths; nothing is decoded that was not checked.

        Args:
            rles: N dicts of `size` [height, width] and `counts`: a list of numbers, or the compressed string.
            size: (height, width) that every one of them must have.

        Raises:
            DatasetError: a size that differs, counts that are damaged, or runs that do not sum to height * width.
        """
        windows, parts = [], []
        for number, rle in enumerate(rles):
            window, pixels = _window_of_runs(rle_counts(rle, size, f"mask {number}"), size[0])
            windows.append(window)
            parts.append(pixels)
        if not parts:
            return Masks.empty(size)
        return Masks(size, torch.tensor(windows, dtype=torch.int64), torch.from_numpy(np.concatenate(parts)))

    @staticmethod
    def from_bits(bits: Tensor, windows: Tensor, size: tuple[int, int]) -> Masks:
        """The masks whose `to_bits()` and `windows` these are."""
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        pixels = (bits[:, None] >> shifts & 1).flatten()[: int(_areas(windows).sum())]
        return Masks(size, windows, pixels.bool())

    @staticmethod
    def cat(masks: Sequence[Masks]) -> Masks:
        """All masks of several `Masks` of one image, packed if all of them are."""
        assert len({m.size for m in masks}) == 1, "masks of images of different sizes"
        windows = torch.cat([m.windows for m in masks])
        if all(m.is_packed for m in masks):
            return Masks(
                masks[0].size, windows, torch.cat([m.stored[: int(num_words(m.windows).sum())] for m in masks])
            )
        return Masks(masks[0].size, windows, torch.cat([m.pixels for m in masks]))

    @staticmethod
    def in_parts(make: Callable[[slice], Masks], count: int, device: torch.device) -> Masks:
        """The masks of `count` detections, made all at once if the GPU's memory holds the room they may need.

        Otherwise in ever smaller parts, which wait on the host for the rest, without the room they did not need.

        Args:
            make: The masks of some of the detections, on `device`.
            count: How many there are.
            device: Where the result goes.

        Raises:
            torch.OutOfMemoryError: the memory does not hold the room of one mask, or not the result.
        """
        size = count
        while True:
            try:
                if size == count:
                    return make(slice(0, count))
                parts = [make(slice(first, first + size)).to("cpu") for first in range(0, count, size)]
                return Masks.cat(parts).to(device)
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            size = (size + 1) // 2

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, keep: Tensor | slice | int) -> Masks:
        """The masks that `keep` (bool or int64 index, slice or number) selects; packed ones `[:n]` at once."""
        if self.is_packed and isinstance(keep, slice) and keep.start is None and keep.step is None:
            windows = self.windows[keep]
            return Masks(self.size, windows, self.stored[: word_capacity(len(windows), self.size)])
        if isinstance(keep, int):
            keep = torch.tensor([keep])
        index = torch.arange(len(self))[keep.cpu() if isinstance(keep, Tensor) else keep].tolist()
        lengths = num_words(self.windows) if self.is_packed else _areas(self.windows)
        parts = self.stored[: int(lengths.sum())].split(lengths.tolist()) if len(self) else ()
        chosen = [parts[i] for i in index]
        return Masks(self.size, self.windows[index], torch.cat(chosen) if chosen else self.stored[:0])

    def mirrored(self) -> Masks:
        """The masks of the image's mirror image, left for right; on a GPU the host waits for packed ones."""
        x0, y0, x1, y1 = self.windows.unbind(1)
        windows = torch.stack((self.size[1] - x1, y0, self.size[1] - x0, y1), 1)
        parts = [columns.flip(0).flatten() for columns in self._columns()]
        return Masks(self.size, windows, torch.cat(parts) if parts else self.pixels)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def is_packed(self) -> bool:
        return self.stored.dtype == torch.int32

    @cached_property
    def pixels(self) -> Tensor:
        """[sum of window areas] bool, the windows one after the other, each column by column."""
        return unpack_windows(self.windows, self.stored) if self.is_packed else self.stored

    @cached_property
    def words(self) -> Tensor:
        """[the windows' words or more] int32, the packed pixels (`onestage.ops.packed`)."""
        return self.stored if self.is_packed else pack_windows(self.windows, self.stored)

    @property
    def offsets(self) -> Tensor:
        """[N + 1] int64: mask i is `pixels[offsets[i]:offsets[i + 1]]`."""
        areas = _areas(self.windows)
        return torch.cat((areas.new_zeros(1), areas.cumsum(0)))

    def to(self, device: torch.device | str) -> Masks:
        windows, stored = self.windows.to(device), self.stored
        if self.is_packed and windows.device.type == "cpu":
            stored = stored[: int(num_words(windows).sum())]  # the room behind the windows does not travel
        return Masks(self.size, windows, stored.to(device))

    def sent(self) -> tuple[Tensor, Tensor]:
        """What travels to the host before it knows how large windows are: these, and as much as is usual in them."""
        room = word_capacity(2 + len(self) // 8, self.size) if self.is_packed else len(self.stored)
        return self.windows, self.stored[:room]

    def arrived(self, windows: Tensor, stored: Tensor) -> Masks:
        """The masks on the host, from copies there of what was `sent`; it waits for what more there is."""
        needed = int(num_words(windows).sum()) if self.is_packed else len(stored)
        if needed > len(stored):
            (stored,) = host.to_host(self.stored[:needed])
        return Masks(self.size, windows.clone(), stored[:needed].clone())

    def area(self) -> Tensor:
        """[N] int64, pixels of each mask."""
        counts = [window.count_nonzero() for window in self._columns()]
        return torch.stack(counts) if counts else self.windows.new_zeros(0)

    def to_bool(self) -> Tensor:
        """[N, H, W] bool, the dense form."""
        if self.is_packed:
            return dense_masks(self.windows, self.stored, self.size)
        return place_windows(self.windows, self.stored, self.size)

    def to_bits(self) -> Tensor:
        """[ceil(len(pixels) / 8)] uint8: `pixels` packed, lowest bit first. `from_bits` is the way back."""
        padded = torch.nn.functional.pad(self.pixels.to(torch.uint8), (0, -len(self.pixels) % 8)).view(-1, 8)
        shifts = torch.arange(8, dtype=torch.uint8, device=self.device)
        return (padded << shifts).sum(1, dtype=torch.uint8)

    def to_rle(self) -> list[dict[str, Any]]:
        """N COCO run lengths `{"size": [height, width], "counts": str}`.

        Byte for byte what pycocotools makes of the dense masks, without making those.
        """
        height, width = self.size
        if self.is_packed:
            changes = split_changes(self.windows, self.stored, self.size)
        else:
            masks = self.to("cpu")
            changes = [
                window_changes(columns.numpy(), x0, y0, height)
                for columns, (x0, y0, _, _) in zip(masks._columns(), masks.windows.tolist(), strict=True)
            ]
        runs = [{"size": [height, width], "counts": _counts(of_mask, height * width)} for of_mask in changes]
        rles = coco_mask.frPyObjects(runs, height, width) if runs else []
        return [{"size": [height, width], "counts": rle["counts"].decode("ascii")} for rle in rles]

    def to_polygons(self) -> list[list[list[float]]]:
        """For each mask its outlines as flat x, y lists along pixel edges, image pixels.

        Pixels that meet only at a corner belong to different outlines. COCO polygons know no holes: holes come out
        filled, use `to_rle` where that matters.
        """
        masks = self.to("cpu")
        return [
            [_shifted(outline, x0, y0) for outline in _outlines(columns.numpy())]
            for columns, (x0, y0, _, _) in zip(masks._columns(), masks.windows.tolist(), strict=True)
        ]

    def _columns(self) -> list[Tensor]:
        """The N windows as [x1 - x0, y1 - y0] views of `pixels`."""
        sizes = (self.windows[:, 2:] - self.windows[:, :2]).tolist()
        parts = self.pixels.split([columns * rows for columns, rows in sizes]) if sizes else ()
        return [part.view(columns, rows) for part, (columns, rows) in zip(parts, sizes, strict=True)]


def rle_counts(rle: dict[str, Any], size: tuple[int, int], name: str) -> np.ndarray:
    """The checked run lengths of one COCO RLE, int64, zeros first.

    Args:
        rle: `size` and `counts`, compressed or not.
        size: (height, width) it must have.
        name: What an error calls it.
    """
    height, width = size
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise DatasetError(f"{name} is not a COCO RLE with 'size' and 'counts'", "write masks as COCO RLE")
    if not isinstance(rle["size"], (list, tuple)) or list(rle["size"]) != [height, width]:
        raise DatasetError(
            f"{name} has RLE size {str(rle['size'])[:60]}, the image has [{height}, {width}]",
            "RLE size is [height, width] of the image",
        )
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs = _decompress(counts, name)
    else:
        if not isinstance(counts, (list, tuple)) or not all(type(count) is int for count in counts):
            raise DatasetError(f"{name} has RLE counts that are not whole numbers", "write the RLE again")
        if any(not 0 <= count <= height * width for count in counts):
            raise DatasetError(f"{name} has an RLE run below 0 or above height * width", "write the RLE again")
        runs = np.array(counts, dtype=np.int64)
    if ((runs < 0) | (runs > height * width)).any() or int(runs.sum()) != height * width:
        raise DatasetError(
            f"{name} has RLE runs that sum to {int(runs.sum())}, {height} x {width} = {height * width} is needed",
            "write the RLE again from a mask of the image's size",
        )
    return runs


def _decompress(counts: str | bytes, name: str) -> np.ndarray:
    """COCO's string form: groups of 5 bits, low ones first; from the fourth run on, differences to the run two back."""
    damaged = DatasetError(f"{name} has a damaged compressed RLE", "write the RLE again")
    try:
        raw = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raise damaged from None
    digits = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not last[-1]:
        raise damaged
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits hold any image; more would overflow
        raise damaged
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs = np.where(digits[ends] & 16, runs - (np.int64(1) << (5 * lengths)), runs)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _window_of_runs(runs: np.ndarray, height: int) -> tuple[list[int], np.ndarray]:
    """Smallest window (x0, y0, x1, y1) that holds the ones, and its pixels column by column."""
    ends = runs.cumsum()
    filled = np.flatnonzero(runs[1::2]) * 2 + 1
    if not len(filled):
        return [0, 0, 0, 0], np.zeros(0, dtype=bool)
    first, end = ends[filled] - runs[filled], ends[filled]
    x0, x1 = int(first[0] // height), int((end[-1] - 1) // height) + 1
    if (first // height != (end - 1) // height).any():
        y0, y1 = 0, height
    else:
        y0, y1 = int((first % height).min()), int(((end - 1) % height).max()) + 1
    inside = np.arange(len(runs)) % 2 == 1
    pixels = np.repeat(inside, runs)[x0 * height : x1 * height].reshape(x1 - x0, height)
    return [x0, y0, x1, y1], pixels[:, y0:y1].reshape(-1)


def _counts(changes: np.ndarray, num_pixels: int) -> np.ndarray:
    """Run lengths over the whole image of a mask, from where it changes."""
    if not len(changes) or changes[-1] != num_pixels:
        changes = np.append(changes, num_pixels)
    return np.diff(changes, prepend=0)


def _outlines(columns: np.ndarray) -> list[list[float]]:
    """Outer outlines of a window's pixels, clockwise, corner by corner, in window coordinates.

    Args:
        columns: [x, y] bool.
    """
    padded = np.pad(columns, 1)
    inside = padded[1:, 1:]
    # Unit edges that run with the mask on their right, by the corner they start from: right, down, left, up.
    starts = np.stack(
        (
            inside & ~padded[1:, :-1],
            padded[:-1, 1:] & ~inside,
            padded[:-1, :-1] & ~padded[:-1, 1:],
            padded[1:, :-1] & ~padded[:-1, :-1],
        ),
        -1,
    )
    edges = {tuple(edge) for edge in np.argwhere(starts).tolist()}
    steps = ((1, 0), (0, 1), (-1, 0), (0, -1))
    outlines = []
    while edges:
        x, y, direction = first = edges.pop()
        edges.add(first)
        corners: list[tuple[int, int]] = []
        while True:
            x, y = x + steps[direction][0], y + steps[direction][1]
            # The right turn first: it stays with the same pixel where two pixels touch at a corner.
            turn = next(turn for turn in (1, 0, 3) if (x, y, (direction + turn) % 4) in edges)
            if turn:
                corners.append((x, y))
            direction = (direction + turn) % 4
            edges.remove((x, y, direction))
            if (x, y, direction) == first:
                break
        if _signed_area(corners) > 0:
            outlines.append([float(value) for corner in corners for value in corner])
    return sorted(outlines)


def _signed_area(corners: list[tuple[int, int]]) -> float:
    following = corners[1:] + corners[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, following, strict=True)) / 2


def _shifted(outline: list[float], x0: int, y0: int) -> list[float]:
    return [value + (y0 if i % 2 else x0) for i, value in enumerate(outline)]


def _areas(windows: Tensor) -> Tensor:
    return (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])


def _first_and_end(filled: Tensor) -> tuple[Tensor, Tensor]:
    """First filled index and one past the last one of each row of [N, length]; 0, 0 for an empty row."""
    if filled.shape[1] == 0:
        zeros = torch.zeros(len(filled), dtype=torch.int64, device=filled.device)
        return zeros, zeros
    index = torch.arange(filled.shape[1], device=filled.device)
    end = torch.where(filled, index + 1, 0).amax(1)
    first = torch.where(filled, index, filled.shape[1]).amin(1)
    return torch.minimum(first, end), end
