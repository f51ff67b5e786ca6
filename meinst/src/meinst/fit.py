"""Fitting an encoding: a data set's masks through incremental PCA, and how well codes bring them back (Fig. 5).

Masks come as a stream of chunks, so a data set may have any size: memory holds a batch and the components.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from tqdm import tqdm

from meinst.codec import Encoding, MaskCodec, mean_iou, noisy_logits, pixel_confusion
from meinst.config import MEInstConfig
from meinst.model import MEInst
from meinst.pca import BATCH, Batches, IncrementalPCA
from meinst.targets import box_masks, polygon_mask
from onestage.data.coco import CocoDataset
from onestage.data.validate import Annotations
from onestage.errors import DatasetError
from onestage.ops.paste import cut_mask
from onestage.structures import usable

LOG = logging.getLogger("onestage")

CHUNK = 1024  # masks
FLATTEST = 1e-10  # of the first component's variance; what has less is rounding, in directions that no mask has
DRAWN_IMAGES = 1000  # of a data set that makes its targets when asked; enough for the shapes it has

Chunk = tuple[Tensor, Tensor]  # masks [n, m, m] uint8, labels [n] int64
Stream = Callable[[], Iterator[Chunk]]  # every call starts from the beginning


def fit(
    masks: Iterator[Chunk], lengths: Sequence[int], config: MEInstConfig, *, batch: int = BATCH, seed: int = 0
) -> dict[int, Encoding]:
    """One encoding for each code length, from one pass.

    Args:
        masks: The training masks.
        lengths: Code lengths N.
        config: Mask size, noisy logits, one set of components or one per class. A class whose masks do not determine
            N components, because there are no more than N of them or they are too alike, takes those of all classes.
        batch: Masks that one step of the PCA takes.
        seed: Of the noise.

    Raises:
        DatasetError: no more masks than the longest code has numbers, or too many of them alike.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = [_Fit(lengths, batch) for _ in range(1 if config.class_agnostic else 1 + config.num_classes)]
    for chunk, labels in masks:
        values = chunk.flatten(1).double()
        if config.noisy_logits:
            values = noisy_logits(values, torch.rand(values.shape, generator=generator, dtype=torch.float64))
        sets[0].push(values.numpy())
        for label in labels.unique().tolist() if len(sets) > 1 else ():
            sets[1 + label].push(values[labels == label].numpy())
    for part in sets:
        part.finish()
    count = sets[0].count
    for length in sorted(lengths, reverse=True):
        if not _has_variance(sets[0].of(length)):
            enough = "too alike" if count > length else "too few"
            raise DatasetError(
                f"{count} masks are {enough} for codes of length {length}",
                "use more masks or shorter codes (fit_encoding: --length and --lengths)",
            )
    facts = {
        "noisy_logits": config.noisy_logits,
        "mask_size": config.mask_size,
        "class_agnostic": config.class_agnostic,
        "masks": count,
    }
    return {length: _encoding(length, sets, facts) for length in lengths}


