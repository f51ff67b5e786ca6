"""A narrow SAIS learns two generated images by heart."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from onestage.boxes import iou_matrix
from onestage.data.synth import ShapesDataset
from onestage.ops.mask_loss import masks_on_grid
from sais.config import DEMO
from sais.model import SAIS

STEPS = 120


@pytest.mark.slow
def test_masks_of_two_images_are_learned_by_heart():
    pairs = [ShapesDataset(2, split="train", seed=3)[i] for i in range(2)]
    pictures, truths = [list(part) for part in zip(*pairs, strict=True)]
    torch.manual_seed(0)
    model = SAIS(replace(DEMO, input=replace(DEMO.input, augmentation="none"))).train()
    optimizer = torch.optim.AdamW(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(model(pictures, truths).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        rates.step()
    for found, truth in zip(model.eval().detect(pictures), truths, strict=True):
        sure = found[found.scores > 0.5]
        overlap = iou_matrix(truth.boxes, sure.boxes)
        assert (overlap.amax(1) > 0.9).all()
        best = overlap.argmax(1)
        assert torch.equal(sure.labels[best], truth.labels)
        # What stride 4 can say of a mask; of the mask itself it is 0.80 to 0.91 here.
        target = masks_on_grid(truth.masks, 4)[:, None].float()
        wanted = F.interpolate(target, size=truth.masks.shape[1:], mode="bilinear")[:, 0] > 0.5
        masks = sure.masks.to_bool()[best]
        iou = (masks & wanted).sum((1, 2)) / (masks | wanted).sum((1, 2))
        assert (iou > 0.9).all()
