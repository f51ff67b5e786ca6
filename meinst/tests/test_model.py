from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from meinst.builders import get_model
from meinst.config import DEMO, R50
from meinst.model import LargeKernelConv, MEInst
from onestage.errors import UsageError
from onestage.nn.deform import SelfOffsetConv2d
from onestage.structures import Target

TINY = replace(
    DEMO,
    width=64,
    tower_depth=1,
    inference=replace(DEMO.inference, score_threshold=0.0, iou_threshold=1.0),
)
LEFT_AND_RIGHT = Target(
    torch.tensor([[8.0, 8.0, 40.0, 40.0], [50.0, 20.0, 120.0, 90.0]]),
    torch.tensor([0, 2]),
    torch.zeros(2, 96, 128, dtype=torch.uint8),
    torch.zeros(2, dtype=torch.bool),
    polygons=(((8.0, 8.0, 40.0, 8.0, 24.0, 40.0),), ((50.0, 20.0, 120.0, 20.0, 120.0, 90.0, 50.0, 90.0),)),
)
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "masks": torch.zeros(0, 96, 128)}


def _model(**changes):
    torch.manual_seed(3)
    model = MEInst(replace(TINY, **changes))
    nn.init.constant_(model.head.distances.bias, 2.0)  # or half of the boxes start empty
    return model


def _images(count=1):
    return list(torch.randint(0, 256, (count, 3, 96, 128), generator=torch.Generator().manual_seed(5)).byte())


