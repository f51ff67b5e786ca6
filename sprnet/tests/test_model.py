from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import sprnet
from onestage.errors import UsageError
from onestage.nn.towers import flatten_levels
from sprnet.config import DEMO, R50_500, R50_800, VARIANTS
from sprnet.model import BRANCHES, ConsecutiveFusion, MaskHead, ParallelFusion, PixelDecoder, SPRNet, upsampled_conv

SMALLER = replace(
    DEMO,
    width=32,
    decoder_width=16,
    input=replace(DEMO.input, test_size=(64, 64), train_sizes=((64, 64),)),
    inference=replace(DEMO.inference, score_threshold=0.0),
)


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in ((48, 80), (90, 60))]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return SPRNet(SMALLER)


def _truths(pictures, labels=(2, 0)):
    return [
        {
            "boxes": torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 52.0, 40.0]])[: len(labels)],
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.ones(len(labels), *picture.shape[1:], dtype=torch.uint8),
        }
        for picture in pictures
    ]


def _levels(width, images=1):
    return [torch.randn(images, width, h, w) for h, w in ((8, 6), (4, 3), (2, 2), (1, 1), (1, 1))]


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_numbers_of_parameters():
    with torch.device("meta"):
        whole, boxes = SPRNet(R50_800), SPRNet(VARIANTS["retinanet_800_fpn"])
    assert _count(whole) == 41_436_932
    assert _count(boxes) == 37_968_692
    assert _count(boxes.backbone) == 23_508_032
    assert _count(boxes.fpn) == 2_688_512 + 5_308_928
    assert _count(boxes.head.cls_tower) + _count(boxes.head.logits) == 4_019_920
    assert _count(boxes.head.box_tower) + _count(boxes.head.deltas) == 2_443_300
    assert _count(whole.fpn.merge) == 136_192  # 0.36 %; the paper says 0.05 %
    assert _count(whole.mask_head.fusion) == 950_912
    assert _count(whole.mask_head.decoder) == 2_381_136


@pytest.mark.parametrize(
    ("change", "fusion", "decoder"),
    [
        ({"fusion": "c33x4"}, 2_360_320, 1_987_920),
        ({"fusion": "c33_1246"}, 2_360_320, 2_774_352),
        ({"decoder_width": 128}, 950_912, 764_624),
        ({"shortcut": "none"}, 950_912, 2_381_136),
        ({"shortcut": "concat"}, 950_912, 2_381_136 + 80 * 256),
    ],
    ids=str,
)
def test_numbers_of_parameters_of_the_mask_heads(change, fusion, decoder):
    with torch.device("meta"):
        head = MaskHead(replace(R50_800, **change))
    assert (_count(head.fusion), _count(head.decoder)) == (fusion, decoder)


def test_shapes_at_800_pixels():
    with torch.device("meta"):
        raw = SPRNet(R50_800).raw_outputs(torch.empty(1, 3, 800, 1088))
    assert raw.sizes == [(100, 136), (50, 68), (25, 34), (13, 17), (7, 9)]
    assert raw.anchors.shape == (18_134 * 9, 4)
    assert raw.logits.shape == (1, 18_134 * 9, 80)
    assert raw.deltas.shape == (1, 18_134 * 9, 4)


def test_what_starts_where():
    torch.manual_seed(0)
    head = MaskHead(replace(R50_800, num_classes=2))
    assert_close(head.fusion.branches[1].weight.std().item(), 0.01, atol=1e-4, rtol=0)
    assert_close(head.decoder.deconvs[0].weight.std().item(), 640**-0.5, atol=1e-3, rtol=0)
    assert_close(head.decoder.convs[0].weight.std().item(), (2 / 2304) ** 0.5, atol=1e-3, rtol=0)
    # The signal keeps its size through the linear deconvolutions.
    assert 0.9 < head.decoder.low_resolution(torch.randn(50, 640)).std() < 1.1
    assert all((part.bias == 0).all() for part in (*head.decoder.deconvs, *head.decoder.convs, head.decoder.classes))


