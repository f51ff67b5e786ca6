from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.errors import UsageError
from sipmask.config import DEMO, R50, R50_RT_6X, VIDEO_SMALL
from sipmask.model import SipMask

VIDEO = replace(VIDEO_SMALL, num_classes=3, input=DEMO.input)
PLUS = replace(DEMO, rescore=True, backbone=replace(DEMO.backbone, deformable_stages=(2, 3, 4), deformable_interval=3))
TINY = replace(DEMO, inference=replace(DEMO.inference, score_threshold=0.0))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator) for _ in range(2)]


def _model(config=TINY, seed=0):
    torch.manual_seed(seed)
    return SipMask(config)


def _target(labels, size=(96, 128)):
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [50.0, 20.0, 110.0, 80.0]])[: len(labels)]
    masks = torch.zeros(len(labels), *size, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.long().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def test_training_gives_four_finite_losses_and_moves_every_parameter(images):
    model = _model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the offset conv starts at zero and learns from the second step on
        losses = model(images, [_target([0, 1]), _target([2])])
        assert set(losses) == {"loss_cls", "loss_box", "loss_centerness", "loss_mask"}
        assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    # Boxes of 64 px have their positives on P3 alone: the coarser levels' scales have nothing to learn from.
    assert set(unmoved) == {f"head.scales.{level}.scale" for level in (1, 2, 3, 4)}


def test_a_batch_without_instances_keeps_every_parameter_in_the_graph(images):
    model = _model().train()
    losses = model(images, [_target([]), _target([])])
    assert losses["loss_box"] == 0
    assert losses["loss_mask"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_one_pixel_box_trains(images):
    tiny = _target([0])
    tiny["boxes"] = torch.tensor([[8.0, 8.0, 9.0, 9.0]])
    losses = _model().train()(images, [tiny, _target([1])])
    assert all(torch.isfinite(loss) for loss in losses.values())


@torch.no_grad()
def test_evaluation_gives_torchvisions_dicts(images):
    model = _model().eval()
    found = model(images)
    assert len(found) == 2
    for image, one in zip(images, found, strict=True):
        assert set(one) == {"boxes", "labels", "scores", "masks"}
        assert one["boxes"].dtype == torch.float32
        assert one["boxes"].shape == (100, 4)
        assert (one["boxes"][:, 2:] > one["boxes"][:, :2]).all()
        assert one["masks"].dtype == torch.bool
        assert one["masks"].shape == (len(one["boxes"]), *image.shape[1:])
        assert (one["scores"].diff() <= 0).all()
        assert one["labels"].min() >= 0
        assert one["labels"].max() < 3


@torch.no_grad()
def test_forms_of_the_masks_agree(images):
    model = _model().eval()
    dense = model(images)[0]["masks"]
    model.mask_output = "prob"
    prob = model(images)[0]["masks"]
    assert prob.shape == (len(dense), 1, 96, 128)
    differing = (prob[:, 0] > model.config.inference.mask_threshold) != dense
    assert ((prob[:, 0] - model.config.inference.mask_threshold).abs()[differing] < 1e-5).all()
    model.mask_output = "lowres"
    assert model(images)[0]["masks"].shape == (len(dense), 1, 64, 64)  # stride 2 of 128 x 128
    model.mask_output = "rle"
    assert model(images)[0]["masks"][0]["size"] == [96, 128]
    model.mask_output = "none"
    assert "masks" not in model(images)[0]
    model.mask_output = "wrong"
    with pytest.raises(UsageError, match="mask_output 'wrong'"):
        model(images)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, PLUS, VIDEO], ids=["image", "plus", "video"])
def test_an_image_without_detections_has_masks_of_every_form(images, config):
    model = _model(replace(config, inference=replace(config.inference, score_threshold=1.0))).eval()
    shapes = {"bool": (0, 96, 128), "prob": (0, 1, 96, 128), "lowres": (0, 1, 64, 64)}
    for model.mask_output in ("bool", "prob", "lowres", "rle", "packed"):
        nothing = model(images[:1])[0]
        assert nothing["boxes"].shape == (0, 4)
        if model.mask_output in shapes:
            assert nothing["masks"].shape == shapes[model.mask_output]
        else:
            assert len(nothing["masks"]) == 0


