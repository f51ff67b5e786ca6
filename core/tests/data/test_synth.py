"""Generated shapes: deterministic, sound, and with the cases they promise."""

import json

import numpy as np
import pytest
import torch

from onestage.data.coco import CocoDataset, locate
from onestage.data.drawing import NAMES
from onestage.data.synth import DIFFICULTIES, ShapesDataset, make_shapes
from onestage.errors import UsageError
from onestage.masks import Masks


def parts_and_holes(masks: torch.Tensor) -> list[tuple[int, int]]:
    """How many outlines every mask has, and how many of them what it leaves free has beyond the surroundings."""
    parts = Masks.from_bool(masks).to_polygons()
    free = Masks.from_bool(torch.nn.functional.pad(masks == 0, (1, 1, 1, 1), value=True)).to_polygons()
    return [(len(part), len(rest) - 1) for part, rest in zip(parts, free, strict=True)]


def test_the_default_set_is_the_demos():
    dataset = ShapesDataset(40, split="val")
    assert dataset.categories == ((1, "ring"), (2, "star"), (3, "heart"))
    for image, target in (dataset[i] for i in range(40)):
        assert image.shape == (3, 128, 128)
        assert 1 <= len(target) <= 4
        sides = target.boxes[:, 2:] - target.boxes[:, :2]
        assert sides.max(1).values.max() <= 61
        assert sides.max(1).values.min() >= 12  # of 16 px, others may cover a fifth


@pytest.mark.parametrize("difficulty", list(DIFFICULTIES))
@pytest.mark.parametrize("size", [32, 128, 200])
def test_masks_boxes_and_labels_fit(difficulty, size):
    dataset = ShapesDataset(6, size=size, classes=len(NAMES), difficulty=difficulty)
    for index in range(6):
        image, target = dataset[index]
        assert image.dtype == torch.uint8
        assert image.shape == (3, size, size)
        assert target.masks.sum(0).max() <= 1  # a pixel belongs to one instance
        assert target.labels.max() < len(NAMES)
        assert target.image_id == index + 1
        for mask, (x1, y1, x2, y2) in zip(target.masks, target.boxes.int().tolist(), strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] == [x1, y1, x2, y2]


def test_seed_split_and_index_decide_the_image():
    first = ShapesDataset(3)[1]
    again = ShapesDataset(10)[1]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].masks, again[1].masks)
    for other in (ShapesDataset(3)[2], ShapesDataset(3, seed=1)[1], ShapesDataset(3, split="val")[1]):
        assert not torch.equal(first[0], other[0])


def test_a_subset_keeps_its_images():
    part = ShapesDataset(5).subset([3, 1])
    assert part.image_ids == [4, 2]
    assert torch.equal(part[0][0], ShapesDataset(5)[3][0])
    assert sorted(part.coco_gt().imgs) == [2, 4]


def test_rings_have_holes_and_pairs_have_parts():
    dataset = ShapesDataset(60, classes=4, difficulty="easy")
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in NAMES[:4]}
    for _, target in (dataset[i] for i in range(60)):
        for label, counts in zip(target.labels.tolist(), parts_and_holes(target.masks), strict=True):
            found[NAMES[label]].append(counts)
    assert np.mean([holes >= 1 for _, holes in found["ring"]]) > 0.7
    assert np.mean([parts >= 2 for parts, _ in found["pair"]]) > 0.7
    assert np.mean([part == (1, 0) for part in found["heart"]]) > 0.8


def test_instances_of_one_class_touch():
    dataset = ShapesDataset(40)
    touching = 0
    for _, target in (dataset[i] for i in range(40)):
        grown = torch.nn.functional.max_pool2d(target.masks.float()[None], 3, 1, 1)[0] > 0
        for i in range(len(target)):
            for j in range(i):
                touching += bool(target.labels[i] == target.labels[j] and (grown[i] & grown[j]).any())
    assert touching >= 10


def test_hard_images_range_from_a_few_pixels_to_most_of_the_image():
    dataset = ShapesDataset(60, difficulty="hard")
    sides = torch.cat([(t.boxes[:, 2:] - t.boxes[:, :2]).max(1).values for _, t in (dataset[i] for i in range(60))])
    assert sides.min() < 9
    assert sides.max() > 90


def test_what_is_written_loads_as_what_is_in_memory(tmp_path):
    make_shapes(tmp_path / "shapes", images=(3, 2), seed=4, size=64, classes=2)
    for split_name, number in (("train", 3), ("val", 2)):
        split = locate(tmp_path / "shapes", split_name)
        assert split.layout == "COCO"
        written = CocoDataset(split.json, split.images)
        in_memory = ShapesDataset(number, split=split_name, seed=4, size=64, classes=2)
        assert written.categories == in_memory.categories
        assert written.image_ids == in_memory.image_ids
        for (image, target), (expected, expected_target) in zip(written, in_memory, strict=False):
            assert (image.float() - expected.float()).abs().mean() < 3  # JPEG
            assert torch.equal(target.masks, expected_target.masks)
            assert torch.equal(target.boxes, expected_target.boxes)
            assert torch.equal(target.labels, expected_target.labels)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_shapes(tmp_path / name, images=(2, 1))
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert json.loads((tmp_path / "a/annotations/instances_val.json").read_text())["annotations"]


@pytest.mark.parametrize("options", [{"classes": 0}, {"classes": 9}, {"size": 8}, {"difficulty": "brutal"}])
def test_what_cannot_be_drawn_is_refused(options):
    with pytest.raises(UsageError):
        ShapesDataset(3, **options)
