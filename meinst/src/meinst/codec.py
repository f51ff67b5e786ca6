"""The mask encoding: a mask of m x m pixels as N numbers and back (Sec. 3.2, Eq. 1 and 2).

`MaskCodec` is what the network carries, `Encoding` the components that a fit leaves in a file. N here: codes, their
length is `code_length`; D = m * m.
"""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from meinst.config import MEInstConfig
from onestage.errors import WeightsError
from onestage.files import write_atomically

ARRAYS = ("components_c", "mean_c", "explained_variance_c", "ratio_c")  # names in the official files
NOISE = 0.05  # largest distance of a noisy pixel from 0 or 1, smallest is NOISE_FLOOR
NOISE_FLOOR = 0.01


class MaskCodec(nn.Module):
    """Encodes and decodes masks; its components are buffers, so weights carry them.

    Until an encoding is loaded or fitted the components are the lowest frequencies of a cosine transform.

    Args:
        config: `mask_size`, `code_length` and the switches of the encoding.
    """

    components: Tensor  # [code_length, D] orthonormal rows, or [K, code_length, D] for one set per class
    mean: Tensor  # [D] or [K, D]
    variance: Tensor  # [code_length] or [K, code_length], of the codes before whitening

    def __init__(self, config: MEInstConfig):
        super().__init__()
        self.mask_size = config.mask_size
        self.whiten = config.whiten
        self.noisy_logits = config.noisy_logits
        self.class_agnostic = config.class_agnostic
        components, variance = _cosines(config.mask_size, config.code_length)
        sets = () if config.class_agnostic else (config.num_classes,)
        self.register_buffer("components", components.expand(*sets, -1, -1).clone())
        self.register_buffer("mean", torch.zeros(*sets, config.mask_size**2))
        self.register_buffer("variance", variance.expand(*sets, -1).clone())

    def encode(self, masks: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Codes of masks (Eq. 1): logits with noise, centred, projected, whitened. Carries no gradient.

        Args:
            masks: [N, m, m] of 0 and 1.
            labels: [N] int64, read where every class has its own components.
            noise: [N, D] uniform in [0, 1); None draws it.

        Returns:
            [N, code_length] float32.
        """
        values = masks.flatten(1).float()
        if self.noisy_logits:
            values = noisy_logits(values, torch.rand_like(values) if noise is None else noise)
        with torch.autocast(values.device.type, enabled=False):
            if self.class_agnostic:
                codes = (values - self.mean) @ self.components.T
            else:
                codes = torch.einsum("nd,ncd->nc", values - self.mean[labels], self.components[labels])
        return codes / self._variance(labels).sqrt() if self.whiten else codes

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """What `encode` projected, from codes (Eq. 2): [N, D] float32; differentiable.

        Args:
            codes: [N, code_length].
            labels: [N] int64, read where every class has its own components.
        """
        with torch.autocast(codes.device.type, enabled=False):
            scaled = codes.float() * self._variance(labels).sqrt() if self.whiten else codes.float()
            if self.class_agnostic:
                return torch.addmm(self.mean, scaled, self.components)
            return torch.einsum("nc,ncd->nd", scaled, self.components[labels]) + self.mean[labels]

    def decode(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Masks from codes: [N, m, m] float32 probabilities. Arguments as for `logits`."""
        values = self.logits(codes, labels)
        soft = values.sigmoid() if self.noisy_logits else values.clamp(NOISE_FLOOR, 1 - NOISE_FLOOR)
        return soft.view(-1, self.mask_size, self.mask_size)

    def load(self, encoding: Encoding) -> None:
        """Takes the components of a fit; of a longer code the first ones.

        Raises:
            WeightsError: another mask size, fewer components, other switches or another number of sets.
        """
        code_length = self.components.shape[-2]
        problem = encoding.mismatch(self)
        if problem:
            raise WeightsError(
                f"{encoding.source or 'the encoding'} {problem}",
                "fit one for this configuration: python -m meinst.fit_encoding ANNOTATIONS --help",
            )
        first = (slice(None), slice(code_length))
        for buffer, values in (
            (self.components, encoding.components[first]),
            (self.mean, encoding.mean),
            (self.variance, encoding.variance[first]),
        ):
            buffer.copy_(values[0] if self.class_agnostic else values)

    def _variance(self, labels: Tensor | None) -> Tensor:
        return self.variance if self.class_agnostic else self.variance[labels]


class PixelCodec(nn.Module):
    """No encoding: a code is the mask's logits, pixel by pixel (Table 3, last row).

    Args:
        config: `mask_size` is read.
    """

    def __init__(self, config: MEInstConfig):
        super().__init__()
        self.mask_size = config.mask_size

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """The codes [N, D] themselves, as float32; `labels` are not read."""
        return codes.float()

    def decode(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Masks from codes [N, D]: [N, m, m] float32 probabilities; `labels` are not read."""
        return codes.float().sigmoid().view(-1, self.mask_size, self.mask_size)


@dataclass(frozen=True)
class Encoding:
    """Fitted components, in the layout of the official files.

    Args:
        components: [S, length, D] float32, orthonormal rows, S = 1 or one set per class.
        mean: [S, D] float32.
        variance: [S, length] float32, of the codes before whitening.
        ratio: [S, length] float32, share of the total variance.
        facts: How it was made, for the file: `noisy_logits`, `mask_size`, `class_agnostic`, number of `masks`; of
            `fit_encoding` also the `annotations` and the `reconstruction_error`. Of an official .npz `noisy_logits`,
            if its name says so. Whitening is no part of a fit.
        source: File it was read from, "" for a fresh one.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor
    ratio: Tensor
    facts: dict[str, Any]
    source: str = ""

    @staticmethod
    def read(path: str | Path) -> Encoding:
        """Reads a file of `fit_encoding` or an official .npz; neither can run code.

        Raises:
            WeightsError: no such file, damaged, or other arrays.
        """
        path = Path(path)
        if not path.is_file():
            raise WeightsError(
                f"encoding '{path}' does not exist", "write one with: python -m meinst.fit_encoding ANNOTATIONS"
            )
        try:
            arrays, facts = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
            components, mean, variance, ratio = (torch.as_tensor(arrays[name]).float() for name in ARRAYS)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise WeightsError(
                f"encoding '{path}' cannot be read: {error}", "fit it again, or fetch the official .npz again"
            ) from error
        sets, length, pixels = components.shape if components.ndim == 3 else (0, 0, 0)
        if not (length and mean.shape == (sets, pixels) and variance.shape == ratio.shape == (sets, length)):
            raise WeightsError(
                f"encoding '{path}' has components of shape {list(components.shape)} and a mean of {list(mean.shape)}",
                "fit it again, or fetch the official .npz again",
            )
        return Encoding(components, mean, variance, ratio, facts, str(path))

    def write(self, path: str | Path) -> None:
        """Writes .npz (official names, nothing else) or safetensors with the facts, by the name's ending.

        Raises:
            MachineError: no space, or the file cannot be written; an older file of that name stays.
        """
        path = Path(path)
        values = (self.components, self.mean, self.variance, self.ratio)
        arrays: dict[str, Any] = {name: array.contiguous() for name, array in zip(ARRAYS, values, strict=True)}
        if path.suffix == ".npz":
            file = io.BytesIO()
            np.savez(file, **{name: array.numpy() for name, array in arrays.items()})
            write_atomically(path, file.getvalue())
        else:
            write_atomically(path, safetensors.torch.save(arrays, {"meinst_encoding": json.dumps(self.facts)}))

    def mismatch(self, codec: MaskCodec) -> str:
        """What keeps `codec` from using this, the rest of a sentence that begins with its file; "" if nothing does.

        Args:
            codec: Any; neither it nor this is changed.
        """
        sets, length, pixels = self.components.shape
        wanted_sets = 1 if codec.class_agnostic else len(codec.mean)
        if pixels != codec.mask_size**2:
            return f"encodes {pixels} pixels, the model's masks have {codec.mask_size} x {codec.mask_size}"
        if length < codec.components.shape[-2]:
            return f"has {length} components, the model wants {codec.components.shape[-2]}"
        if sets != wanted_sets:
            return f"has {sets} sets of components, the model wants {wanted_sets}"
        noisy = self.facts.get("noisy_logits", codec.noisy_logits)
        if noisy != codec.noisy_logits:
            return f"was fitted with noisy_logits={noisy}, the model has {codec.noisy_logits}"
        return ""


def noisy_logits(values: Tensor, noise: Tensor) -> Tensor:
    """Logits of pixels moved off 0 and 1 by v = max(0.05 u, 0.01).

    Args:
        values: [...] 0 or 1.
        noise: [...] u, uniform in [0, 1).

    Returns:
        [...] of the type of `noise`, magnitude in [2.94, 4.60].
    """
    moved = (NOISE * noise).clamp(min=NOISE_FLOOR)
    magnitude = ((1 - moved) / moved).log()
    return torch.where(values > moved, magnitude, -magnitude)


def pixel_confusion(masks: Tensor, reconstructed: Tensor) -> Tensor:
    """[2, 2] int64, row truth, column reconstruction, counted over all pixels of all masks [N, m, m]."""
    pairs = (masks != 0).long() * 2 + (reconstructed != 0).long()
    return torch.bincount(pairs.flatten(), minlength=4).view(2, 2)


def mean_iou(confusion: Tensor) -> float:
    """Mean of the IoUs of background and foreground (Fig. 5 reports 1 minus this); not a mean over masks."""
    counts = confusion.double()
    hits = counts.diagonal()
    return float((hits / (counts.sum(0) + counts.sum(1) - hits)).mean())


def _cosines(size: int, length: int) -> tuple[Tensor, Tensor]:
    """The `length` lowest 2-D frequencies as [length, size^2] orthonormal rows, and falling variances [length]."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    waves = (torch.arange(size, dtype=torch.float64)[:, None] * position).cos()
    waves = waves / waves.norm(dim=1, keepdim=True)
    frequency = torch.arange(size).square()
    energy = (frequency[:, None] + frequency).flatten()
    order = energy.argsort(stable=True)[:length]
    basis = torch.einsum("ay,bx->abyx", waves, waves).reshape(size * size, size * size)[order]
    variance = 10.0 * size * size / (1.0 + energy[order]) ** 1.5  # about what COCO's masks have
    return basis.float(), variance.float()


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    # The authors' names say how a file was fitted: coco_2017_train_class_agnosticTrue_whitenTrue_sigmoidTrue_60.npz
    noisy = re.search(r"sigmoid(True|False)", path.name)
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in ARRAYS}, {"noisy_logits": noisy[1] == "True"} if noisy else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("meinst_encoding", "{}"))
        return {name: file.get_tensor(name) for name in ARRAYS}, facts
