"""The mask head of Mask R-CNN on given boxes is the one that Mask R-CNN itself uses."""

from pathlib import Path

import pytest
import torch

from onestage.structures import Detections


@pytest.fixture
def swapped(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import swapped_boxes

    return swapped_boxes


@pytest.mark.slow
def test_its_own_boxes_get_its_own_masks(swapped, tmp_path):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    fresh = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5, box_score_thresh=0.0)
    torch.save(fresh.state_dict(), tmp_path / "mask_rcnn.pth")
    model = swapped.mask_rcnn_of(str(tmp_path / "mask_rcnn.pth"))
    model.transform.min_size, model.transform.max_size = (96,), 128
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 6
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    categories = ((1, "a"), (2, "b"), (4, "d"))  # the third is not there
    with torch.no_grad():
        (whole,) = model([image.float() / 255])
    found = swapped.own_boxes(model, image, categories)
    known = torch.tensor([key in (1, 2, 4) for key in whole["labels"].tolist()])
    assert known.any()
    torch.testing.assert_close(found.boxes, whole["boxes"][known])
    assert [categories[label][0] for label in found.labels.tolist()] == whole["labels"][known].tolist()
    masks = swapped.with_masks(model, image, found, categories).masks.to_bool()
    expected = whole["masks"][known][:, 0]
    sure = (expected - 0.5).abs() > 1e-3  # boxes went to the input's frame and back
    assert torch.equal(masks[sure], (expected >= 0.5)[sure])


@pytest.mark.slow
def test_an_image_without_boxes_has_no_masks(swapped):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).eval()
    model.transform.min_size, model.transform.max_size = (64,), 64
    empty = Detections((40, 40), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    assert len(swapped.with_masks(model, image, empty, ((1, "a"), (2, "b"))).masks) == 0
