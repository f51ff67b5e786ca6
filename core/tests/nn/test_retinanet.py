"""Anchors, matching and coding, in both geometries, against hand-made and released cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from onestage.boxes import clip, iou_matrix
from onestage.nn.fcos import top_per_level
from onestage.nn.losses import sigmoid_focal
from onestage.nn.nms import class_wise_nms
from onestage.nn.retinanet import IGNORED, NEGATIVE, anchors, cell_anchors, decode, encode, match
from onestage.nn.towers import conv_tower, flatten_levels

STRIDES = (8, 16, 32, 64, 128)


def test_square_anchor_is_centred_on_the_cell_and_not_rounded():
    cell = cell_anchors(8, ratios=(1.0,), scales=(1.0, 2 ** (1 / 3)))
    side = 32 * 2 ** (1 / 3)
    torch.testing.assert_close(cell[0], torch.tensor([-12.0, -12.0, 20.0, 20.0]))
    torch.testing.assert_close(cell[1], 4 + torch.tensor([-1.0, -1.0, 1.0, 1.0]) * side / 2)


def test_legacy_anchors_of_stride_8_are_the_published_integers():
    expected = """-19 -7 26 14  -25 -10 32 17  -32 -14 39 21  -12 -12 19 19  -16 -16 23 23  -21 -21 28 28
                  -7 -19 14 26  -10 -25 17 32  -14 -32 21 39"""
    numbers = torch.tensor([float(word) for word in expected.split()]).reshape(9, 4)
    assert torch.equal(cell_anchors(8, legacy=True), numbers)


def test_ratio_is_height_over_width_and_the_outer_index():
    cell = cell_anchors(8)
    width, height = (cell[:, 2:] - cell[:, :2]).unbind(1)
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]).repeat_interleave(3))
    torch.testing.assert_close((width * height).sqrt(), 32 * 2 ** (torch.arange(3).repeat(3) / 3))


def test_anchors_go_level_row_column_anchor():
    flat = anchors([(2, 2), (1, 1)], (8, 16), ratios=(1.0,), scales=(1.0, 2.0))
    assert flat.shape == (10, 4)
    center = (flat[:, :2] + flat[:, 2:]) / 2
    assert center[::2].tolist() == [[4, 4], [12, 4], [4, 12], [12, 12], [8, 8]]


def test_matching_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    shifted = torch.tensor([[0.0, 0.0, 10.0, height] for height in (10.0, 5.0, 4.5, 4.0, 3.9)])
    assert match(shifted, boxes).index.tolist() == [0, 0, IGNORED, IGNORED, NEGATIVE]


def test_forced_match_takes_all_ties_and_the_last_box_wins():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    candidates = torch.tensor([[0.0, 0.0, 10.0, 3.0], [0.0, 7.0, 10.0, 10.0], [0.0, 0.0, 10.0, 2.0]])
    assert match(candidates, boxes).index.tolist() == [NEGATIVE] * 3
    # Both first boxes tie at 0.3 with two anchors; the third overlaps nothing and claims nothing.
    assert match(candidates, boxes, force_match=True).index.tolist() == [1, 1, NEGATIVE]


def test_invalid_anchors_are_ignored_and_claim_nothing():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    candidates = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0]])
    matches = match(candidates, boxes, force_match=True, valid=torch.tensor([False, True]))
    assert matches.index.tolist() == [IGNORED, 0]


def test_no_boxes_make_everything_negative():
    matches = match(torch.rand(3, 4), torch.zeros(0, 4), force_match=True)
    assert matches.index.tolist() == [NEGATIVE] * 3
    assert matches.best.tolist() == [-1] * 3


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 2**20))
def test_chunks_do_not_change_the_match(num_boxes, legacy, force, seed):
    generator = torch.Generator().manual_seed(seed)
    # Whole pixels: ties happen.
    boxes, candidates = (_boxes(n, generator) for n in (num_boxes, 40))
    matches = match(candidates, boxes, legacy=legacy, force_match=force)
    iou = iou_matrix(candidates, boxes, legacy)
    best_iou, best = iou.max(dim=1)
    expected = torch.where(best_iou >= 0.5, best, torch.where(best_iou < 0.4, NEGATIVE, IGNORED))
    if force:
        for g in range(num_boxes):
            if iou[:, g].max() > 0:
                expected[iou[:, g] == iou[:, g].max()] = g
    assert matches.index.tolist() == expected.tolist()
    assert matches.best.tolist() == best.tolist()
    assert torch.equal(matches.iou, best_iou)


def test_coding_by_hand():
    anchor = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = torch.tensor([[5.0, 0.0, 25.0, 20.0]])  # centre + 10, width x 2
    torch.testing.assert_close(encode(anchor, box), torch.tensor([[1.0, 0.0, math.log(2), 0.0]]))


@pytest.mark.parametrize("legacy", [False, True])
def test_decoding_inverts_coding(legacy):
    generator = torch.Generator().manual_seed(0)
    a, b = _boxes(30, generator), _boxes(30, generator)
    torch.testing.assert_close(decode(a, encode(a, b, legacy), legacy), b, rtol=0, atol=1e-4)


def test_decoded_sides_are_bounded():
    anchor = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
    box = decode(anchor, torch.tensor([[0.0, 0.0, 100.0, -100.0]]))
    torch.testing.assert_close(box, torch.tensor([[-500.0, -0.128, 500.0, 0.128]]))


@pytest.mark.golden
def test_anchors_equal_the_released_code(golden):
    data = golden("rdsnet_heads")
    sizes = [tuple(x.shape[2:]) for x in data["cls"]]
    assert torch.equal(anchors(sizes, STRIDES, legacy=True), torch.cat(list(data["anchors"])))


@pytest.mark.golden
def test_targets_and_losses_equal_the_released_code(golden):
    data = golden("rdsnet_loss")
    sizes = [tuple(x.shape[2:]) for x in data["feats"]]
    flat = anchors(sizes, STRIDES, legacy=True)
    logits, deltas = _head(data, data["feats"])
    classes = deltas.new_zeros(())
    regression = deltas.new_zeros(())
    num_positive = 0
    for i, meta in enumerate(data["metas"]):
        valid = _valid_anchors(sizes, meta["pad_shape"].tolist())
        matches = match(flat, data["gt_boxes"][i], force_match=True, legacy=True, valid=valid)
        positive, used = matches.index >= 0, matches.index != IGNORED
        labels = torch.where(positive, data["gt_labels_1based"][i][matches.index], 0)
        assert torch.equal(labels, data["anchor_labels"][i])
        assert torch.equal(used.float(), data["anchor_label_weights"][i])
        wanted = encode(flat[positive], data["gt_boxes"][i][matches.index[positive]], legacy=True)
        torch.testing.assert_close(wanted, data["anchor_bbox_targets"][i][positive], rtol=0, atol=1e-5)
        classes += sigmoid_focal(logits[i, used], labels[used] - 1)
        regression += F.smooth_l1_loss(deltas[i, positive], wanted, beta=0.11, reduction="sum")
        num_positive += max(1, int(positive.sum()))
    assert num_positive == data["num_total_pos"]
    for ours, levels in ((classes, data["loss_cls_levels"]), (regression, data["loss_bbox_levels"])):
        torch.testing.assert_close(ours / num_positive, torch.as_tensor(levels).sum(), rtol=1e-5, atol=0)


@pytest.mark.golden
def test_detections_equal_the_released_code(golden):
    data = golden("rdsnet_infer")
    rules = data["test_cfg"]
    sizes = [tuple(x.shape[2:]) for x in data["feats"]]
    logits, deltas = _head(data, data["feats"])
    scores = logits[0].sigmoid()
    counts = [height * width * 9 for height, width in sizes]
    best = top_per_level(scores.amax(dim=1).split(counts), int(rules["nms_pre"]))
    boxes = decode(anchors(sizes, STRIDES, legacy=True)[best], deltas[0, best], legacy=True)
    boxes = clip(boxes, tuple(data["meta"]["img_shape"].tolist()), legacy=True) / data["meta"]["scale_factor"].float()
    kept = class_wise_nms(
        boxes,
        scores[best],
        iou_threshold=float(rules["nms_iou"]),
        score_threshold=float(rules["score_thr"]),
        max_detections=int(rules["max_per_img"]),
        legacy=True,
    )
    assert kept.labels.tolist() == data["classes"].tolist()
    torch.testing.assert_close(kept.scores, data["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes[kept.index], data["boxes"], rtol=0, atol=1e-5 * data["boxes"].abs().max().item())


@pytest.mark.golden
def test_matches_equal_the_hand_made_cases(golden):
    for case in golden("sprnet_positive_pixels")["cases"]:
        boxes = torch.tensor(case["gt_boxes"], dtype=torch.float32).reshape(-1, 4)
        expected = case["expected"]
        if "anchors" in case:
            candidates = torch.tensor(case["anchors"], dtype=torch.float32)
            pixel = torch.tensor(case["anchor_pixel"])
        else:
            candidates, pixel = _grid(case), None
            assert len(candidates) == expected["anchors_total"]
            pixel = torch.arange(len(candidates)) // 9
        matches = match(candidates, boxes)
        state = matches.index.clamp(max=0) + 1  # 1 positive, 0 negative, -1 ignored
        if "box_state" in expected:
            assert state.tolist() == expected["box_state"], case["name"]
            assert matches.best.tolist() == expected["argmax_gt"], case["name"]
            torch.testing.assert_close(matches.iou, torch.tensor(expected["max_iou"]), rtol=0, atol=1e-5)
        picked = _best_anchor_of_each_pixel(matches, pixel, case["mask_iou_threshold"])[: case["top_k"]]
        rows = sorted(expected["pixels"], key=lambda row: (-round(row["iou"], 6), row["anchor"]))
        assert [(int(pixel[a]), int(matches.best[a]), a) for a in picked] == [
            (row["pixel"], row["gt"], row["anchor"]) for row in rows
        ], case["name"]


def _head(data, features):
    """Class logits [B, A, K] and box deltas [B, A, 4] of the released head's weights."""
    state = {name.removeprefix("bbox_head."): tensor for name, tensor in data["state_dict"].items()}
    outputs = []
    for name, channels in (("cls", len(state["retina_cls.bias"]) // 9), ("reg", 4)):
        tower = conv_tower(64, 64, 4, norm="gn", bias=False)
        for i, (conv, norm, _) in enumerate(tower):
            conv.weight.data = state[f"{name}_convs.{i}.conv.weight"]
            norm.weight.data = state[f"{name}_convs.{i}.gn.weight"]
            norm.bias.data = state[f"{name}_convs.{i}.gn.bias"]
        weight, bias = state[f"retina_{name}.weight"], state[f"retina_{name}.bias"]
        with torch.no_grad():
            outputs.append(flatten_levels([F.conv2d(tower(x), weight, bias, padding=1) for x in features], channels))
    return outputs


def _valid_anchors(sizes, padded):
    """Cells within the image's own padded size, nine anchors each."""
    parts = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        cells = torch.zeros(height, width, dtype=torch.bool)
        cells[: -(-padded[0] // stride), : -(-padded[1] // stride)] = True
        parts.append(cells.flatten().repeat_interleave(9))
    return torch.cat(parts)


def _grid(case):
    grid = case["anchor_grid"]
    strides = [level["stride"] for level in grid["levels"]]
    sizes = [(math.ceil(grid["height"] / s), math.ceil(grid["width"] / s)) for s in strides]
    first = [cell_anchors(s, base_size=level["base"] / s) for s, level in zip(strides, grid["levels"], strict=True)]
    torch.testing.assert_close(torch.stack(first), torch.tensor(case["first_cell_anchors"]), rtol=0, atol=1e-3)
    return anchors(sizes, strides)


def _best_anchor_of_each_pixel(matches, pixel, threshold):
    best = {}
    for a in (matches.iou > threshold).nonzero().flatten().tolist():
        cell = int(pixel[a])
        if cell not in best or matches.iou[a] > matches.iou[best[cell]]:
            best[cell] = a
    return sorted(best.values(), key=lambda a: (-round(matches.iou[a].item(), 6), a))


def _boxes(count, generator):
    corner = torch.randint(0, 20, (count, 2), generator=generator)
    side = torch.randint(1, 20, (count, 2), generator=generator)
    return torch.cat((corner, corner + side), dim=1).float()
