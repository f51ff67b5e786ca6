"""Parity with the authors' code: stored weights, inputs and outputs of RDSNet, and of YOLACT's linear combination.

The files are described where they are made; tolerances are theirs.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from onestage.boxes import from_legacy, to_legacy
from onestage.engine.official import convert_keys, rename
from onestage.nn import retinanet
from onestage.nn.fpn import FPN
from onestage.nn.towers import flatten_levels
from onestage.ops.assemble import crop_window
from onestage.ops.edges import Profiles, enclosing_boxes, refine_boxes, side_posteriors
from onestage.ops.mask_loss import masks_on_grid
from onestage.structures import Detections, ImageFrame, Target
from rdsnet import refine, small
from rdsnet.config import R50
from rdsnet.convert import RDSNET_KEYS, YOLACT_KEYS, config_of
from rdsnet.decode import Correlation, correlate, decode, inside, own_padded_size, select
from rdsnet.losses import compute_losses, instance_losses
from rdsnet.model import RDSNet
from rdsnet.refine import Observed, Samples
from rdsnet.small import RDSNetSmall
from rdsnet.small_losses import VARIANCES, match_anchors
from rdsnet.small_losses import compute_losses as small_losses
from rdsnet.targets import assign_targets, mask_instances

pytestmark = pytest.mark.golden
TOLERANCE = 1e-5


def test_pyramid(golden):
    case = golden("rdsnet_fpn")
    state = case["state_dict"]
    channels = [len(case[f"c{i}"][0]) for i in (3, 4, 5)]
    fpn = FPN(channels, len(state["neck.fpn_convs.0.conv.bias"]), extra="c5", relu_p7=False)
    _load(fpn, state, "fpn.")
    with torch.no_grad():
        for ours, theirs in zip(fpn([case["c3"], case["c4"], case["c5"]]), case["outs"], strict=True):
            close(ours, theirs)


def test_heads_and_anchors(golden):
    case = golden("rdsnet_heads")
    model = _model(case["state_dict"])
    with torch.no_grad():
        raw = model.head_outputs(case["feats"])
        close(raw.logits, flatten_levels(case["cls"], model.config.num_classes))
        close(raw.deltas, flatten_levels(case["reg"], 4))
        close(raw.pixel_vectors, case["pixel_reps"])
        # Object vectors are read where they are asked for, and are those of the dense conv.
        dense = flatten_levels(case["rep"], 2 * model.config.vector_length)
        index = torch.arange(0, dense.shape[1], 7).flip(0)
        for image in range(len(dense)):
            close(model.vectors_at(raw, image, index).flatten(1), dense[image, index])
    for stride, cell in zip(retinanet.STRIDES, case["base_anchors"], strict=True):
        assert torch.equal(retinanet.cell_anchors(stride, legacy=True), cell)
    assert torch.equal(raw.anchors, torch.cat(case["anchors"]))


def test_correlation_and_crop_at_inference(golden):
    case = golden("rdsnet_corr_crop")
    for i, meta in enumerate(case["metas"]):
        frame, boxes = _frame(meta), case["boxes_ori"][i]
        correlation = correlate(case["pixel_reps"][i], _vectors(case["obj_reps"][i]), frame, R50)
        close(correlation.logits(), case["logits"][i][..., 1] - case["logits"][i][..., 0])
        everything = torch.tensor([0, 0, *frame.image_size[::-1]]).expand(len(boxes), 4)
        close(correlation.soft(everything, frame.image_size), case["masks_uncropped"][i])
        for padding, key in ((0.1, "masks_cropped_r12"), (0.0, "masks_cropped_r10")):
            windows = crop_window(boxes, frame.image_size, "expand", padding=padding)
            stored = case[key][i]
            binary = stored.bool() if stored.dtype == torch.uint8 else stored > 0.4
            _few_pixels(correlation.masks(windows, frame.image_size, 0.4).to_bool(), binary)
        windows = crop_window(boxes, frame.image_size, "expand", padding=0.1)
        close(correlation.soft(windows, frame.image_size), case["masks_cropped_r12"][i])
        _, profiles = correlation.masks_with_profiles(windows, frame.image_size, 0.4)
        stored = Profiles.of(case["masks_cropped_r12"][i])
        close(profiles.columns, stored.columns)
        close(profiles.rows, stored.rows)
        stored = case["masks_input_res"][i]
        count = len(stored)
        padded = Correlation(correlation.vectors, correlation.contrasts[:count], 4)
        windows = crop_window(boxes[:count], frame.input_size, "expand", padding=0.1)
        height, width = frame.input_size
        whole = (padded.vectors.shape[1] * 4, padded.vectors.shape[2] * 4)
        close(padded.soft(windows, whole)[:, :height, :width], stored)


MASK_LOSSES = {
    "default": {},
    "no_ohem": {"ohem": None},
    "no_expand": {"train_crop": 0.0},
    "no_expand_no_ohem": {"train_crop": 0.0, "ohem": None},
    "ohem_ratio1p5": {"ohem": 1.5},
    "no_crop_no_ohem": {"train_crop": None, "ohem": None},
}


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_mask_loss_and_its_gradient(golden, name):
    case = golden("rdsnet_corr_crop")
    assert case["mask_loss"].keys() == MASK_LOSSES.keys()
    config = replace(R50, **MASK_LOSSES[name])
    losses, maps = [], []
    for i, logits in enumerate(case["logits"]):
        # Logits as a basis of one map for each instance: the gradient of the basis is that of the logits.
        maps.append((logits[..., 1] - logits[..., 0]).requires_grad_())
        masks = masks_on_grid(case["gt_masks_pad"][i], 4)
        assert torch.equal(masks, case["gt_masks_quarter"][i])
        own = torch.arange(len(masks))
        boxes = case["gt_boxes_pad"][i] / 4
        losses.append(instance_losses(maps[i], torch.eye(len(masks)), boxes, masks, own, config))
        size = (masks.shape[1], masks.shape[2])
        windows = crop_window(boxes, size, "expand", padding=0.25)
        assert torch.equal(inside(windows, size), case["crop_train_r15"][i].bool())
    every = torch.cat(losses)
    loss = every.sum() / (len(every) + 1)
    close(loss, case["mask_loss"][name])
    loss.backward()
    if name in case["mask_loss_grad_logits"]:
        # These gradients are far below 1, so the tolerance is taken of their largest value.
        for ours, theirs in zip(maps, case["mask_loss_grad_logits"][name], strict=True):
            assert_close(ours.grad, theirs[..., 1], atol=1e-4 * _largest(theirs), rtol=0)


def test_refined_boxes(golden):
    case = golden("rdsnet_mbrm")
    assert case["runs"]
    profiles, boxes = Profiles.of(case["masks"]), case["boxes"]
    samples = Samples(profiles, boxes, case["gt_boxes"])
    size = (case["masks"].shape[1], case["masks"].shape[2])
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    seen = Observed(Detections(size, from_legacy(boxes), case["scores"].flatten(), labels), boxes, profiles)
    for stored in case["runs"].values():
        weight, bias, gamma = stored["weight"].flatten(), stored["bias"], float(stored["gamma"])
        for axis, profile, names in ((0, profiles.columns, ("left", "right")), (1, profiles.rows, ("top", "bottom"))):
            sides = side_posteriors(profile, boxes[:, axis], boxes[:, axis + 2], weight, bias, gamma)
            for ours, key in zip(sides, names, strict=True):
                close(ours, stored[key])
        refined = seen.refined(refine_boxes(profiles, boxes, weight, bias, gamma))
        assert torch.equal(torch.cat((to_legacy(refined.boxes), refined.scores[:, None]), 1), stored["refined"])
        _check_coordinate_loss(samples, weight, bias, gamma, stored)


def _check_coordinate_loss(samples, weight, bias, gamma, stored):
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    likely = refine._of_truth(samples, weight, bias, gamma)
    reached = stored["nll_valid"].bool()
    assert torch.equal(likely > 0, reached)
    close(-likely[reached].log(), stored["nll"][reached])
    loss = refine.coordinate_loss([samples], weight, bias, gamma)
    close(loss, stored["ce_loss"])
    loss.backward()
    assert_close(weight.grad, stored["ce_grad_weight"].flatten(), atol=1e-4, rtol=1e-4)
    assert_close(bias.grad, stored["ce_grad_bias"], atol=1e-4, rtol=1e-4)


def test_boxes_around_masks(golden):
    case = golden("rdsnet_mbrm")
    empty = torch.full_like(case["boxes"], -1.0)
    assert torch.equal(enclosing_boxes(Profiles.of(case["masks"]), empty, 0.4).long(), case["direct_thr04"])


def test_inference(golden):
    case = golden("rdsnet_infer")
    rules = case["test_cfg"]
    model = _model(case["state_dict"])
    inference = replace(
        R50.inference,
        candidates_per_level=int(rules["nms_pre"]),
        score_threshold=float(rules["score_thr"]),
        iou_threshold=float(rules["nms_iou"]),
        max_detections=int(rules["max_per_img"]),
        crop_padding=float(rules["crop_padding"]),
        mask_threshold=float(rules["mask_thr"]),
        refine="mbrm",
    )
    config = replace(model.config, inference=inference)
    frame = _frame(case["meta"])
    with torch.no_grad():
        raw = model.head_outputs(case["feats"])
        kept, boxes = select(raw, 0, frame, config)
        vectors = model.vectors_at(raw, 0, kept.index)
        detect = partial(decode, raw, [frame], partial(model.vectors_at, raw), model.mbrm, config)
        (found,), (soft,) = detect("binary"), detect("soft")
    close(kept.scores, case["scores"])
    assert torch.equal(kept.labels, case["classes"])
    close(boxes, case["boxes"])
    close(vectors.flatten(1), case["obj_reps"])
    logits = case["mask_logits"]
    close(correlate(raw.pixel_vectors[0], vectors, frame, config).logits(), logits[..., 1] - logits[..., 0])
    close(soft.soft_masks, case["masks_soft"])
    _few_pixels(found.masks.to_bool(), case["masks_bin"].bool())
    exclusive = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(found.boxes, case["boxes_refined"] + exclusive)
    limit = torch.tensor([*frame.image_size[::-1], *frame.image_size[::-1]])
    close(found.unrefined_boxes, torch.minimum(case["boxes"] + exclusive, limit))


def test_targets_losses_and_gradients(golden):
    case = golden("rdsnet_loss")
    model = _model(case["state_dict"])
    config = replace(model.config, masks_per_image=1000)
    canvas = tuple(case["stack_shape"].tolist())
    frames = [replace(_frame(meta), padded_size=canvas) for meta in case["metas"]]
    targets = [
        Target(boxes, labels - 1, _on_canvas(masks, canvas), torch.zeros(len(boxes), dtype=torch.bool))
        for boxes, labels, masks in zip(case["gt_boxes"], case["gt_labels_1based"], case["gt_masks_pad"], strict=True)
    ]
    levels = [level.clone().requires_grad_() for level in case["feats"]]
    raw = model.head_outputs(levels)
    assigned = assign_targets(targets, frames, raw, config)

    labels, index = assigned.anchors.labels, assigned.anchors.index
    assert torch.equal((labels + 1).clamp(min=0), case["anchor_labels"])
    assert torch.equal((labels != retinanet.IGNORED).float(), case["anchor_label_weights"])
    assert torch.equal((labels >= 0).float(), case["anchor_bbox_weights"])
    # What losses are divided by: an image without positives counts as one (spec 7.1).
    positives = (labels >= 0).sum(1).clamp(min=1).sum()
    assert int(positives) == int(case["num_total_pos"])
    for i, boxes in enumerate(case["gt_boxes"]):
        positive = (index[i] >= 0).nonzero().flatten()
        deltas = retinanet.encode(raw.anchors[positive], boxes[index[i, positive]], legacy=True)
        close(deltas, case["anchor_bbox_targets"][i, positive])
        assert torch.equal(mask_instances(assigned, i, config), case["mask_pos_anchor_inds"][i])

    losses = compute_losses(raw, assigned, partial(model.vectors_at, raw), config)
    close(losses["loss_cls"], case["loss_cls_levels"].sum())
    close(losses["loss_box"], case["loss_bbox_levels"].sum())
    levels_of = [9 * height * width for height, width in raw.sizes]
    for i, own in enumerate(torch.arange(len(raw.anchors)).split(levels_of)):
        sums = retinanet.detection_losses(
            raw.logits[:, own],
            raw.deltas[:, own],
            raw.anchors[own],
            retinanet.Assignment(index[:, own], labels[:, own]),
            assigned.boxes,
            beta=config.box_beta,
            legacy=True,
        )
        for ours, key in zip(sums, ("loss_cls_levels", "loss_bbox_levels"), strict=True):
            close(ours / positives, case[key][i])
    close(losses["loss_mask"], case["loss_mask"])
    total = sum(losses.values())
    close(total, case["loss_total"])
    total.backward()
    for ours, theirs in zip(levels, case["grad_feats"], strict=True):
        assert_close(ours.grad, theirs, atol=1e-4 * max(1.0, _largest(theirs)), rtol=0)
    parameters = dict(model.named_parameters())
    for key, norm in case["grad_norms"].items():
        gradient = parameters[rename(key, RDSNET_KEYS)].grad
        assert_close(gradient.norm(), norm.to(gradient.dtype), atol=1e-4, rtol=1e-4)


def close(ours, theirs, tolerance=TOLERANCE):
    assert_close(ours.detach(), theirs, atol=tolerance * max(1.0, _largest(theirs)), rtol=0)


def _largest(values):
    return float(values.abs().max()) if values.numel() else 0.0


def _few_pixels(ours, theirs):
    # Of the foreground, not of the images: a small mask that is lost is seen.
    assert (ours != theirs).sum() <= 1e-3 * theirs.sum()


def _model(state):
    """RDSNet with the stored heads; its trunk and pyramid are never run."""
    model = RDSNet(config_of(state))
    for part in ("head", "object_vectors", "pixel_vectors", "mbrm"):
        if part != "mbrm" or "mbrm.weight" in state:
            own = {key: value for key, value in state.items() if rename(key, RDSNET_KEYS).startswith(f"{part}.")}
            assert own
            _load(model.get_submodule(part), own, f"{part}.")
    return model


def _load(module, state, prefix):
    wanted = {prefix + key: value for key, value in module.state_dict().items()}
    converted, _ = convert_keys(state, RDSNET_KEYS, wanted)
    module.load_state_dict({key.removeprefix(prefix): value for key, value in converted.items()})


def _vectors(stored):
    return stored.unflatten(1, (2, stored.shape[1] // 2))


def _frame(meta):
    image, resized, padded = (tuple(meta[key].tolist()) for key in ("ori_shape", "img_shape", "pad_shape"))
    factor = float(meta["scale_factor"])
    frame = ImageFrame(image, resized, padded, (factor, factor))
    assert own_padded_size(frame, R50) == padded
    return frame


def _on_canvas(masks, size):
    canvas = masks.new_zeros(len(masks), *size)
    canvas[:, : masks.shape[1], : masks.shape[2]] = masks
    return canvas


def test_linear_combination_network(golden):
    model, case, raw = _yolact(golden)
    with torch.no_grad():
        levels = model.fpn([case["c3"], case["c4"], case["c5"]])
    for ours, theirs in zip(levels, case["fpn"], strict=True):
        close(ours, theirs)
    close(raw.logits, case["conf"])
    close(raw.deltas, case["loc"])
    close(raw.pixel_vectors.permute(0, 2, 3, 1), case["proto"])
    close(raw.semantic, case["segm"])
    centre, sides = (raw.anchors[:, :2] + raw.anchors[:, 2:]) / 2, raw.anchors[:, 2:] - raw.anchors[:, :2]
    close(torch.cat((centre, sides), 1), case["priors"])
    everywhere = torch.arange(len(raw.anchors))
    for image, stored in enumerate(case["mask"]):
        close(model.vectors_at(raw, image, everywhere), stored)


def test_linear_combination_losses(golden):
    model, case, raw = _yolact(golden)
    size = case["masks_u8"][0].shape[-2:]
    targets = []
    for stored, masks in zip(case["targets"], case["masks_u8"], strict=True):
        boxes = stored[:, :4] * torch.tensor([size[1], size[0], size[1], size[0]])
        targets.append(Target(boxes, stored[:, 4].long(), masks, torch.zeros(len(masks), dtype=torch.bool)))
    for i, stored in enumerate(case["targets"]):
        index = match_anchors(raw.anchors, stored[:, :4], stored[:0, :4])
        classes = torch.cat((stored[:, 4].long() + 1, torch.zeros(1).long()))  # the last one: background
        labels = torch.where(index == retinanet.IGNORED, -1, classes[index.clamp(min=-1)])
        assert torch.equal(labels, case["conf_t"][i])
        positive = index >= 0
        assert torch.equal(index[positive], case["idx_t"][i][positive])
        deltas = retinanet.encode(raw.anchors[positive], stored[index[positive], :4])
        close(deltas / torch.tensor(VARIANCES), case["loc_t"][i][positive])
        assert int(positive.sum()) == int(case["num_pos"][i])
    losses = small_losses(raw, targets, partial(model.vectors_at, raw), model.config)
    for ours, theirs in (("box", "B"), ("cls", "C"), ("mask", "M"), ("semantic", "S")):
        close(losses[f"loss_{ours}"], case["losses"][theirs])
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    for key, norm in case["grad_norms"].items():
        gradient = parameters[rename(key, YOLACT_KEYS)].grad
        assert_close(gradient.norm(), norm.to(gradient.dtype), atol=1e-4, rtol=1e-4)


def test_linear_combination_detections(golden):
    model, case, raw = _yolact(golden)
    raw = type(raw)(*(part.detach() if isinstance(part, torch.Tensor) else part for part in raw))
    for i, stored in enumerate(case["detections"]):
        width, height = stored["size_wh"].tolist()
        kept, boxes = small.select(raw, i, model.config)
        close(kept.scores, stored["score"])
        assert torch.equal(kept.labels, stored["cls"])
        close(boxes, stored["box_rel"])
        close(model.vectors_at(raw, i, kept.index), stored["coeff"])
        assert torch.equal(small.whole_pixels(boxes, (height, width)).long(), stored["box_px"])
        size = tuple(case["masks_u8"][i].shape[-2:])
        frame = ImageFrame((height, width), size, size, (size[0] / height, size[1] / width))
        alone = raw._replace(
            logits=raw.logits[i : i + 1],
            deltas=raw.deltas[i : i + 1],
            pixel_vectors=raw.pixel_vectors[i : i + 1],
            features=[feature[i : i + 1].detach() for feature in raw.features],
        )
        with torch.no_grad():
            detect = partial(small.decode, alone, [frame], partial(model.vectors_at, alone), model.config)
            (found,), (soft,) = detect("binary"), detect("lowres")
        count = len(stored["masks"])
        close(soft.soft_masks[:count], stored["soft_proto_res"])
        _few_pixels(found.masks.to_bool()[:count], stored["masks"].bool())
        assert torch.equal(found.boxes.long(), stored["box_px"])


def _yolact(golden):
    """YOLACT with the stored tensors, and what it says about the stored features."""
    case = golden("rdsnet_yolact_lc")
    state = case["state_dict"]
    config = config_of(state)
    model = RDSNetSmall(config)
    model.fpn = FPN(
        [len(case[key][0]) for key in ("c3", "c4", "c5")],
        config.width,
        top_down="bilinear",
        relu_outputs=True,
        relu_p7=False,
    )
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    converted, _ = convert_keys(state, YOLACT_KEYS, wanted)
    model.load_state_dict(converted, strict=False)
    size = case["masks_u8"][0].shape[-2:]
    raw = model.train().head_outputs(model.fpn([case["c3"], case["c4"], case["c5"]]), tuple(size))
    return model, case, raw
