"""Parity with the authors' own code: stored inputs, weights and outputs of their heads, losses and inference.

The files are described where they are made; tolerances are theirs. Each test runs every case of its file that image
models cover: `gn4` (high accuracy), `ssd2` (real time), `ssdpp2` (mask re-scoring), the fcos_core profile, and videos.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F
from torch.testing import assert_close

from onestage.boxes import from_legacy
from onestage.engine.official import rename
from onestage.engine.ytvis_eval import AREA_RANGES, track_results
from onestage.masks import Masks
from onestage.nn import fcos
from onestage.ops.assemble import assemble_masks, assemble_soft, crop_window
from onestage.ops.mask_loss import window_mask_loss
from onestage.structures import Detections, ImageFrame, Reference, Target
from onestage.testing import dense_soft_masks
from sipmask.association import Memory, Tracker, associate
from sipmask.config import PUBLISHED_ASSOCIATION, R50, R50_FC, R50_RT_6X, R101_PLUS_10X, VIDEO, InferenceConfig
from sipmask.convert import convert_head, head_keys
from sipmask.decode import assemble, decode, low_resolution_masks, select, to_image
from sipmask.losses import alignment_weights, compute_losses, jittered, kept_positives, match_loss, same_object
from sipmask.model import SipMaskHead
from sipmask.targets import assign_targets
from sipmask.tracking import match_logits

pytestmark = pytest.mark.golden
VARIANTS = {"gn4": R50, "ssd2": R50_RT_6X, "ssdpp2": R101_PLUS_10X}


def test_pruned_maps_equal_the_crop_split_kernel(golden):
    case = golden("sipmask_smp")
    _check_pruned(case["basis"], case["cof"], case["boxes_mask_px"], (2, 2), case["pruned"])
    for grid in case["grids"].values():
        _check_pruned(case["basis"], grid["cof"], case["boxes_mask_px"], (grid["rows"], grid["cols"]), grid["pruned"])


def test_maps_of_the_sub_regions_before_they_are_pruned(golden):
    case = golden("sipmask_smp")
    if "maps" not in case:
        pytest.skip("maps are not in this sipmask_smp file")
    height, width = case["basis"].shape[1:]
    whole = torch.tensor([[0, 0, width, height]]).expand(len(case["cof"]), 4)
    for coefficients, expected in zip(case["cof"].chunk(len(case["maps"]), 1), case["maps"], strict=True):
        soft = assemble_soft(case["basis"], coefficients, whole)
        assert_close(soft.permute(1, 2, 0), expected, atol=1e-5, rtol=0)


def _check_pruned(basis, coefficients, boxes, grid, expected):
    soft = assemble_soft(basis, coefficients, crop_window(boxes, tuple(basis.shape[1:])), boxes=boxes, grid=grid)
    assert_close(soft.permute(1, 2, 0), expected, atol=1e-5, rtol=0)


def test_masks_equal_the_thresholded_up_sampling(golden):
    case = golden("sipmask_smp")
    infer, basis, boxes = case["infer"], case["basis"], case["boxes_mask_px"]
    assert_close(case["boxes_input_px"] / R50.basis_stride, boxes)
    size = tuple(math.floor(cells * (R50.basis_stride / infer["scale_factor"])) for cells in basis.shape[1:])
    assert infer["out_hw"].tolist() == list(size)
    for threshold, key in ((0.4, "bin_040"), (0.5, "bin_050")):
        masks = assemble_masks(
            basis,
            case["cof"],
            crop_window(boxes, tuple(basis.shape[1:])),
            boxes=boxes,
            grid=(2, 2),
            threshold=threshold,
            resized_size=size,
            output_size=size,
        )
        differing = (masks.to_bool() != infer[key].bool()) & ((infer["soft_up"] - threshold).abs() > 1e-5)
        assert not differing.any()


def test_mask_loss_and_its_gradients_are_those_of_the_kernel(golden):
    case = golden("sipmask_smp")
    basis, coefficients = case["basis"].requires_grad_(), case["cof"].requires_grad_()
    boxes, truth = case["boxes_mask_px"], case["gt_half"].permute(2, 0, 1)
    # The dense formula has the kernel's gradients for the stored upstream gradient ..
    soft = dense_soft_masks(basis, coefficients, boxes, grid=(2, 2))
    upstream = case["upstream_grad"].permute(2, 0, 1)
    kernel = torch.autograd.grad((soft * upstream).sum(), (basis, coefficients), retain_graph=True)
    assert_close(kernel[0], case["grad_basis"], atol=1e-4, rtol=1e-4)
    assert_close(kernel[1], case["grad_cof"], atol=1e-4, rtol=1e-4)
    # .. and the window loss equals cross-entropy of it against the cropped truth, gradients included.
    cropped = case["gt_cropped"].permute(2, 0, 1).float()
    dense = F.binary_cross_entropy(soft, cropped, reduction="none").sum((1, 2))
    window = window_mask_loss(basis, coefficients, boxes, truth, torch.arange(len(boxes)), grid=(2, 2))
    assert_close(window, dense, atol=1e-4, rtol=1e-4)
    weights = torch.linspace(0.5, 1.5, len(boxes))
    for ours, theirs in zip(
        torch.autograd.grad((window * weights).sum(), (basis, coefficients)),
        torch.autograd.grad((dense * weights).sum(), (basis, coefficients)),
        strict=True,
    ):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_outputs(golden, variant):
    case = golden(f"sipmask_head_{variant}")
    raw, offset = _run_head(case, VARIANTS[variant], train=True)
    _check_raw(raw, case, case["bbox_preds"])
    assert_close(offset, case["offset_lvl0"], atol=1e-4, rtol=0)


def test_head_outputs_of_the_fcos_core_profile(golden):
    case = golden("sipmask_bench")
    raw, _ = _run_head(case, R50_FC, train=True)
    _check_raw(raw, case, case["bbox_preds_px"])


def _check_raw(raw, case, distances):
    assert_close(raw.logits, _flat(case["cls_scores"]), atol=1e-4, rtol=0)
    assert_close(raw.distances, _flat(distances), atol=1e-4, rtol=1e-5)  # up to hundreds of pixels
    assert_close(raw.centerness, _flat(case["centernesses"]).squeeze(2), atol=1e-4, rtol=0)
    assert_close(raw.coefficients, _flat(case["cof_preds"]), atol=1e-4, rtol=1e-3)
    basis = F.interpolate(raw.basis, scale_factor=4, mode="bilinear", align_corners=False)
    assert_close(basis, case["feat_masks"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_coefficients_at_kept_locations_equal_the_dense_convolution(golden, variant):
    case = golden(f"sipmask_head_{variant}")
    head = _head(case, VARIANTS[variant]).eval()
    with torch.no_grad():
        raw = head(case["feats"])
        index = torch.arange(0, raw.logits.shape[1], 3).flip(0)
        for image in range(len(raw.logits)):
            kept = head.coefficients_at(raw, image, index)
            assert_close(kept, _flat(case["cof_preds"])[image, index], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_and_losses(golden, variant, monkeypatch):
    head_case, case = golden(f"sipmask_head_{variant}"), golden("sipmask_loss")
    if variant not in case:
        pytest.skip(f"{variant} is not in this sipmask_loss file")
    case = case[variant]
    config = _config(VARIANTS[variant], head_case)
    head = _head(head_case, VARIANTS[variant]).train()
    raw = head(head_case["feats"])
    raw.coefficients.retain_grad()
    up_sampled: list[torch.Tensor] = []

    def keep_basis(basis, *args, **kwargs):
        basis.retain_grad()
        up_sampled.append(basis)
        return window_mask_loss(basis, *args, **kwargs)

    targets = assign_targets(_targets(case), raw, config)
    assert (targets.assigned.labels >= 0).sum() == case["num_pos"]
    for i, labels in enumerate(case["target_labels"]):
        positive = labels > 0
        assert torch.equal(targets.assigned.labels[i], labels - 1)
        assert torch.equal(targets.assigned.index[i, positive], case["gt_index_of_pos"][i])
        assert_close(targets.assigned.ltrb[i, positive], case["target_ltrb"][i][positive], atol=1e-4, rtol=0)
    with monkeypatch.context() as patched:
        patched.setattr("sipmask.losses.window_mask_loss", keep_basis)
        losses = compute_losses(raw, targets, config, head)
    expected = case["losses"]
    terms = _LOSSES | ({"loss_iou": "loss_iou"} if config.rescore else {})
    assert losses.keys() == terms.keys()
    for ours, theirs in terms.items():
        assert_close(losses[ours], expected[theirs], rtol=1e-4, atol=0, msg=lambda m, o=ours: f"{o}: {m}")
    total = sum(losses.values())
    assert_close(total, case["total"], rtol=1e-4, atol=0)
    total.backward()
    by_level = raw.coefficients.grad.split([height * width for height, width in raw.sizes], 1)
    norms = torch.stack([gradient.norm() for gradient in by_level])
    assert_close(norms, case["grad_cof_preds_norm"], rtol=1e-3, atol=0)
    assert_close(
        torch.stack([basis.grad for basis in up_sampled]).norm(), case["grad_feat_masks_norm"], rtol=1e-3, atol=0
    )
    parameters = dict(head.named_parameters())
    for key, gradient in case["grads"].items():
        name, _, is_norm = key.partition("|")
        ours = parameters[_our_name(name, config)].grad
        assert_close(
            ours.norm() if is_norm else ours.reshape(gradient.shape),
            gradient,
            rtol=1e-3,
            atol=1e-3 * float(gradient.abs().max()),
        )
    for weighting, key in (("cls", "only_cls"), ("loc", "only_loc"), ("none", "none")):
        variant_loss = compute_losses(raw, targets, replace(config, weighting=weighting), head)["loss_mask"]
        assert_close(variant_loss, case["loss_mask_variants"][key], rtol=1e-4, atol=0)


_LOSSES = {
    "loss_cls": "loss_cls",
    "loss_box": "loss_bbox",
    "loss_centerness": "loss_centerness",
    "loss_mask": "loss_mask",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mask_weights(golden, variant):
    head_case, case = golden(f"sipmask_head_{variant}"), golden("sipmask_loss")
    if variant not in case:
        pytest.skip(f"{variant} is not in this sipmask_loss file")
    case = case[variant]
    config = _config(VARIANTS[variant], head_case)
    raw = _stored_raw(head_case, config, head_case["bbox_preds"])
    targets = assign_targets(_targets(case), raw, config)
    for i, step in enumerate(case["intermediates"]):
        kept, stays = kept_positives(raw, targets, i, config), step["kept"]
        assert torch.equal(kept.index, step["pos_index"][stays])
        assert_close(kept.boxes, step["boxes_half"][stays], atol=1e-4, rtol=1e-5)
        gt = targets.boxes[i][kept.instance] / config.basis_stride
        parts = raw.logits[i, kept.index], kept.labels, kept.boxes, gt
        alpha, score = alignment_weights(*parts, replace(config, normalize_weighting=False))
        assert_close(score, step["cls_score"][stays], atol=1e-4, rtol=0)
        assert_close(alpha, (step["cls_score"] * step["iou"])[stays], atol=1e-4, rtol=1e-4)
        assert_close(alignment_weights(*parts, config)[0], step["weight"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case_name", ["loss", "loss_crafted", "loss_small_mask"])
def test_losses_of_the_fcos_core_profile(golden, case_name):
    file = golden("sipmask_bench")
    config = _config(R50_FC, file)
    head = _head(file, R50_FC).train()
    raw = head(file["feats"])
    truth = dict(file["loss"])
    case = file[case_name]
    if case_name != "loss":
        crafted = file["loss_crafted"]
        strides = fcos.per_location(raw.sizes, fcos.STRIDES)[None, :, None]
        raw = raw._replace(
            distances=_flat(crafted["bbox_preds_stride_units"]) * strides,
            coefficients=raw.coefficients * crafted["cof_scale"],
            basis=raw.basis * crafted["feat_mask_scale"],
        )
    if case_name == "loss_small_mask":
        assert (case["gt_masks"], case["bbox_preds"]) == ("all ones", "as loss_crafted")
        _, constant = case["cof_preds"].split()  # "constant 0.5"
        raw = raw._replace(
            basis=raw.basis / file["loss_crafted"]["feat_mask_scale"],
            coefficients=torch.full_like(raw.coefficients, float(constant)),
        )
        truth["gt_masks"] = [torch.ones_like(masks) for masks in truth["gt_masks"]]
    losses = compute_losses(raw, assign_targets(_targets(truth), raw, config), config)
    for ours, theirs in (_LOSSES | {"loss_box": "loss_reg"}).items():
        assert_close(losses[ours], case["losses"][theirs], rtol=1e-4, atol=0, msg=lambda m, o=ours: f"{o}: {m}")
    if "grads" in case:
        sum(losses.values()).backward()
        parameters = dict(head.named_parameters())
        for name, gradient in case["grads"].items():
            ours = parameters[_our_name(name, config)].grad
            assert_close(ours, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference(golden, variant):
    head_case, runs = golden(f"sipmask_head_{variant}"), golden("sipmask_infer").get(variant)
    if runs is None:
        pytest.skip(f"{variant} is not in this sipmask_infer file")
    raw = _stored_raw(head_case, VARIANTS[variant], head_case["bbox_preds"])
    for run in runs:
        cfg = run["cfg"]
        rules = InferenceConfig(
            nms=cfg["nms"],
            candidates_per_level=cfg["nms_pre"],
            score_threshold=cfg["score_thr"],
            iou_threshold=cfg["iou_thr"],
            max_detections=cfg["max_per_img"],
            mask_rounding="floor",
        )
        config = replace(_config(VARIANTS[variant], head_case), inference=rules)
        frame = _frame(run)
        for i, expected in enumerate(run["results"]):
            found = select(raw, i, frame, config)
            boxes = _in_the_image(found.boxes, frame)
            parts = raw.basis[i], raw.coefficients[i, found.index], found.boxes
            masks = assemble(*parts, frame, config).to_bool()
            ours = _check_detections(boxes, found.scores, found.labels, masks, expected)
            if config.rescore:
                with torch.no_grad():
                    iou = _head(head_case, config).scoring(low_resolution_masks(*parts, config), found.labels)
                assert_close((iou * found.scores)[ours], expected["mask_scores"], atol=1e-4, rtol=0)


def test_inference_of_the_fcos_core_profile(golden):
    file = golden("sipmask_bench")
    cfg = file["infer"]["cfg"]
    rules = InferenceConfig(
        candidates_per_level=cfg["pre_nms_top_n"],
        score_threshold=cfg["score_thr"],
        iou_threshold=cfg["nms_thr"],
        max_detections=cfg["max_dets"],
        mask_rounding="floor",
    )
    config = replace(_config(R50_FC, file), inference=rules)
    raw = _stored_raw(file, R50_FC, file["bbox_preds_px"])
    for i, expected in enumerate(file["infer"]["results"]):
        (height, width), (wide, high) = file["infer"]["image_hw"][i], file["infer"]["orig_wh"][i]
        scale = min(height / high, width / wide)
        frame = ImageFrame((high, wide), (height, width), (height, width), (scale, scale))
        found = select(raw, i, frame, config)
        masks = assemble(raw.basis[i], raw.coefficients[i, found.index], found.boxes, frame, config).to_bool()
        expected = dict(expected, labels=expected["labels"] - 1)
        _check_detections(found.boxes, found.scores, found.labels, masks, expected)


def test_video_head_outputs(golden):
    case = golden("sipmask_vis_head")["head"]
    head, raw = _video_head(case)
    _check_raw(raw, case, case["bbox_preds"])
    for joined, expected in ((raw.tracking, "track_feats"), (raw.reference_tracking, "track_feats_ref")):
        assert_close(head.tracking.mix(joined), case[expected], atol=1e-4, rtol=1e-3)


def test_embeddings_are_the_tracking_map_at_box_centres(golden):
    case = golden("sipmask_vis_head")["head"]
    head, raw = _video_head(case)
    height, width = case["track_feats"].shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    within = torch.rand(height * width, 2, generator=torch.Generator().manual_seed(0))
    centres = torch.stack((columns, rows), 2).flatten(0, 1) * 8.0 + within * 7.9
    boxes = torch.cat((centres - 20, centres + 20), 1)
    for i, expected in enumerate(case["track_feats"]):
        assert_close(head.tracking.embed(raw.tracking[i], boxes), expected.flatten(1).T, atol=1e-4, rtol=1e-3)
    outside = 8.0 * max(height, width) + 50
    far = torch.tensor([[-500.0, -500.0, -300.0, -300.0], [outside, outside, outside + 90, outside + 90]])
    corners = case["track_feats"][0][:, [0, -1], [0, -1]].T
    assert_close(head.tracking.embed(raw.tracking[0], far), corners, atol=1e-4, rtol=1e-3)


def test_video_losses(golden):
    file = golden("sipmask_vis_head")
    case, config = file["loss"], _config(VIDEO, file["head"])
    head, raw = _video_head(file["head"], train=True)
    ids = [torch.arange(100, 100 + len(boxes)) for boxes in case["ref_boxes"]]
    targets = [
        replace(
            target,
            # gt_pids counts from 1 among the reference boxes; 0 is an object that is not there.
            track_ids=torch.cat((other.new_tensor([-1]), other))[pids],
            reference=Reference(torch.zeros(3, 1, 1), boxes, other),
        )
        for target, pids, other, boxes in zip(_targets(case), case["gt_pids"], ids, case["ref_boxes"], strict=True)
    ]
    assigned = assign_targets(targets, raw, config)
    for i, labels in enumerate(case["target_labels"]):
        assert torch.equal(assigned.assigned.labels[i], labels - 1)
        assert torch.equal(assigned.assigned.index[i, labels > 0], case["gt_index_of_pos"][i])
    boxes = [jittered(other, draw) for other, draw in zip(case["ref_boxes"], case["jitter"], strict=True)]
    for i, expected in enumerate(case["jittered_ref_boxes"]):
        assert_close(boxes[i], expected, atol=1e-4, rtol=0)
        embeddings = head.tracking.embed(raw.reference_tracking[i], boxes[i])
        assert_close(embeddings, case["ref_embeddings"][i], atol=1e-4, rtol=1e-3)
    losses = compute_losses(raw, assigned, config, head)
    kept = [kept_positives(raw, assigned, i, config) for i in range(len(targets))]
    losses["loss_match"] = match_loss(raw, assigned, kept, head.tracking, config, case["jitter"])
    matched = []
    for i, target in enumerate(targets):
        embeddings = head.tracking.embed(raw.tracking[i], kept[i].boxes * config.basis_stride)
        choice = match_logits(embeddings, case["ref_embeddings"][i]).argmax(1)
        matched.append(choice == same_object(target.track_ids, target.reference)[kept[i].instance])
    assert_close(100 * torch.cat(matched).float().mean(), case["losses"]["match_acc"], rtol=1e-4, atol=0)
    for ours, theirs in (_LOSSES | {"loss_match": "loss_match"}).items():
        assert_close(losses[ours], case["losses"][theirs], rtol=1e-4, atol=0, msg=lambda m, o=ours: f"{o}: {m}")
    sum(losses.values()).backward()
    parameters = dict(head.named_parameters())
    for name, gradient in case["grads"].items():
        ours = parameters[_our_name(name, config)].grad
        assert_close(ours, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_video_frames(golden):
    file = golden("sipmask_vis_head")
    case, cfg = file["frames"], file["frames"]["cfg"]
    rules = InferenceConfig(
        nms="fast",
        candidates_per_level=cfg["nms_pre"],
        score_threshold=cfg["score_thr"],
        iou_threshold=cfg["iou_thr"],
        max_detections=cfg["max_per_img"],
        mask_threshold=cfg["mask_thr"],
        mask_rounding="floor",
    )
    config = replace(_config(VIDEO, file["head"]), inference=rules)
    head = _head(file["head"], config).eval()
    frame = _frame(case)
    tracker, memory = Tracker(PUBLISHED_ASSOCIATION), None
    for expected in case["frames"]:
        with torch.no_grad():
            raw = head(expected["feats"])
            found = decode(raw, [frame], head, config)[0]
        legacy = select(raw, 0, frame, config)
        assert_close(_in_the_image(legacy.boxes, frame), expected["boxes"], atol=1e-2, rtol=0)
        assert_close(found.boxes, to_image(legacy, frame).boxes)
        assert_close(found.scores, expected["scores"], atol=1e-4, rtol=0)
        assert torch.equal(found.labels, expected["labels"])
        result = associate(Memory.empty(found) if memory is None else memory, found, PUBLISHED_ASSOCIATION)
        memory = result.memory
        assert torch.equal(result.track_ids, expected["ids"])
        if expected["comp_scores"].numel():
            assert_close(result.scores, expected["comp_scores"], atol=1e-3, rtol=0)
        followed = tracker.update(found)
        assert sorted(followed.track_ids.tolist()) == sorted(expected["masks"])
        for number, mask in zip(followed.track_ids.tolist(), followed.masks.to_bool(), strict=True):
            wanted = expected["masks"][number].bool()
            assert (mask & wanted).sum() >= 0.99 * (mask | wanted).sum()


def test_association(golden):
    """A first frame without detections leaves the released code's memory as it was; our tracker always forgets.

    The file's memory also holds the scores of detections, which nothing reads; ours does not.
    """
    for name, sequence in golden("sipmask_vis_track").items():
        memory = None
        for number, frame in enumerate(sequence["frames"]):
            found = _of_the_sequence(frame, tuple(sequence["hw"]))
            if memory is None or (frame["is_first"] and len(found)):
                memory = Memory.empty(found)
            result = associate(memory, found, PUBLISHED_ASSOCIATION)
            memory, where = result.memory, f"{name}, frame {number}"
            assert torch.equal(result.track_ids, frame["ids"]), where
            if frame["comp_scores"].numel():
                assert_close(result.scores, frame["comp_scores"], atol=1e-3, rtol=0, msg=lambda m, w=where: f"{w}: {m}")
            assert memory.track_ids.tolist() == list(range(len(frame["memory_labels"]))), where
            assert_close(memory.boxes, from_legacy(frame["memory_boxes"][:, :4]))
            assert torch.equal(memory.labels, frame["memory_labels"]), where
            assert_close(memory.embeddings.sum(1), frame["memory_feat_sum"], atol=1e-3, rtol=1e-4)


def test_results_of_the_sequences(golden):
    """Scores, categories and frames of every track; masks are compared by their boxes, as theirs are ellipses.

    On the CPU the released code overwrites the scores of a video's first frame with detections by later ones, as its
    memory is the same tensor. Scores of tracks that begin there are not compared. Neither are videos that begin with
    an empty frame after others: their objects get lost in the memory of those (`test_association`).
    """
    for name, sequence in golden("sipmask_vis_track").items():
        tracker, size = Tracker(PUBLISHED_ASSOCIATION), tuple(sequence["hw"])
        videos: list[list[Detections]] = []
        for frame in sequence["frames"]:
            if frame["is_first"]:
                tracker.reset()
                videos.append([])
            videos[-1].append(tracker.update(_of_the_sequence(frame, size)))
        begin = [next((number for number, found in enumerate(video) if len(found)), None) for video in videos]
        lost = [i + 1 for i, number in enumerate(begin) if number != 0 and set(begin[:i]) - {None}]
        tracks = [entry for i, found in enumerate(videos) for entry in track_results(i + 1, found, range(1, 100))]
        ours, theirs = ([one for one in every if one["video_id"] not in lost] for every in (tracks, sequence["json"]))
        for one, expected in zip(ours, theirs, strict=True):
            assert (one["video_id"], one["category_id"]) == (expected["video_id"], expected["category_id"]), name
            if expected["segmentations"][begin[one["video_id"] - 1]] is None:
                assert one["score"] == pytest.approx(expected["score"], abs=1e-6)
            for mask, wanted in zip(one["segmentations"], expected["segmentations"], strict=True):
                assert (mask is None) == (wanted is None), name
                if mask is not None and _is_inside(coco_mask.toBbox(mask), size):
                    assert np.abs(coco_mask.toBbox(mask) - coco_mask.toBbox(wanted)).max() <= 3


def test_size_ranges_of_the_evaluation_of_tracks(golden):
    assert golden("sipmask_ytvis_eval")["area_ranges"] == AREA_RANGES


def _is_inside(box, size):
    """Whether a box x, y, w, h touches no side of the canvas: an ellipse that is cut off has another box."""
    left, top, width, height = box
    return min(left, top) > 0 and left + width < size[1] and top + height < size[0]


def _of_the_sequence(frame, size):
    """What was found in a frame, with full boxes as masks."""
    boxes = from_legacy(frame["boxes"])
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().long().clamp(min=0).tolist(), strict=True):
        mask[top:bottom, left:right] = True
    parts = frame["scores"], frame["labels"], Masks.from_bool(masks)
    return Detections(size, boxes, *parts, embeddings=frame["embeddings"])


def _frame(run):
    """How an image became input; `scale_factor` is one number, or w, h, w, h."""
    factor = run["scale_factor"]
    horizontal, vertical = factor[:2] if isinstance(factor, list) else (factor, factor)
    return ImageFrame(tuple(run["ori_shape"]), tuple(run["img_shape"]), tuple(run["img_shape"]), (vertical, horizontal))


def _in_the_image(boxes, frame):
    """Legacy boxes from input to image pixels."""
    vertical, horizontal = frame.scale
    return boxes / boxes.new_tensor([horizontal, vertical] * 2)


def _video_head(case, train=False):
    """The head and its raw outputs for the stored pyramids of both frames."""
    head = _head(case, VIDEO).train(True)
    with torch.set_grad_enabled(train):
        raw = head(case["feats"])
        return head, raw._replace(reference_tracking=head.tracking(case["ref_feats"]))


def _check_detections(boxes, scores, labels, masks, expected):
    """Same set of detections: each expected one has its own match in box, score, label and mask. Gives their places."""
    assert len(boxes) == len(expected["boxes"])
    apart = (expected["boxes"][:, None] - boxes).abs().amax(2) / 1e-2
    apart = torch.maximum(apart, (expected["scores"][:, None] - scores).abs() / 1e-4)
    apart.masked_fill_(expected["labels"][:, None] != labels, torch.inf)
    ours = apart.argsort(1)[:, :1].flatten()  # the nearest of each, also where there is none
    assert len(ours.unique()) == len(boxes)
    assert torch.equal(labels[ours], expected["labels"])
    assert_close(scores[ours], expected["scores"], atol=1e-4, rtol=0)
    assert_close(boxes[ours], expected["boxes"], atol=1e-2, rtol=0)
    masks, wanted = masks[ours], expected["masks"].bool()
    inter, union = (masks & wanted).sum((1, 2)), (masks | wanted).sum((1, 2))
    assert (inter >= 0.99 * union).all()
    return ours


def _flat(maps):
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


def _config(variant, case):
    """The variant in the sizes of the file; the fcos_core file says nothing of depth, strides and norm."""
    assert tuple(case.get("strides", fcos.STRIDES)) == fcos.STRIDES
    depth, norm = case.get("stacked_convs", variant.tower_depth), case.get("norm")
    state = case["state_dict"]
    classes = state["cls_logits.weight" if "cls_logits.weight" in state else "fcos_cls.weight"]
    return replace(
        variant,
        num_classes=classes.shape[0],
        width=classes.shape[1],
        tower_depth=depth,
        track_depth=depth - 1 if variant.is_video else 0,
        norm=variant.norm if norm is None else {"GN32": "gn", "none": "none"}[norm],
    )


def _head(case, variant):
    config = _config(variant, case)
    head = SipMaskHead(config)
    head.load_state_dict(convert_head(case["state_dict"], config)[0])
    return head


def _run_head(case, variant, train):
    head = _head(case, variant).train(train)
    offsets = []
    head.alignment.offset.register_forward_hook(lambda module, args, out: offsets.append(out))
    with torch.no_grad():
        raw = head(case["feats"])
    return raw, offsets[0][:1]


def _stored_raw(case, variant, distances):
    """The stored outputs; basis masks, stored up-sampled, are run afresh."""
    raw, _ = _run_head(case, variant, train=False)
    return raw._replace(
        logits=_flat(case["cls_scores"]),
        distances=_flat(distances),
        centerness=_flat(case["centernesses"]).squeeze(2),
        coefficients=_flat(case["cof_preds"]),
    )


def _targets(case):
    return [
        Target(boxes, labels - 1, masks, torch.zeros(len(boxes), dtype=torch.bool))
        for boxes, labels, masks in zip(case["gt_boxes"], case["gt_labels"], case["gt_masks"], strict=True)
    ]


def _our_name(name, config):
    return rename(name, head_keys(config))
