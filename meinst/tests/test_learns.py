"""Two generated images are learned by heart: boxes, classes and masks."""

import pytest
import torch
from torch import nn

from meinst.config import DEMO
from meinst.fit import prepare_codec
from meinst.model import MEInst
from onestage.boxes import iou_matrix
from onestage.data.synth import ShapesDataset


@pytest.mark.slow
def test_two_images_are_learned_by_heart():
    shapes = ShapesDataset(300, seed=11)
    torch.manual_seed(0)
    model = MEInst(DEMO).train()
    prepare_codec(model, shapes)
    (first, one), (second, two) = shapes[0], shapes[1]
    rates = _train(model, [first, second], [one, two], 200)
    assert rates[-1] < 1e-4
    for target, found in zip((one, two), model.eval().detect([first, second]), strict=True):
        found = found[found.scores > 0.4]
        iou = iou_matrix(target.boxes, found.boxes)
        match = iou.argmax(1)
        assert iou.amax(1).min() > 0.8
        assert found.labels[match].tolist() == target.labels.tolist()
        ours, theirs = found.masks.to_bool()[match], target.masks.bool()
        inter, union = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
        assert (inter / union).mean() > 0.85


def _train(model: nn.Module, images, targets, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    rates = []
    while len(rates) < steps:
        loss = torch.stack(list(model(images, targets).values())).sum()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        rates.append(schedule.get_last_lr()[0])
        if len(rates) < steps:
            schedule.step()
    return rates
