"""The table is what its record says; assignment is counted per object, and true masks pull boxes to the truth."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RECORDS = sorted((HERE / "results" / "accuracy").glob("real-boxes-*.json"))


@pytest.fixture
def real_boxes(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))  # it imports representations.py beside it
    spec = importlib.util.spec_from_file_location("real_boxes", HERE / "real_boxes.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "real_boxes", module)
    spec.loader.exec_module(module)
    return module


def truth_of(boxes, size):
    """Filled boxes as objects of one image."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    from representations import Truth

    labels = torch.zeros(len(boxes), dtype=torch.int64)
    return Truth(1, size, torch.tensor(boxes).float(), labels, masks, (None,) * len(boxes))


def test_table_is_that_of_the_one_record(real_boxes):
    (path,) = RECORDS
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (HERE / "tables" / "real-boxes.md").read_text(encoding="utf-8") == real_boxes.table(record["config"], record)


def test_an_object_between_the_locations_is_counted_as_missed(real_boxes):
    # At scale 1 the first locations are (4, 4) and (12, 4): nothing lies inside the first box.
    truth = truth_of([[5, 5, 11, 11], [100, 100, 180, 180]], (800, 1000))
    row = real_boxes.assignment(real_boxes.RULES["SipMask, centre sampling"], [truth])
    assert row["objects"] == 2
    assert row["missed"]["small"] == 1.0
    assert row["missed"]["medium"] == 0.0
    assert row["missed"]["all"] == 0.5
    assert row["levels"]["P3"] == 1.0  # 40 pixels to each side
    assert real_boxes.assignment(real_boxes.RULES["RDSNet, anchors, forced match"], [truth])["missed"]["all"] == 0.0


def test_boxes_come_nearer_to_the_truth_beside_true_masks(real_boxes):
    train = [truth_of([[64 + 8 * i, 72, 320, 400]], (800, 1000)) for i in range(8)]
    found = real_boxes.refinement(iter(train), train)["rows"]
    before, after = found["moved"], found["MBRM, kernel as released"]
    assert after["iou"]["all"] > before["iou"]["all"] + 0.03
    assert after["median_error"] < before["median_error"] / 4
