"""Mask R-CNN with our pyramid trains and detects, and the gates are the only difference between its rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import gated_mask_rcnn

    return gated_mask_rcnn


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_three_merges_and_nothing_else_tell_the_rows_apart(rows):
    with torch.device("meta"):
        gated, plain = (rows.OnPyramid(rows.VARIANTS[name]) for name in ("r50_gated", "r50"))
    assert _count(gated) - _count(plain) == 3 * 68_096
    names = {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert all(name.startswith("detector.backbone.fpn.merge.gates.") for name in names)


def test_the_plain_row_has_torchvisions_number_of_parameters(rows):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    with torch.device("meta"):
        ours = rows.OnPyramid(replace(rows.VARIANTS["r50"], num_classes=90))
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    affine = sum(part.weight.numel() + part.bias.numel() for part in ours.modules() if hasattr(part, "running_mean"))
    frozen = sum(
        1 for part in theirs.modules() if hasattr(part, "running_mean") and not list(part.parameters(recurse=False))
    )
    # torchvision keeps the affine part of frozen batch norms as buffers.
    assert _count(ours) - (affine if frozen else 0) == _count(theirs)


def test_a_step_trains_the_gates_and_detections_are_in_image_pixels(rows):
    torch.manual_seed(0)
    inference = replace(rows.DEMO.inference, score_threshold=0.0, max_detections=5)
    model = rows.OnPyramid(replace(rows.DEMO, inference=inference)).train()
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8), torch.rand(3, 80, 64)]
    truths = [
        {
            "boxes": torch.tensor([[8.0, 8.0, 56.0, 60.0]]),
            "labels": torch.tensor([2]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    losses = model(images, truths)
    sum(losses.values()).backward()
    gate = model.detector.backbone.fpn.merge.gates[0]
    assert gate.pointwise.weight.grad.any()
    for image, found in zip(images, model.eval().detect(images), strict=True):
        assert found.image_size == tuple(image.shape[1:])
        assert len(found) == len(found.masks) == 5
        assert ((found.labels >= 0) & (found.labels < 3)).all()
