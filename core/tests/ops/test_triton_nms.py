"""The kernel of greedy NMS against the plain-torch twin: numbers and counts are equal, ties and rounding included."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onestage.ops.nms import top_nms_torch
from onestage.ops.triton import nms
from onestage.ops.triton.nms import top_nms_triton


def equal_twin(device, boxes, scores, labels=None, *, most=100, room=108, ties=False, legacy=False, threshold=0.5):
    rule = (threshold, most, room, ties, legacy)
    expected, count = top_nms_torch(boxes, scores, labels, *rule)
    there = [None if value is None else value.to(device) for value in (boxes, scores, labels)]
    number, ours = top_nms_triton(*there, *rule)
    assert number.tolist() == expected.tolist()
    assert int(ours) == int(count) if int(count) <= room else int(ours) > room
    return int(ours)


def some(count, columns, seed, side=24):
    """Boxes of whole numbers, which often meet the threshold exactly, and scores of which many are equal or none."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, side, (count, 2), generator=generator).float()
    boxes = torch.cat((corner, corner + torch.randint(0, side, (count, 2), generator=generator)), dim=1)
    scores = torch.randint(0, 33, (count, columns), generator=generator) / 32
    return boxes, torch.where(scores > 0.3, scores, -1.0)


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 90),
    columns=st.integers(1, 3),
    most=st.integers(0, 12),
    spare=st.integers(0, 5),
    ties=st.booleans(),
    legacy=st.booleans(),
    threshold=st.sampled_from([0.3, 0.5, 0.6, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_any_candidates_equal_the_twin(count, columns, most, spare, ties, legacy, threshold, seed, device):
    boxes, scores = some(count, columns, seed)
    how = {"most": most, "room": most + spare, "ties": ties, "legacy": legacy, "threshold": threshold}
    equal_twin(device, boxes, scores, **how)
    labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    equal_twin(device, boxes, scores[:, :1], labels, **how)


@pytest.mark.parametrize("count", [0, 1, 32, 33, 65])
def test_any_number_of_boxes_apart_is_kept(count, device):
    boxes = torch.arange(count)[:, None] * 4.0 + torch.tensor([[0.0, 0.0, 3.0, 3.0]])
    assert equal_twin(device, boxes, torch.rand(count, 1)) == count


def test_a_chain_of_removals_is_followed_to_its_end(device):
    # Each box overlaps its neighbours only: every other one stays, in a block and across blocks.
    boxes = torch.arange(80)[:, None] * torch.tensor([[2.0, 0.0, 2.0, 0.0]]) + torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    scores = torch.linspace(0.9, 0.1, 80)[:, None]
    assert equal_twin(device, boxes, scores) == 40


def test_coordinates_of_any_size_and_order(device):
    generator = torch.Generator().manual_seed(3)
    boxes = torch.randn(60, 4, generator=generator) * 50  # inside out, negative areas among them
    boxes[::7] = boxes[1::7][: len(boxes[::7])]
    boxes[::9, 2:] = boxes[::9, :2]  # no area: their IoU is 0 / 0
    equal_twin(device, boxes, torch.rand(60, 2, generator=generator))
    equal_twin(device, boxes, torch.rand(60, 2, generator=generator), legacy=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_half_types(dtype, device):
    boxes, scores = some(40, 2, 5)
    equal_twin(device, boxes, scores.to(dtype), most=6, room=8, ties=True)


def test_scores_that_are_nan_are_no_candidates(device):
    boxes, scores = some(40, 2, 7)
    scores[3, 1] = scores[20, 0] = torch.nan
    assert equal_twin(device, boxes, scores, most=6, room=8) == 6


def test_products_and_sums_round_one_by_one_as_on_the_cpu(monkeypatch):
    options = {}
    monkeypatch.setattr(nms, "_walk_kernel", {(1,): lambda *_, **how: options.update(how)})
    top_nms_triton(*some(4, 1, 0), None, 0.5, 3, 3, False, False)
    assert options["enable_fp_fusion"] is False
    monkeypatch.setattr(nms, "_walk_kernel", SimpleNamespace(arg_names=[]))
    assert not any(case.fp_fusion for case in nms.compile_cases())


def test_tensors_of_any_strides(device):
    boxes, scores = some(40, 2, 6)
    equal_twin(device, boxes.T.contiguous().T, scores.T.contiguous().T)
    labels = torch.randint(0, 3, (80,))[::2]
    equal_twin(device, boxes, scores[:, :1], labels)