def reconstruct(
    masks: Iterator[Chunk], encodings: Sequence[Encoding], config: MEInstConfig, *, seed: int = 1
) -> list[float]:
    """Mean IoU of background and foreground after encoding and decoding, for each encoding.

    Args:
        masks: Any masks.
        encodings: As `fit` made them, of any lengths.
        config: The switches they were fitted with.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    codecs = []
    for encoding in encodings:
        codecs.append(MaskCodec(replace(config, code_length=encoding.components.shape[1])))
        codecs[-1].load(encoding)
    confusions = [torch.zeros(2, 2, dtype=torch.int64) for _ in codecs]
    for chunk, labels in masks:
        noise = torch.rand(len(chunk), config.mask_size**2, generator=generator)
        for codec, confusion in zip(codecs, confusions, strict=True):
            soft = codec.decode(codec.encode(chunk, labels, noise), labels)
            confusion += pixel_confusion(chunk, soft >= 0.5)
    return [mean_iou(confusion) for confusion in confusions]


def annotation_masks(
    annotations: Annotations, size: int, limit: int | None = None, among: np.ndarray | None = None
) -> Iterator[Chunk]:
    """The masks of annotations that are no crowd, in the grids of their own boxes.

    Args:
        annotations: Checked annotations.
        size: m.
        limit: Only so many.
        among: [n] int64, positions in `annotations` of those to take, in this order; None: all, in the file's image
            order.
    """
    masks, labels = [], []
    image_of = np.repeat(np.arange(len(annotations.image_ids)), np.diff(annotations.annotation_ends))
    usable = ~annotations.crowds & (annotations.boxes[:, 2:] > 1e-5).all(1)
    chosen = np.flatnonzero(usable) if among is None else among[usable[among]]
    for i in chosen[:limit].tolist():
        x, y, width, height = annotations.boxes[i].tolist()
        box = np.array([x, y, x + width, y + height], dtype=np.float32)
        polygons = annotations.polygons(i)
        if polygons is None:
            image_size = tuple(annotations.image_sizes[image_of[i]].tolist())
            bitmap = torch.from_numpy(coco_mask.decode(annotations.rle(i, image_size)))
            masks.append(cut_mask(bitmap, torch.from_numpy(box), size))
        else:
            masks.append(torch.from_numpy(polygon_mask(polygons, box, size)))
        labels.append(int(annotations.labels[i]))
        if len(masks) == CHUNK:
            yield torch.stack(masks), torch.tensor(labels)
            masks, labels = [], []
    if masks:
        yield torch.stack(masks), torch.tensor(labels)


def dataset_masks(dataset: Any, size: int) -> Iterator[Chunk]:
    """The masks of a data set's own images, or of the first of them where targets are drawn when asked for.

    Args:
        dataset: A `CocoDataset`, whose images are not read, or any sequence of (image, target).
        size: m.
    """
    if isinstance(dataset, CocoDataset):
        among = [np.array(dataset.annotations_of(i), dtype=np.int64) for i in range(len(dataset))]
        yield from annotation_masks(dataset.annotations, size, among=np.concatenate([np.zeros(0, np.int64), *among]))
        return
    for i in range(min(len(dataset), DRAWN_IMAGES)):
        target = usable(dataset[i][1])
        if len(target):
            yield box_masks(target, size), target.labels


def prepare_codec(model: nn.Module, train_set: Any) -> None:
    """Gives a new model its encoding: the file that its config names, or a fit on its training masks.

    Where those cannot determine it (`--overfit`, a handful of images) the model keeps its cosines, and the log says so.

    Args:
        model: A `MEInst`; its `codec` is changed.
        train_set: As for `dataset_masks`; not read where the config names a file.

    Raises:
        WeightsError: the file does not fit.
    """
    assert isinstance(model, MEInst)
    if not isinstance(model.codec, MaskCodec):
        return
    config = model.config
    if config.encoding_file:
        model.codec.load(Encoding.read(config.encoding_file))
        LOG.info("encoding: %s", config.encoding_file)
        return
    masks = with_progress(dataset_masks(train_set, config.mask_size), "fit encoding", None, disable=None)
    try:
        encoding = fit(masks, [config.code_length], config)[config.code_length]
    except DatasetError as error:
        LOG.warning("encoding: %s; cosines take their place, or give --model.encoding-file", error.what)
        return
    model.codec.load(encoding)
    share = float(encoding.ratio[0].sum())
    LOG.info(
        "encoding: %d numbers fitted on %d training masks, %.1f %% of their variance",
        config.code_length,
        encoding.facts["masks"],
        100 * share,
    )


def with_progress(chunks: Iterator[Chunk], what: str, total: int | None, *, disable: bool | None) -> Iterator[Chunk]:
    """The same chunks with a bar on stderr that counts masks.

    Args:
        chunks: Masks.
        what: Stands before the bar.
        total: Number of masks, if it is known.
        disable: No bar; None: none where stderr is no terminal.
    """
    with tqdm(total=total, desc=what, unit="mask", disable=disable, leave=False, file=sys.stderr) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk[0]))


class _Fit:
    """The PCAs of one set of masks, one for each length."""

    def __init__(self, lengths: Sequence[int], batch: int):
        self.parts = [(IncrementalPCA(length), Batches(batch, length)) for length in lengths]
        self.count = 0

    def push(self, values: np.ndarray) -> None:
        self.count += len(values)
        for pca, batches in self.parts:
            for batch in batches.push(values):
                pca.update(batch)

    def finish(self) -> None:
        for pca, batches in self.parts:
            for batch in batches.rest():
                if pca.count or len(batch) >= pca.length:
                    pca.update(batch)

    def of(self, length: int) -> IncrementalPCA:
        return next(pca for pca, _ in self.parts if pca.length == length)


def _encoding(length: int, sets: Sequence[_Fit], facts: dict[str, Any]) -> Encoding:
    whole = sets[0].of(length)
    fitted = [part.of(length) for part in sets[1:]] or [whole]
    fitted = [pca if _has_variance(pca) else whole for pca in fitted]
    return Encoding(
        _stacked([pca.components for pca in fitted]),
        _stacked([pca.mean for pca in fitted]),
        _stacked([pca.explained_variance for pca in fitted]),
        _stacked([pca.ratio for pca in fitted]),
        facts,
    )


def _has_variance(pca: IncrementalPCA) -> bool:
    """Whether the samples vary along every component, so that codes can be whitened."""
    variance = pca.explained_variance
    return pca.count > pca.length and bool(variance[-1] > FLATTEST * variance[0])


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).float()
