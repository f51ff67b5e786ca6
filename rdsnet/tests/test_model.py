from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.nn.towers import flatten_levels
from rdsnet.config import DEMO, S_TE_OHEM_IE, YOLACT, InferenceConfig
from rdsnet.decode import Correlation
from rdsnet.method import build
from rdsnet.model import RDSNet

KEEP_ALL = replace(DEMO.inference, score_threshold=0.0)
TINY = replace(DEMO, input=replace(DEMO.input, test_size=(64, 64), train_sizes=((64, 64),)), inference=KEEP_ALL)
TINY_YOLACT, TINY_SMALL = (
    replace(
        row,
        num_classes=3,
        width=32,
        backbone=DEMO.backbone,
        input=replace(row.input, test_size=(64, 64), train_sizes=((64, 64),)),
        yolact=replace(row.yolact, anchor_sides=(12.0, 24.0, 36.0, 48.0, 60.0)),
        inference=replace(row.inference, score_threshold=0.0),
    )
    for row in (YOLACT, S_TE_OHEM_IE)
)
EVERY = {"corr": TINY, "boxes": replace(TINY, masks="none"), "lc": TINY_YOLACT, "small": TINY_SMALL}


@pytest.fixture(params=EVERY)
def model(request):
    torch.manual_seed(0)
    return build(EVERY[request.param])


def scene(sizes=((50, 70), (64, 40)), labels=(1, 2), crowd=False):
    """Images of noise, and targets with a square for every label."""
    images = [torch.rand(3, *size) for size in sizes]
    corners = torch.tensor([[5.0, 8.0], [20.0, 15.0]])[: len(labels)]
    boxes = torch.cat((corners, corners + 20), 1)
    targets = []
    for height, width in sizes:
        masks = torch.zeros(len(labels), height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        marked = torch.tensor([crowd] * len(labels), dtype=torch.bool)
        targets.append({"boxes": boxes, "labels": torch.tensor(labels).long(), "masks": masks, "iscrowd": marked})
    return images, targets


def test_training_gives_finite_losses_that_reach_every_parameter(model):
    losses = model.train()(*scene())
    assert {"loss_cls", "loss_box"} <= losses.keys()
    assert ("loss_mask" in losses) == (model.config.masks != "none")
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert {name for name, p in model.named_parameters() if not p.requires_grad} <= {"mbrm.weight", "mbrm.bias"}


@pytest.mark.parametrize("crowd", [False, True])
def test_images_without_usable_instances_train_too(model, crowd):
    losses = model.train()(*scene(labels=(1,) if crowd else (), crowd=crowd))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_detections_are_inside_the_image_and_sorted(model):
    images, _ = scene()
    for image, found in zip(images, model.eval().detect(images), strict=True):
        height, width = image.shape[1:]
        assert 0 < len(found) <= 100
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.masks is None) == (model.config.masks == "none")
        assert found.unrefined_boxes is None
    assert model.detect(images, masks=False)[0].masks is None


@pytest.mark.parametrize("form", ["bool", "prob", "lowres", "rle", "packed", "none"])
@pytest.mark.parametrize("config", [TINY, TINY_YOLACT, TINY_SMALL], ids=["corr", "lc", "small"])
def test_every_public_form_of_masks(config, form):
    torch.manual_seed(0)
    model = build(config).eval()
    model.mask_output = form
    images, _ = scene()
    (found, _) = model(images)
    count = len(found["boxes"])
    if form == "none":
        assert "masks" not in found
    elif form in ("bool", "prob"):
        assert found["masks"].shape[-2:] == images[0].shape[1:]
        assert len(found["masks"]) == count
    elif form == "lowres":
        assert found["masks"].shape == (count, 1, 16, 16)


@pytest.mark.parametrize("form", ["bool", "prob", "lowres", "rle"])
@pytest.mark.parametrize("config", [TINY, TINY_YOLACT, TINY_SMALL], ids=["corr", "lc", "small"])
def test_every_form_of_masks_of_an_image_without_detections(config, form):
    model = build(replace(config, inference=replace(config.inference, score_threshold=1.0))).eval()
    model.mask_output = form
    images, _ = scene()
    for image, found in zip(images, model(images), strict=True):
        assert len(found["boxes"]) == 0
        if form == "rle":
            assert found["masks"] == []
        else:
            whole = tuple(image.shape[1:])
            shapes = {"bool": (0, *whole), "prob": (0, 1, *whole), "lowres": (0, 1, 16, 16)}
            assert found["masks"].shape == shapes[form]


@pytest.mark.parametrize("config", [TINY, TINY_YOLACT, TINY_SMALL], ids=["corr", "lc", "small"])
def test_binary_masks_are_the_soft_ones_above_the_threshold(config):
    torch.manual_seed(0)
    model = build(config).eval()
    images, _ = scene()
    found = model.detect(images)
    model.mask_output = "prob"
    soft = model(images)
    for binary, dense in zip(found, soft, strict=True):
        expected = dense["masks"][:, 0] > config.inference.mask_threshold
        assert (binary.masks.to_bool() != expected).float().mean() < 1e-4


@pytest.mark.parametrize("refine", ["direct", "mbrm"])
@pytest.mark.parametrize("frame", ["image", "input"])
def test_refined_boxes_come_with_the_regressed_ones(refine, frame):
    torch.manual_seed(0)
    model = build(TINY).eval()
    images, _ = scene()
    regressed = model.detect(images)
    model.config = replace(TINY, inference=replace(KEEP_ALL, refine=refine, refine_frame=frame))
    refined = model.detect(images)
    for before, after in zip(regressed, refined, strict=True):
        assert torch.equal(after.unrefined_boxes, before.boxes)
        assert torch.equal(after.masks.pixels, before.masks.pixels)
        assert torch.equal(after.scores, before.scores)
        assert not torch.equal(after.boxes, before.boxes)
    boxes_only = model.detect(images, masks=False)
    assert torch.equal(boxes_only[0].boxes, refined[0].boxes)
    assert "unrefined_boxes" in model(images)[0]


def test_correlation_is_computed_in_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    correlation = Correlation(
        torch.randn(8, 5, 6, generator=generator).bfloat16(), torch.randn(3, 8, generator=generator).bfloat16()
    )
    expected = correlation.logits()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(correlation.logits(), expected)


def test_object_vectors_at_anchors_are_those_of_the_dense_conv():
    torch.manual_seed(0)
    model = build(TINY).eval()
    with torch.no_grad():
        raw = model.raw_outputs(torch.randn(2, 3, 64, 64))
        dense = flatten_levels([model.object_vectors.out(x) for x in raw.object_features], 64)
        index = torch.tensor([0, 8, 9, len(raw.anchors) - 1, 300, 300])
        for image in (0, 1):
            assert_close(model.vectors_at(raw, image, index).flatten(1), dense[image, index], atol=1e-6, rtol=1e-5)


def test_an_image_has_the_same_detections_alone_and_beside_a_larger_one():
    torch.manual_seed(0)
    config = replace(TINY, input=replace(TINY.input, resize="keep_ratio", test_size=(48, 96)), inference=KEEP_ALL)
    model = RDSNet(config).eval()
    images, _ = scene(sizes=((48, 60), (48, 96)))
    together, alone = model.detect(images)[0], model.detect(images[:1])[0]
    # Group norm sees the padding of the other image: values move, masks are cut to the image's own canvas all the same.
    assert together.masks.size == alone.masks.size == (48, 60)
    assert len(together) == len(alone)


def test_refinement_is_off_unless_asked_for():
    assert InferenceConfig().refine == "none"