@pytest.mark.parametrize("kind", ["sec32", "c33_1246", "c33x4"])
def test_fusion_at_some_pixels_equals_the_dense_one(kind):
    torch.manual_seed(0)
    fusion = ConsecutiveFusion(8) if kind == "c33x4" else ParallelFusion(8, BRANCHES[kind])
    for conv in fusion.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.2)
            nn.init.normal_(conv.bias)
    levels = [level.requires_grad_() for level in _levels(8)]
    dense = flatten_levels([fusion(level) for level in levels], fusion.channels)[0]
    index = torch.tensor([0, 5, 47, 48, 59, 63, 64, 65, 20, 20])
    found = fusion.at([level[0] for level in levels], index)
    assert found.shape == (10, fusion.channels)
    assert_close(found, dense[index])
    weights = torch.randn_like(found)
    for leaf in (levels[0], *fusion.parameters()):
        expected, ours = (
            torch.autograd.grad((x * weights).sum(), leaf, retain_graph=True)[0] for x in (dense[index], found)
        )
        assert_close(ours, expected)


def test_fusion_reads_row_and_column_of_its_own_level():
    # Features that are a ramp: level * 100 + y * 10 + x, seen through a 1x1 identity.
    fusion = ParallelFusion(1, ((1, 1, 1.0),))
    nn.init.ones_(fusion.branches[0].weight)
    levels = [
        torch.arange(4.0)[None, :, None] * 10 + torch.arange(3.0) + 100,
        torch.arange(2.0)[None, :, None] * 10 + torch.arange(3.0) + 200,
    ]
    found = fusion.at(levels, torch.tensor([5, 11, 12, 16]))
    assert found[:, 0].tolist() == [112, 132, 200, 211]


def test_phases_equal_upsampling_and_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(5, 7, 3, padding=1), torch.randn(3, 5, 4, 6, requires_grad=True)
    dense = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    found = upsampled_conv(x, conv.weight, conv.bias)
    assert_close(found, dense, atol=1e-6, rtol=0)
    weights = torch.randn_like(dense)
    for leaf in (x, conv.weight, conv.bias):
        expected, ours = (torch.autograd.grad((y * weights).sum(), leaf, retain_graph=True)[0] for y in (dense, found))
        assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shortcut", ["add", "none", "concat"])
def test_one_row_of_a_class_equals_the_map_of_all_classes(shortcut):
    torch.manual_seed(0)
    decoder = PixelDecoder(12, replace(SMALLER, num_classes=6, shortcut=shortcut))
    nn.init.normal_(decoder.classes.weight)
    nn.init.normal_(decoder.classes.bias)
    vectors, labels, owner = torch.randn(3, 12), torch.tensor([5, 0, 3, 3]), torch.tensor([2, 0, 0, 1])
    low = decoder.low_resolution(vectors)
    high = low
    for conv in decoder.convs:
        high = conv(F.interpolate(high, scale_factor=2, mode="nearest")).relu()
    wide = F.interpolate(low, scale_factor=4, mode="nearest")
    features = {"add": high + wide, "none": high, "concat": torch.cat((high, wide), 1)}[shortcut]
    dense = decoder.classes(features)  # [3, 6, 32, 32]
    assert_close(decoder(vectors, labels, owner), dense[owner, labels], atol=1e-5, rtol=1e-4)
    assert_close(decoder(vectors, labels[:3]), dense[torch.arange(3), labels[:3]], atol=1e-5, rtol=1e-4)


def test_the_deconvolutions_are_one_affine_map():
    torch.manual_seed(0)
    decoder = PixelDecoder(12, SMALLER)
    for deconv in decoder.deconvs:
        nn.init.normal_(deconv.bias)
    x = torch.randn(4, 12)
    origin = decoder.low_resolution(torch.zeros(4, 12))
    for factor in (-2.0, 0.5):
        assert_close(
            decoder.low_resolution(factor * x) - origin,
            factor * (decoder.low_resolution(x) - origin),
            atol=1e-4,
            rtol=1e-4,
        )


