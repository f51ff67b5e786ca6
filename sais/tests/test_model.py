from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import sais
from onestage.builders import named_model
from onestage.errors import UsageError
from sais.config import DEMO, FCOS, KEEP_RATIO, R50_640, R50_768, VARIANTS
from sais.method import METHOD
from sais.model import SAIS, SAISHead

SMALLER = replace(
    DEMO,
    prototype_width=32,
    num_prototypes=8,
    input=replace(DEMO.input, test_size=(64, 64), train_sizes=((64, 64),)),
    inference=replace(DEMO.inference, score_threshold=0.0),
)


@pytest.fixture(scope="module")
def pictures():
    return [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((48, 80), (90, 60))]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return SAIS(SMALLER)


def _truth(size, labels=(2, 0)):
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 56.0, 40.0]])[: len(labels)]
    masks = torch.zeros(len(labels), *size, dtype=torch.uint8)
    masks[:, 10:40, 8:50] = 1
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def _truths(pictures, labels=(2, 0)):
    return [_truth(tuple(picture.shape[1:]), labels) for picture in pictures]


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_numbers_of_parameters():
    with torch.device("meta"):
        whole = SAIS(R50_768)
    assert _count(whole) == 34_737_626
    assert _count(whole.backbone) == 23_508_032
    assert _count(whole.fpn) == 2_688_512 + 1_180_160
    assert _count(whole.head.cls_tower) + _count(whole.head.box_tower) == 4_722_688
    assert sum(map(_count, (whole.head.logits, whole.head.centerness, whole.head.distances))) == 195_925
    assert _count(whole.head.coefficients) == 73_760
    assert _count(whole.head.scales) == 5
    assert _count(whole.protonet) == 2_368_544


def test_fusion_adds_no_parameters_and_the_detector_alone_has_no_mask_parts():
    with torch.device("meta"):
        assert _count(SAIS(replace(R50_768, fuse=False))) == 34_737_626
        assert _count(SAIS(FCOS)) == 34_737_626 - 73_760 - 2_368_544


@pytest.mark.parametrize(
    ("config", "side", "levels", "locations"),
    [(R50_768, 768, [96, 48, 24, 12, 6], 12_276), (R50_640, 640, [80, 40, 20, 10, 5], 8_525)],
)
def test_shapes_at_the_papers_sizes(config, side, levels, locations):
    with FakeTensorMode():
        raw = SAIS(config).train().raw_outputs(torch.empty(1, 3, side, side))
    assert raw.sizes == [(level, level) for level in levels]
    assert raw.logits.shape == (1, locations, 80)
    assert raw.distances.shape == (1, locations, 4)
    assert raw.centerness.shape == (1, locations)
    assert raw.coefficients.shape == (1, locations, 32)
    assert raw.prototypes.shape == (1, 32, side // 4, side // 4)


def test_what_starts_where():
    torch.manual_seed(0)
    head = SAISHead(R50_768)
    assert_close(head.logits.weight.std().item(), 0.01, atol=3e-4, rtol=0)
    assert_close(head.logits.bias.sigmoid(), torch.full((80,), 0.01))
    assert all(scale.scale == 1 for scale in head.scales)
    assert all((part.bias == 0).all() for part in (head.centerness, head.distances, head.coefficients))


@pytest.mark.parametrize("fuse", [True, False])
def test_coefficients_read_the_sum_of_both_towers(fuse):
    torch.manual_seed(0)
    head = SAISHead(replace(SMALLER, fuse=fuse)).train()
    seen = {}

    def watch(name):
        def remember(module, inputs, output):
            seen.setdefault(name, (inputs[0], output))  # P3 comes first

        getattr(head, name).register_forward_hook(remember)

    for name in ("cls_tower", "box_tower", "coefficients"):
        watch(name)
    raw = head([torch.randn(1, 64, side, side) for side in (8, 4, 2, 1, 1)])
    expected = seen["cls_tower"][1] + (seen["box_tower"][1] if fuse else 0)
    assert_close(seen["coefficients"][0], expected)
    assert_close(raw.coefficients[0, :64], seen["coefficients"][1].tanh()[0].flatten(1).T)


def test_the_mask_loss_teaches_both_towers(model):
    raw = model.train().raw_outputs(torch.randn(2, 3, 64, 64))
    raw.coefficients.sum().backward()
    for tower in (model.head.cls_tower, model.head.box_tower):
        assert all(parameter.grad.abs().sum() > 0 for parameter in tower.parameters())


def test_distances_are_the_exponential_of_the_scaled_output(model):
    head = model.head
    with torch.no_grad():
        head.scales[0].scale.fill_(2.0)
        raw = head([torch.randn(1, 64, side, side) for side in (4, 2, 1, 1, 1)])
        assert (raw.distances > 0).all()
        bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
        head.distances.weight.zero_()
        head.distances.bias.copy_(bias)
        raw = head([torch.randn(1, 64, side, side) for side in (4, 2, 1, 1, 1)])
    assert_close(raw.distances[0, 0], (2 * bias).exp())
    assert_close(raw.distances[0, -1], bias.exp())


@torch.no_grad()
def test_mixed_precision_does_not_round_distances(model):
    model.head.distances.weight.zero_()
    model.head.distances.bias.fill_(4.1)  # 4.09375 in bf16, 0.6 % of the distance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = model.eval().raw_outputs(torch.randn(1, 3, 64, 64))
    assert raw.logits.dtype == torch.bfloat16
    assert_close(raw.distances, torch.full_like(raw.distances, 4.1).exp())


def test_prototypes_are_not_negative_and_coefficients_have_both_signs(model):
    with torch.no_grad():
        raw = model.train().raw_outputs(torch.randn(1, 3, 64, 64) * 3)
    assert (raw.prototypes >= 0).all()
    assert raw.coefficients.min() < 0 < raw.coefficients.max()
    assert raw.coefficients.abs().max() < 1


@torch.no_grad()
def test_coefficients_at_kept_locations_equal_the_dense_ones(model):
    pixels = torch.randn(2, 3, 64, 64)
    model.backbone.eval()  # batch norm must not move between the passes
    model.fpn.eval()
    dense = model.head.train()(model.fpn(model.backbone(pixels)[1:])).coefficients
    raw = model.eval().raw_outputs(pixels)
    assert raw.coefficients is None
    index = torch.tensor([0, 7, 63, 64, 79, 84, 7])
    assert_close(model.head.coefficients_at(raw, 1, index), dense[1, index], atol=1e-5, rtol=1e-4)


def test_a_training_step_moves_every_parameter(model, pictures):
    model.train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses = model(pictures, _truths(pictures))
    assert sorted(losses) == ["loss_box", "loss_centerness", "loss_cls", "loss_mask"]
    sum(losses.values()).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # Boxes under 64 px are answered on P3 alone.
    assert names & still == {f"head.scales.{level}.scale" for level in range(1, 5)}


@pytest.mark.parametrize(
    "change",
    [{"fuse": False}, {"center_aware": False}, {"masks": False}, {"reduce_normalisers": True}, {"masks_per_image": 1}],
    ids=str,
)
def test_every_switch_trains_and_detects(pictures, change):
    model = SAIS(replace(SMALLER, **change))
    sum(model.train()(pictures, _truths(pictures)).values()).backward()
    found = model.eval().detect(pictures)
    assert (found[0].masks is None) == (change == {"masks": False})
    assert ("masks" in model(pictures)[0]) == (change != {"masks": False})


def test_losses_are_fp32_under_mixed_precision(pictures):
    # At 128 px: of a 1 x 1 map oneDNN's bf16 conv of stride 2 has random weight gradients (torch 2.11).
    model = SAIS(replace(SMALLER, input=DEMO.input))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(pictures, _truths(pictures))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_batch_without_instances_trains(model, pictures):
    losses = model.train()(pictures, _truths(pictures, ()))
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))


