"""SPRNet (Yao et al., 2019): RetinaNet on a gated pyramid, and a head that decodes masks from single pixels.

Figure 2: `SPRNet` is the whole, `GatedMerge` (gate.py) the G of the pyramid, `MaskHead` the mask branch of Sec. 3.2:
`ParallelFusion` gathers context into each pixel, `targets` and `decode` say which pixels count, `PixelDecoder`
reconstructs a mask from each. Most layers are not printed; docs/methods/sprnet.md says whose choice each one is.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn import retinanet
from onestage.nn.fpn import FPN
from onestage.nn.resnet import build_backbone
from onestage.nn.towers import conv_at, conv_tower, flatten_levels, init_normal
from onestage.ops import host
from onestage.structures import FORM_OF, Detections, MaskForm, Target, training_targets
from onestage.transforms import prepare_batch
from sprnet.config import SPRNetConfig
from sprnet.decode import decode
from sprnet.gate import GatedMerge
from sprnet.losses import compute_losses
from sprnet.targets import MASK_SIZE, assign_targets

# Side, dilation and width (1: the pyramid's) of the parallel convs of each fusion.
BRANCHES = {
    "sec32": ((1, 1, 1.0), (3, 2, 0.5), (3, 4, 0.5), (3, 6, 0.5)),
    "c33_1246": ((3, 1, 1.0), (3, 2, 1.0), (3, 4, 1.0), (3, 6, 1.0)),
}

# Pixels decoded at once at inference: their 32 x 32 x 256 maps take 1 MB each.
CHUNK = 32


class RawOutput(NamedTuple):
    """What the network says about B images, and where masks are decoded from; A anchors of all levels."""

    anchors: Tensor  # [A, 4] xyxy, input pixels, level by level, row by row, anchor by anchor
    sizes: list[tuple[int, int]]  # (h, w) of each level
    logits: Tensor  # [B, A, K] class logits
    deltas: Tensor  # [B, A, 4] box codes
    levels: list[Tensor]  # the pyramid, [B, C, h, w] each
    vectors: Tensor | None = None  # [B, P, C'] what masks are decoded from, for export; else see `MaskHead.masks_at`


class SPRNet(nn.Module):
    """SPRNet; without masks, RetinaNet on a gated or plain pyramid.

    Train: `model(images, targets)` -> dict of scalar losses. Eval: `model(images)` -> list of dicts (`boxes` xyxy
    image pixels, `labels`, `scores`, `masks`). Images are [3, H, W] RGB, uint8 or float in 0..1, of any size;
    resizing, normalising and padding happen inside. `mask_output` says in which form "masks" comes
    (`Detections.as_dict`).

    Args:
        config: Every switch of the method.
    """

    output_type = RawOutput
    parts_of_decode = ("mask_head.decoder",)

    def __init__(self, config: SPRNetConfig):
        super().__init__()
        self.config = config
        self.mask_output = "bool" if config.masks else "none"
        self.backbone = build_backbone(config.backbone)
        merge = None
        if config.gate != "none":
            merge = GatedMerge(config.width, 2, scores=config.gate, share_levels=config.gate_share_levels)
        self.fpn = FPN(self.backbone.channels[1:], config.width, extra="c5", merge=merge)
        self.head = retinanet.RetinaNetHead(config.num_classes, config.width, config.tower_depth)
        self.mask_head = MaskHead(config) if config.masks else None

    def forward(
        self, images: list[Tensor], targets: list[Target] | list[dict[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        if not self.training:
            found = self._detect(images, FORM_OF.get(self.mask_output, "binary"))
            return [detections.as_dict(self.mask_output) for detections in found]
        truth = training_targets(targets, images, self.config.num_classes)
        batch = prepare_batch(images, truth, self.config.input, training=True)
        raw = self.raw_outputs(batch.pixels)
        answers = assign_targets(batch.targets or [], raw, batch.frames, self.config)
        masks = None if self.mask_head is None else self.mask_head(raw.levels, answers.pixels, answers.labels)
        return compute_losses(raw, answers, masks, self.config)

    def raw_outputs(self, pixels: Tensor) -> RawOutput:
        """Network outputs for normalised, padded pixels [B, 3, H, W]."""
        _, *features = self.backbone(pixels)
        levels = self.fpn(features)
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        anchors = retinanet.anchors(sizes, retinanet.STRIDES, base_size=self.config.anchor_size, device=pixels.device)
        logits, deltas = self.head(levels)
        return RawOutput(anchors, sizes, logits, deltas, levels)

    def dense_outputs(self, pixels: Tensor) -> RawOutput:
        """`raw_outputs` with what masks are decoded from at every location in place of the pyramid, for export."""
        raw = self.raw_outputs(pixels)
        vectors = None if self.mask_head is None else self.mask_head.dense_vectors(raw.levels)
        return raw._replace(vectors=vectors, levels=[])

    def detect(self, images: list[Tensor], masks: bool = True) -> list[Detections]:
        """Detections with `Masks` in box windows; never a dense mask. Call in eval mode."""
        return self._detect(images, "binary" if masks else "none")

    @torch.no_grad()
    def _detect(self, images: list[Tensor], masks: MaskForm) -> list[Detections]:
        batch = prepare_batch(images, None, self.config.input, training=False)
        raw = self.raw_outputs(batch.pixels)
        masks_at = None
        if self.mask_head is not None:
            masks_at = partial(self.mask_head.masks_at, raw.levels, dense=raw.vectors)
        return decode(raw, batch.frames, masks_at, self.config, masks)


class MaskHead(nn.Module):
    """Single pixel reconstruction (Fig. 2, Sec. 3.2): a mask from the feature vector of one pixel of the pyramid.

    Picked pixels of pyramid levels [B, C, h, w] in, mask logits [N, 32, 32] out: `forward` in training, `masks_at` in
    tests.

    Args:
        config: Fusion, decoder and classes.
    """

    def __init__(self, config: SPRNetConfig):
        super().__init__()
        if config.fusion == "c33x4":
            self.fusion: ParallelFusion | ConsecutiveFusion = ConsecutiveFusion(config.width)
        else:
            self.fusion = ParallelFusion(config.width, BRANCHES[config.fusion])
        self.decoder = PixelDecoder(self.fusion.channels, config)

    def forward(self, levels: list[Tensor], pixels: list[Tensor], labels: Tensor) -> Tensor:
        """Mask logits of picked pixels, for training.

        Args:
            levels: The pyramid of B images, [B, C, h, w] each.
            pixels: B tensors [n] int64 into the locations of all levels; n sums up to N.
            labels: [N] int64, the class whose mask is wanted.

        Returns:
            [N, 32, 32].
        """
        vectors = [self.fusion.at([level[i] for level in levels], index) for i, index in enumerate(pixels)]
        return self.decoder(torch.cat(vectors), labels)

    def dense_vectors(self, levels: list[Tensor]) -> Tensor:
        """What masks are decoded from, [B, P, C'], at all locations of the pyramid [B, C, h, w] each."""
        return flatten_levels([self.fusion(level) for level in levels], self.fusion.channels)

    def masks_at(
        self, levels: list[Tensor], image: int, pixels: Tensor, labels: Tensor, dense: Tensor | None = None
    ) -> Tensor:
        """Mask logits [N, 32, 32] of the `pixels` [N] of one image for classes `labels` [N].

        Detections of one pixel differ in class and box only; it is decoded once, but on a GPU once for each. `dense` is
        what `dense_vectors` gave, if it was asked.
        """
        fixed = host.keeps_fixed_shapes(pixels.device)  # how many are distinct would have to be waited for
        distinct, owner = (pixels, pixels) if fixed else pixels.unique(return_inverse=True)
        if dense is None:
            vectors = self.fusion.at([level[image] for level in levels], distinct)
        else:
            vectors = dense[image, distinct]
        if fixed:
            chunks = zip(vectors.split(CHUNK), labels.split(CHUNK), strict=True)
            return torch.cat([self.decoder(some, of) for some, of in chunks])
        logits = vectors.new_empty(len(pixels), *self.decoder.size)
        for start in range(0, len(distinct), CHUNK):
            own = ((owner >= start) & (owner < start + CHUNK)).nonzero().flatten()
            decoded = self.decoder(vectors[start : start + CHUNK], labels[own], owner[own] - start)
            logits[own] = decoded.to(logits.dtype)
        return logits


class ParallelFusion(nn.Module):
    """Multi-scale fusion: parallel convolutions of different dilation on a pyramid level, their outputs side by side.

    One layer deep, so `at` reads nothing but the taps of the pixels that are asked for.

    Args:
        width: Channels of the pyramid.
        branches: Kernel side, dilation and width (1: the pyramid's) of each conv.
    """

    def __init__(self, width: int, branches: tuple[tuple[int, int, float], ...]):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(width, int(width * share), side, padding=side // 2 * dilation, dilation=dilation)
            for side, dilation, share in branches
        )
        self.channels = sum(int(width * share) for _, _, share in branches)
        init_normal(self)

    def forward(self, level: Tensor) -> Tensor:
        """[B, width, h, w] to [B, channels, h, w]."""
        return torch.cat([conv(level) for conv in self.branches], dim=1).relu()

    def at(self, levels: list[Tensor], index: Tensor) -> Tensor:
        """[N, channels] at the locations `index` [N] of all levels [C, h, w] of one image."""
        branches = [conv for conv in self.branches if isinstance(conv, nn.Conv2d)]
        return torch.cat([conv_at(conv, levels, index) for conv in branches], dim=1).relu()


class ConsecutiveFusion(nn.Module):
    """Four convolutions one after another instead (Table 2a): context of 9 x 9 cells, known densely only."""

    def __init__(self, width: int):
        super().__init__()
        self.tower = conv_tower(width, width, 4, norm="none", bias=True)
        self.channels = width
        init_normal(self)

    def forward(self, level: Tensor) -> Tensor:
        """[B, width, h, w] to the same."""
        return self.tower(level)

    def at(self, levels: list[Tensor], index: Tensor) -> Tensor:
        """[N, width] at the locations `index` [N] of all levels [C, h, w] of one image."""
        return flatten_levels([self(level[None]) for level in levels], self.channels)[0, index]


class PixelDecoder(nn.Module):
    """A vector to a 32 x 32 mask: 1 to 8 by linear deconvolutions, 8 to 32 by upsampling and convolution.

    The 8 x 8 map goes to the classifier too, upsampled to the nearest ("shortcut"). The classifier has one row per
    class, of which only the one that is asked for is computed.

    Args:
        channels: Of the vector.
        config: Width, shortcut and classes.
    """

    size = (MASK_SIZE, MASK_SIZE)

    def __init__(self, channels: int, config: SPRNetConfig):
        super().__init__()
        width = config.decoder_width
        self.width = width
        self.shortcut = config.shortcut
        self.deconvs = nn.ModuleList(
            nn.ConvTranspose2d(inputs, width, kernel_size=2, stride=2) for inputs in (channels, width, width)
        )
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.classes = nn.Conv2d(width * 2 if config.shortcut == "concat" else width, config.num_classes, 1)
        self._initialise()

    def forward(self, vectors: Tensor, labels: Tensor, owner: Tensor | None = None) -> Tensor:
        """Mask logits for one class each.

        Args:
            vectors: [M, channels].
            labels: [N] int64.
            owner: [N] int64, the vector each is of; None: one each, in their order.

        Returns:
            [N, 32, 32].
        """
        low = self.low_resolution(vectors)
        high = low
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            high = upsampled_conv(high, conv.weight, conv.bias).relu()
        rows = self.classes.weight[labels, :, 0, 0]
        logits = _dot(rows[:, : self.width], high, owner) + self.classes.bias[labels, None, None]  # type: ignore[index]
        if self.shortcut == "none":
            return logits
        # Nearest upsampling commutes with the classifier: 1 map is upsampled instead of all channels.
        coarse = _dot(rows[:, -self.width :], low, owner)
        return logits + F.interpolate(coarse[:, None], size=self.size, mode="nearest")[:, 0]

    def low_resolution(self, vectors: Tensor) -> Tensor:
        """[M, channels] to [M, width, 8, 8] by three deconvolutions without activation: an affine map."""
        maps = vectors[:, :, None, None]
        for deconv in self.deconvs:
            maps = deconv(maps)
        return maps

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.ConvTranspose2d):
                # Keeps the signal's deviation at 1; with N(0, 0.01) it would be 0.007 after three linear layers.
                nn.init.normal_(part.weight, std=part.in_channels**-0.5)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
            elif isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        init_normal(self.classes)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 conv, padding 1, of `x` upsampled x2 to the nearest, computed without upsampling.

    Of the nine taps several fall on the same cell: their weights are added first. What is left are four 2x2 convs, one
    for each phase of the output, together a 4x4 transposed conv of stride 2: 4/9 of the arithmetic.

    Args:
        x: [N, C, h, w].
        weight: [out, C, 3, 3].
        bias: [out] or None.

    Returns:
        [N, out, 2 h, 2 w].
    """
    folded = _fold(_fold(weight.transpose(0, 1), dim=2), dim=3)
    return F.conv_transpose2d(x, folded, bias, stride=2, padding=1)


def _fold(taps: Tensor, dim: int) -> Tensor:
    """Three taps along `dim` to the four of a transposed conv: even outputs see cells j and j - 1, odd j + 1 and j."""
    before, middle, after = taps.unbind(dim)
    return torch.stack((after, middle + after, before + middle, before), dim)


def _dot(rows: Tensor, maps: Tensor, owner: Tensor | None) -> Tensor:
    """Products [N, h, w] of rows [N, C] with the maps [M, C, h, w] that `owner` [N] names."""
    return torch.einsum("nc,nchw->nhw", rows, maps if owner is None else maps[owner])
