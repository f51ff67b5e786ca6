"""What training computes from half-precision outputs is of full precision."""

from dataclasses import replace

import torch
from torch.testing import assert_close

from onestage.nn import fcos
from onestage.structures import Target
from sipmask.config import DEMO, VIDEO_SMALL
from sipmask.losses import MaskPositives, alignment_weights, scoring_loss
from sipmask.model import RawOutput, SipMask
from sipmask.scoring import mask_iou
from sipmask.targets import assign_targets
from sipmask.tracking import match_logits

SIZES = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]  # of a 64 x 64 input
CONFIG = replace(DEMO, grid=(1, 1), num_bases=1, rescore=True)


def test_weights_of_half_precision_scores_are_those_of_the_same_numbers_in_float32():
    logits = torch.linspace(-3, 3, 7).bfloat16()[:, None]
    labels = torch.zeros(7, dtype=torch.int64)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(7, 4)
    for weighting in ("cls_loc", "none"):
        config = replace(CONFIG, weighting=weighting)
        for ours, expected in zip(
            alignment_weights(logits, labels, boxes, boxes, config),
            alignment_weights(logits.float(), labels, boxes, boxes, config),
            strict=True,
        ):
            assert_close(ours, expected)  # in dtype, too


def test_products_of_embeddings_are_of_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    embeddings, known = torch.randn(4, 512, generator=generator), torch.randn(3, 512, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = match_logits(embeddings, known)
    assert_close(logits[:, 1:], embeddings @ known.T)
    assert logits[:, 0].tolist() == [0, 0, 0, 0]


class _Zero(torch.nn.Linear):
    """A scoring net that says 0 of every mask."""

    def forward(self, masks, labels):
        return torch.zeros(len(masks))


def test_the_scoring_loss_counts_more_masks_than_half_precision_can():
    count = 301  # 300 in bf16
    raw = _raw(basis=torch.ones(1, 1, 8, 8), coefficients=torch.full((1, count, 1), 9.0))
    box = torch.tensor([[4.0, 4.0, 60.0, 60.0]])
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 4:60, 4:40] = 1
    targets = assign_targets([Target(box, torch.tensor([0]), masks, torch.tensor([False]))], raw, CONFIG)
    nothing = torch.zeros(count, dtype=torch.int64)
    kept = MaskPositives(nothing, (box / 2).expand(count, 4), nothing, nothing)
    loss = scoring_loss(raw, targets, [kept], _Zero(1, 1), CONFIG)
    soft = torch.zeros(1, 32, 32)
    soft[:, 2:30, 2:30] = 1
    iou = mask_iou(soft, masks[:, ::2, ::2], 0.4)[0]
    assert_close(loss, 10 * count * iou**2 / (count + 0.1))


def _raw(basis, coefficients):
    points = fcos.locations(SIZES)
    logits, distances = torch.zeros(1, len(points), 3), torch.ones(1, len(points), 4)
    return RawOutput(
        logits.bfloat16(), distances, logits[..., 0].bfloat16(), coefficients, [], basis.bfloat16(), points, SIZES
    )


def test_every_loss_under_autocast_is_float32_with_and_without_instances():
    torch.manual_seed(0)
    config = replace(VIDEO_SMALL, num_classes=3, input=DEMO.input, rescore=True)
    model = SipMask(config).train()
    image = torch.rand(3, 128, 128)
    for count in (0, 1):
        masks = torch.zeros(count, 128, 128, dtype=torch.uint8)
        masks[:, 8:72, 8:72] = 1
        boxes = torch.tensor([[8.0, 8.0, 72.0, 72.0]])[:count]
        ids = list(range(count))
        target = {"boxes": boxes, "labels": torch.zeros(count, dtype=torch.int64), "masks": masks, "track_ids": ids}
        reference = {"image": image, "boxes": boxes, "track_ids": ids}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model([image], [target | {"reference": reference}])
        assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, torch.float32)
        assert len(losses) == 6