def test_crowds_and_boxes_under_a_pixel_are_nothing_to_learn(model, pictures):
    truths = _truths(pictures)
    for truth in truths:
        truth["iscrowd"] = torch.tensor([True, False])
        truth["boxes"][1] = torch.tensor([5.0, 5.0, 5.5, 30.0])
    assert model.train()(pictures, truths)["loss_box"] == 0


@torch.no_grad()
def test_detections_in_every_form(model, pictures):
    model.eval()
    model.mask_output = "bool"
    public = model(pictures)
    for picture, found in zip(pictures, public, strict=True):
        assert found["masks"].shape == (len(found["boxes"]), *picture.shape[1:])
        assert found["masks"].dtype == torch.bool
        assert (found["scores"].diff() <= 0).all()
        limit = torch.tensor(picture.shape[1:]).flip(0).repeat(2)
        assert ((found["boxes"] >= 0) & (found["boxes"] <= limit)).all()
    model.mask_output = "prob"
    differing = (model(pictures)[0]["masks"][:, 0] > 0.5) != public[0]["masks"]
    assert differing.float().mean() < 1e-5
    model.mask_output = "lowres"
    assert model(pictures)[0]["masks"].shape[1:] == (1, 16, 16)
    assert model.detect(pictures, masks=False)[0].masks is None


@torch.no_grad()
def test_other_images_of_a_batch_change_nothing(pictures):
    torch.manual_seed(1)
    model = SAIS(replace(SMALLER, input=replace(KEEP_RATIO, test_size=(64, 96)))).eval()
    alone = model.detect(pictures[:1])[0]
    together = model.detect([pictures[0], pictures[0]])[0]
    assert_close(alone.scores, together.scores, atol=1e-5, rtol=0)
    wide, tall = model.detect(pictures)
    assert wide.masks.size == (48, 80)
    assert tall.masks.size == (90, 60)


def test_builders_follow_torchvision():
    assert sais.list_models() == list(VARIANTS)
    model = sais.get_model("demo", num_classes=2, num_prototypes=5)
    assert not model.training
    assert (model.config.num_classes, model.config.num_prototypes) == (2, 5)
    with pytest.raises(UsageError, match="no model 'r50'"):
        named_model(METHOD, "r50")
