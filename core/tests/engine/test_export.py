"""What comparing an exported model with the original says, by hand; whole exports: tests/test_export.py."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onestage.config import InputConfig
from onestage.engine import export
from onestage.engine.checkpoint import WeightsInfo, save_weights
from onestage.engine.export import Tolerance, example_size, load_exported
from onestage.errors import MachineError, WeightsError
from onestage.masks import Masks
from onestage.structures import Detections

SIZE = (20, 10)
EXACT = Tolerance(0.0, 0.0, 0.0)


def detections(boxes, labels, scores=None):
    """With masks that fill the boxes' whole pixels."""
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    scores = torch.linspace(0.9, 0.5, len(boxes)) if scores is None else torch.tensor(scores)
    return Detections(SIZE, boxes, scores, torch.tensor(labels, dtype=torch.int64), Masks.from_bool(masks))


def difference(ours, theirs):
    count, unpaired, boxes, masks, scores = export._difference(ours, theirs)
    return export.Difference((1, 3, 32, 32), count, unpaired, boxes, masks, scores, {})


def test_equal_detections_differ_in_nothing_whatever_their_order():
    boxes = [[1.0, 1.0, 5.0, 6.0], [2.0, 3.0, 9.0, 9.0], [1.0, 1.0, 5.0, 6.0]]
    ours, theirs = detections(boxes, [0, 1, 1]), detections(boxes, [0, 1, 1])[torch.tensor([2, 0, 1])]
    found = difference(ours, theirs)
    assert (found.detections, found.unpaired) == (3, 0)
    assert found.holds(EXACT)


def test_the_largest_differences_by_hand():
    ours = detections([[1.0, 1.0, 5.0, 6.0], [2.0, 3.0, 9.0, 9.0]], [0, 1], [0.9, 0.6])
    theirs = detections([[1.0, 1.0, 5.25, 6.0], [2.0, 3.0, 9.0, 9.5]], [0, 1], [0.9, 0.5])
    found = difference(ours, theirs)
    assert found.unpaired == 0
    assert (found.boxes, found.scores) == pytest.approx((0.5, 0.1))
    assert found.masks == pytest.approx(7 / 200)  # 9.5 rounds to 10: one row more of seven pixels
    assert found.holds(Tolerance(0.6, 0.04, 0.2))
    for field in ("boxes", "masks", "scores"):
        assert not found.holds(Tolerance(**{"boxes": 0.6, "masks": 0.04, "scores": 0.2, field: 0.01}))


@pytest.mark.parametrize(
    ("boxes", "labels"),
    [
        ([[1.0, 1.0, 5.0, 6.0]], [1]),
        ([[3.0, 1.0, 5.0, 6.0]], [0]),
        ([], []),
        ([[1.0, 1.0, 5.0, 6.0]] * 2, [0, 0]),
    ],
    ids=["another class", "further away than a pixel", "missing", "one too many"],
)
def test_a_detection_without_a_partner_fails_any_tolerance(boxes, labels):
    found = difference(detections([[1.0, 1.0, 5.0, 6.0]], [0]), detections(boxes, labels))
    assert found.unpaired > 0
    assert not found.holds(Tolerance(100.0, 1.0, 1.0))


def test_boxes_that_are_no_numbers_pair_with_nothing():
    ours = detections([[1.0, 1.0, 5.0, 6.0]], [0])
    found = difference(ours, replace(ours, boxes=ours.boxes * float("nan")))
    assert found.unpaired == 2


def test_the_traced_size_is_the_recipes_unless_sizes_stay_open():
    fixed = InputConfig(resize="fixed", test_size=(550, 550), pad_multiple=1)
    assert example_size(fixed, dynamic=True) == example_size(fixed, dynamic=False) == (550, 550)
    assert example_size(InputConfig(), dynamic=False) == (800, 1344)
    assert example_size(InputConfig(), dynamic=True) == export.EXAMPLE


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MachineError, match="onnxscript is not installed") as caught:
        export.need_onnx("toy")
    assert caught.value.fix == "pip install './toy[export]' in the checkout"


def test_a_gpu_is_the_one_that_was_named(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    opened = []

    class Session:
        def __init__(self, path, options, providers):
            opened.extend(providers)

        def get_outputs(self):
            return []

        def get_inputs(self):
            return [None]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    export._open_onnx(Path("network.onnx"), torch.device("cuda:1"))
    assert opened == [("CUDAExecutionProvider", {"device_id": 1})]


def test_a_folder_of_another_package_is_named_as_that(tmp_path):
    save_weights(tmp_path / export.DECODE, {}, WeightsInfo(package="toy", config={}))
    with pytest.raises(WeightsError, match="is a model of toy, not of other") as caught:
        load_exported(tmp_path, method_of=lambda package: SimpleNamespace(name="other"))
    assert "python -m toy.predict" in caught.value.fix


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="is no exported model"):
        load_exported(tmp_path, method_of=lambda package: None)
    save_weights(tmp_path / export.DECODE, {}, WeightsInfo(package="toy", config={}))
    (tmp_path / export.CARD).write_text(json.dumps({}))
    with pytest.raises(WeightsError, match=r"has no network.pt2") as caught:
        load_exported(tmp_path, method_of=lambda package: SimpleNamespace(name=package), runtime="torch")
    assert "python -m toy.export" in caught.value.fix