@torch.no_grad()
@pytest.mark.parametrize("nms", ["greedy", "fast"])
def test_what_is_detected_under_autocast_is_float32(images, nms):
    inference = replace(TINY.inference, nms=nms)
    model = _model(replace(VIDEO, rescore=True, inference=inference)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.raw_outputs(torch.zeros(1, 3, 128, 128)).logits.dtype == torch.bfloat16
        found = model.detect(images[:1])[0]
    assert len(found) > 0
    for part in (found.boxes, found.scores, found.mask_scores, found.embeddings):
        assert part.dtype == torch.float32


@torch.no_grad()
def test_float_and_uint8_images_give_the_same(images):
    model = _model().eval()
    bytes_, floats = model.detect(images)[0], model.detect([image / 255 for image in images])[0]
    # Resizing rounds bytes: half a grey value of 255.
    assert_close(bytes_.scores, floats.scores, atol=5e-3, rtol=0)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix(images):
    model = _model().eval()
    alone, together = model.detect(images[:1])[0], model.detect(images)[0]
    assert_close(alone.scores, together.scores, atol=1e-5, rtol=0)


def test_a_batch_of_mixed_sizes_is_padded_to_the_largest():
    config = replace(TINY, input=replace(R50.input, test_size=(64, 128), train_sizes=((64, 128),)))
    model = _model(config).eval()
    with torch.no_grad():
        wide, tall = model([torch.rand(3, 50, 100), torch.rand(3, 90, 45)])
    assert wide["masks"].shape[1:] == (50, 100)
    assert tall["masks"].shape[1:] == (90, 45)
    assert wide["boxes"][:, 2].max() <= 100.01
    assert tall["boxes"][:, 3].max() <= 90.01


def test_labels_that_start_at_one_are_named(images):
    with pytest.raises(UsageError, match="1-based"):
        _model().train()(images, [_target([1, 3]), _target([])])


@pytest.mark.parametrize(
    "change",
    [
        {"grid": (1, 1)},
        {"grid": (1, 2)},
        {"grid": (2, 1)},
        {"grid": (3, 3)},
        {"grid": (4, 4)},
        {"align_features": False},
        {"basis_levels": ("P3",)},
        {"weighting": "none"},
        {"weighting": "cls"},
        {"weighting": "loc"},
        {"normalize_weighting": False},
        {"norm": "none"},
        {"profile": "fc"},
        {"center_radius": None},
        {"basis_upsample": 2},
        {"tower_depth": 4},
    ],
    ids=str,
)
def test_every_switch_trains_and_detects(images, change):
    model = _model(replace(TINY, **change))
    losses = model.train()(images[:1], [_target([0, 1])])
    assert torch.isfinite(sum(losses.values()))
    with torch.no_grad():
        assert len(model.eval().detect(images[:1])[0].masks) > 0


def _pair(labels, track_ids, known):
    target = _target(labels)
    reference = {
        "image": torch.zeros(3, 96, 128, dtype=torch.uint8),
        "boxes": target["boxes"][: len(known)],
        "track_ids": known,
    }
    return target | {"track_ids": track_ids, "reference": reference}


def test_a_video_model_learns_from_pairs_of_frames(images):
    model = _model(VIDEO).train()
    losses = model(images, [_pair([0, 1], [4, 5], [5, 4]), _pair([2], [9], [9])])
    assert set(losses) == {"loss_cls", "loss_box", "loss_centerness", "loss_mask", "loss_match"}
    losses["loss_match"].backward()
    assert model.head.tracking.mix.weight.grad.abs().sum() > 0
    assert model.backbone.layer1[0].conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "pairs",
    [
        [_pair([], [], []), _pair([], [], [])],
        [_pair([0], [1], []), _pair([1, 2], [1, 2], [7])],
    ],
    ids=["nothing in either frame", "other objects in the reference"],
)
def test_frames_without_a_common_object_train(images, pairs):
    model = _model(VIDEO).train()
    losses = model(images, pairs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_match_that_is_found_costs_less(images):
    """The embedding of an object equals its reference's where both frames are the same."""
    model = _model(VIDEO).train()
    target = _target([0, 1]) | {"track_ids": [1, 2]}
    both = {"image": images[0], "boxes": target["boxes"]}
    with torch.no_grad():
        model.head.tracking.mix.weight.mul_(8)
        right, wrong = (
            model(images[:1], [target | {"reference": both | {"track_ids": ids}}])["loss_match"]
            for ids in ([1, 2], [2, 1])
        )
    assert right < wrong


def test_stills_cannot_train_a_video_model(images):
    with pytest.raises(UsageError, match="pairs of frames"):
        _model(VIDEO).train()(images, [_pair([0], [1], [1]), _target([1])])


@torch.no_grad()
def test_a_video_model_gives_embeddings_and_follows_objects(images):
    model = _model(replace(VIDEO, inference=replace(VIDEO.inference, score_threshold=0.0))).eval()
    tracker = model.tracker()
    found = model.detect(images[:1])[0]
    assert found.embeddings.shape == (len(found), 64) == (10, 64)
    first, again = tracker.update(found), tracker.update(found)
    assert first.track_ids.tolist() == list(range(10))
    assert len(again.masks) == len(again) <= 10
    assert len(set(again.track_ids.tolist())) == len(again)
    assert {"embeddings", "masks"} <= model(images[:1])[0].keys()


def test_a_tracker_forgets_as_the_config_says_or_as_it_is_told():
    model = _model(replace(VIDEO, association=replace(VIDEO.association, max_age=30, max_tracks=7)))
    assert model.tracker().rules == model.config.association
    assert model.tracker(max_age=None).rules == replace(model.config.association, max_age=None)
    assert model.tracker(max_age=3, max_tracks=None).rules == replace(
        model.config.association, max_age=3, max_tracks=None
    )


def test_an_image_model_has_no_tracker():
    with pytest.raises(UsageError, match="no tracking branch"):
        _model().tracker()


def test_masks_are_scored_and_the_scoring_net_learns(images):
    model = _model(replace(PLUS, inference=TINY.inference))
    generous = _target([0, 1])
    with torch.no_grad():
        model.head.distances.bias.fill_(2.0)  # boxes, or no mask has an IoU to speak of
        model.head.scoring.out.bias.fill_(0.5)
    losses = model.train()(images, [generous, _target([])])
    assert losses["loss_iou"] > 0
    losses["loss_iou"].backward()
    assert all(parameter.grad is not None for parameter in model.head.scoring.parameters())
    assert model.head.scoring.out.bias.grad.abs().sum() > 0
    assert model.head.coefficients.weight.grad is None  # the masks themselves do not learn from their scores
    with torch.no_grad():
        found = model.eval().detect(images[:1])[0]
        assert found.mask_scores.shape == found.scores.shape
        assert not torch.equal(found.mask_scores, found.scores)
        assert model.detect(images[:1], masks=False)[0].mask_scores is None


def test_a_batch_without_instances_keeps_the_scoring_net_in_the_graph(images):
    model = _model(PLUS).train()
    sum(model(images, [_target([]), _target([])]).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_alignment_starts_as_a_plain_convolution():
    head = _model().head
    feature, distances = torch.rand(1, 64, 8, 8), torch.rand(1, 4, 8, 8)
    plain = torch.nn.functional.conv2d(feature, head.alignment.conv.weight, padding=1)
    with torch.no_grad():
        assert_close(head.alignment(feature, distances), head.alignment.norm(plain).relu())


def test_real_time_masks_fill_images_of_any_aspect():
    config = replace(
        R50_RT_6X,
        num_classes=3,
        width=32,
        basis_hidden=32,
        backbone=TINY.backbone,
        input=replace(R50_RT_6X.input, test_size=(96, 96)),
        inference=replace(R50_RT_6X.inference, score_threshold=0.0),
    )
    with torch.no_grad():
        found = _model(config).eval().detect([torch.rand(3, 61, 133)])[0]
    assert found.masks.size == (61, 133)
    assert found.boxes[:, 2].max() > 61