def test_one_step_moves_all_that_learns():
    model = _model(deformable="last", modulated=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = model(_images(), [LEFT_AND_RIGHT])
    assert list(losses) == ["loss_cls", "loss_box", "loss_centerness", "loss_mask"]
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    still = {name for name, value in model.named_parameters() if torch.equal(value, start[name])}
    # Nothing in this image is large enough for the coarse levels, and AdamW decays their scales all the same.
    assert still == set()


def test_codes_start_near_unit_error():
    loss = _model().train()(_images(), [LEFT_AND_RIGHT])["loss_mask"]
    assert 0.1 < loss < 10


def test_polygons_and_the_same_shapes_as_bitmaps_train_alike():
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[1, 20:90, 50:120] = 1
    for y in range(32):
        masks[0, 8 + y, 8 + y // 2 : 40 - y // 2] = 1
    model = _model(noisy_logits=False).train()
    polygons = model(_images(), [LEFT_AND_RIGHT])
    bitmaps = model(_images(), [replace(LEFT_AND_RIGHT, masks=masks, polygons=None)])
    assert_close(polygons["loss_mask"], bitmaps["loss_mask"], rtol=0.05, atol=0)


def test_batches_without_instances_have_zero_losses_that_keep_the_graph():
    model = _model().train()
    losses = model(_images(2), [NOTHING, NOTHING])
    assert [losses[f"loss_{name}"].item() for name in ("box", "centerness", "mask")] == [0, 0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is None} == set()


def test_an_empty_image_may_stand_anywhere_in_the_batch():
    model = _model().train()
    for targets in ([NOTHING, LEFT_AND_RIGHT], [LEFT_AND_RIGHT, NOTHING]):
        assert all(value.isfinite() for value in model(_images(2), targets).values())


def test_half_precision_trains_and_finds():
    model = _model(deformable="last")
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(_images(), [LEFT_AND_RIGHT])
        found = model.eval().detect(_images())[0]
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert all(value.isfinite() for value in losses.values())
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert len(found.masks) > 0


def test_training_without_targets_says_so():
    with pytest.raises(UsageError, match="training needs targets"):
        _model().train()(_images())


@torch.no_grad()
def test_public_dicts():
    model = _model().eval()
    first, second = model(_images(2))
    assert first.keys() == {"boxes", "labels", "scores", "masks"}
    count = len(first["scores"])
    assert count >= 100
    assert first["masks"].shape == (count, 96, 128)
    assert first["masks"].dtype == torch.bool
    assert (first["boxes"] >= 0).all()
    assert (first["boxes"][:, 2:] <= torch.tensor([128, 96])).all()
    assert not torch.equal(first["scores"], second["scores"][:count])


@torch.no_grad()
def test_every_form_of_the_masks_says_the_same():
    model, images = _model().eval(), _images()
    dense = model(images)[0]["masks"]
    shapes = {"prob": (len(dense), 1, 96, 128), "lowres": (len(dense), 1, 28, 28)}
    for form, shape in shapes.items():
        model.mask_output = form
        assert model(images)[0]["masks"].shape == shape
    model.mask_output = "prob"
    soft = model(images)[0]["masks"][:, 0]
    wrong = (soft >= 0.5) != dense
    assert ((soft - 0.5).abs()[wrong] < 1e-5).all()
    model.mask_output = "rle"
    assert len(model(images)[0]["masks"]) == len(dense)
    found = model.detect(images)[0]
    assert torch.equal(found.masks.to_bool(), dense)
    assert model.detect(images, masks=False)[0].masks is None


@torch.no_grad()
def test_images_of_several_sizes():
    model = _model(input=replace(R50.input, test_size=(64, 96))).eval()
    sizes = [(40, 80), (70, 50), (64, 64)]
    found = model([torch.rand(3, *size) for size in sizes])
    assert [tuple(one["masks"].shape[1:]) for one in found] == sizes


SWITCHES = [
    {"deformable": "last"},
    {"deformable": "all", "modulated": True},
    {"large_kernel": 9},
    {"norm": "none"},
    {"scales": False},
    {"shared_depth": 1},
    {"encoding": "none"},
    {"loss_on_mask": True},
    {"mask_loss": "l1"},
    {"mask_loss": "smooth_l1"},
    {"mask_loss": "cosine"},
    {"whiten": False},
    {"noisy_logits": False},
    {"class_agnostic": False},
    {"code_length": 20},
    {"mask_size": 14},
    {"box_loss": "iou"},
    {"box_loss": "linear_iou"},
    {"center_radius": None},
    {"level_limits": (16, 32, 64, 128)},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_each_switch_trains_and_finds(switch):
    model = _model(**switch)
    total = sum(model.train()(_images(), [LEFT_AND_RIGHT]).values())
    total.backward()
    assert total.isfinite()
    with torch.no_grad():
        found = model.eval().detect(_images())[0]
    assert len(found.masks) == len(found) > 0


def test_the_detector_alone_has_no_mask_parameters_and_no_masks():
    model = _model(mask_branch=False)
    assert not [name for name, _ in model.named_parameters() if "mask" in name or "codes" in name]
    assert "loss_mask" not in model.train()(_images(), [LEFT_AND_RIGHT])
    with torch.no_grad():
        assert "masks" not in model.eval()(_images())[0]
        assert model.detect(_images())[0].masks is None


@pytest.mark.parametrize("name", ["no_encoding", "boxes_only"])
def test_an_encoding_for_a_model_without_one_is_refused(name):
    with pytest.raises(UsageError, match="for a model without an encoding"):
        get_model(name, encoding="codes.npz", backbone=TINY.backbone, width=64, tower_depth=1)


def test_a_deformable_layer_starts_with_drawn_offsets_and_a_wider_main_conv():
    model = _model(width=256, deformable="last")
    (layer,) = (part for part in model.head.cls_tower.modules() if isinstance(part, SelfOffsetConv2d))
    assert layer.bias is None
    assert abs(layer.conv_offset.weight.std().item() - 0.01) < 1e-3
    assert abs(layer.weight.abs().max().item() - (6 / 2304) ** 0.5) < 1e-3
    assert abs(layer.weight.std().item() - 0.02946) < 1e-3


def test_export_predicts_the_codes_of_a_large_kernel_once():
    model, calls = _model(large_kernel=3).eval(), []
    model.head.codes.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        raw = model.dense_outputs(torch.zeros(1, 3, 128, 128))
    assert raw.codes.shape == (*raw.centerness.shape, 60)
    assert len(calls) == 5  # levels


def test_a_large_kernel_reaches_that_far_along_both_axes():
    layer = LargeKernelConv(1, 1, 9)
    for conv in layer.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.ones_(conv.weight)
            nn.init.zeros_(conv.bias)
    point = torch.zeros(1, 1, 15, 15)
    point[0, 0, 7, 7] = 1
    with torch.no_grad():
        spread = layer(point)[0, 0]
    assert_close(spread[3:12, 3:12], torch.full((9, 9), 2.0))
    assert spread.sum() == 2 * 81
