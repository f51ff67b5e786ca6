"""A narrow SPRNet learns two generated images by heart, with a learning rate of its own: the paper's takes days."""

from dataclasses import replace

import pytest
import torch

from onestage.boxes import iou_matrix
from onestage.data.synth import ShapesDataset
from sprnet.config import DEMO
from sprnet.model import SPRNet

STEPS = 250


@pytest.mark.slow
def test_masks_of_two_images_are_learned_by_heart():
    images, truths = zip(*(ShapesDataset(2, split="train", seed=3)[i] for i in range(2)), strict=True)
    torch.manual_seed(0)
    model = SPRNet(replace(DEMO, input=replace(DEMO.input, augmentation="none"), mask_iou=0.5)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        loss = sum(model(list(images), list(truths)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    ious = []
    for found, truth in zip(model.eval().detect(list(images)), truths, strict=True):
        best = iou_matrix(truth.boxes, found.boxes).argmax(1)
        masks, wanted = found.masks.to_bool()[best], truth.masks.bool()
        assert torch.equal(found.labels[best], truth.labels)
        ious.append((masks & wanted).sum((1, 2)) / (masks | wanted).sum((1, 2)))
    assert torch.cat(ious).mean() > 0.8