@torch.no_grad()
def test_a_pixel_is_decoded_once_for_all_its_detections(monkeypatch):
    torch.manual_seed(0)
    head, levels = MaskHead(SMALLER), _levels(32, images=2)
    monkeypatch.setattr("sprnet.model.CHUNK", 2)
    sizes = []
    head.decoder.deconvs[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    pixels, labels = torch.tensor([50, 3, 50, 20, 3, 64]), torch.tensor([0, 1, 2, 1, 1, 0])
    found = head.masks_at(levels, 1, pixels, labels)
    assert sizes == [2, 2]  # four pixels
    assert_close(found, head([level[1:] for level in levels], [pixels], labels))
    assert torch.equal(found[1], found[4])
    assert head.masks_at(levels, 0, pixels[:0], labels[:0]).shape == (0, 32, 32)


def test_training_reads_the_pixels_of_each_image():
    torch.manual_seed(0)
    head, levels = MaskHead(SMALLER), _levels(32, images=2)
    pixels, labels = [torch.tensor([4, 60]), torch.tensor([7])], torch.tensor([2, 0, 1])
    both = head(levels, pixels, labels)
    assert_close(both[2:], head([level[1:] for level in levels], pixels[1:], labels[2:]))


def test_a_training_step_moves_every_parameter(model, pictures):
    losses = model.train()(pictures, _truths(pictures))
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_mask"]
    sum(losses.values()).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # The one cell of P7 is centred at 64 px, on the border of the picture, where anchors are ignored.
    assert names & still == {"fpn.extra.1.weight", "fpn.extra.1.bias"}


@pytest.mark.parametrize(
    "change",
    [
        {"gate": "spatial"},
        {"gate": "none"},
        {"gate_share_levels": True},
        {"masks": False},
        {"fusion": "c33x4"},
        {"fusion": "c33_1246"},
        {"shortcut": "concat"},
        {"pixel_dedupe": False, "force_match": True},
        {"box_coder": "corners"},
        {"reduce_normalisers": True},
    ],
    ids=str,
)
def test_every_switch_trains_and_detects(pictures, change):
    torch.manual_seed(0)
    model = SPRNet(replace(SMALLER, **change))
    losses = model.train()(pictures, _truths(pictures))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    found = model.eval().detect(pictures)
    assert (found[0].masks is None) == (change == {"masks": False})
    assert ("masks" in model(pictures)[0]) == (change != {"masks": False})


def test_a_batch_without_instances_trains_and_touches_every_parameter(model, pictures):
    losses = model.train()(pictures, _truths(pictures, ()))
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_crowds_are_nothing_to_learn(model, pictures):
    truths = _truths(pictures)
    for truth in truths:
        truth["iscrowd"] = torch.ones(2, dtype=torch.bool)
    losses = model.train()(pictures, truths)
    assert losses["loss_box"] == losses["loss_mask"] == 0


def test_frozen_batch_norm_stays_so_in_training():
    config = replace(SMALLER, backbone=replace(SMALLER.backbone, norm="frozen"))
    model = SPRNet(config).train()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not any(part.training for part in norms)
    assert all(parameter.requires_grad for parameter in model.backbone.conv1.parameters())


@torch.no_grad()
def test_detections_in_every_form(model, pictures):
    model.eval()
    public = model(pictures)
    for picture, found in zip(pictures, public, strict=True):
        assert found["masks"].shape == (len(found["boxes"]), *picture.shape[1:])
        assert (found["scores"].diff() <= 0).all()
        limit = torch.tensor(picture.shape[1:]).flip(0).repeat(2)
        assert ((found["boxes"] >= 0) & (found["boxes"] <= limit)).all()
    model.mask_output = "prob"
    assert ((model(pictures)[0]["masks"][:, 0] >= 0.5) != public[0]["masks"]).float().mean() < 1e-5
    model.mask_output = "lowres"
    assert model(pictures)[0]["masks"].shape[1:] == (1, 32, 32)
    assert model.detect(pictures, masks=False)[0].masks is None


@torch.no_grad()
def test_other_images_of_a_batch_change_nothing(pictures):
    torch.manual_seed(1)
    model = SPRNet(replace(SMALLER, input=replace(R50_500.input, test_size=(64, 96)))).eval()
    (alone,) = model.detect(pictures[:1])
    for found in model.detect(pictures[:1] * 2):
        assert_close(found.scores, alone.scores, atol=1e-5, rtol=0)
    assert [found.masks.size for found in model.detect(pictures)] == [(48, 80), (90, 60)]


def test_builders_follow_torchvision():
    assert sprnet.list_models() == list(VARIANTS)
    model = sprnet.get_model("demo", num_classes=2, decoder_width=8)
    assert not model.training
    assert (model.config.num_classes, model.config.decoder_width) == (2, 8)
    with pytest.raises(UsageError, match="no model 'r50'"):
        sprnet.get_model("r50")
