"""Data sets on disk: layouts, images, targets."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from onestage.data.coco import CocoDataset, locate, read_image
from onestage.errors import DatasetError, UsageError

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}]


def annotation(key: int, image_id: int, box: list[float], **fields: Any) -> dict[str, Any]:
    x, y, w, h = box
    one = {"id": key, "image_id": image_id, "category_id": 3, "bbox": box, "area": w * h, "iscrowd": 0}
    return one | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} | fields


ANNOTATIONS = [
    annotation(1, 5, [1, 0, 4, 3]),
    annotation(2, 5, [6, 2, 2, 4], category_id=1, iscrowd=1, segmentation={"size": [6, 8], "counts": [38, 4, 2, 4]}),
    annotation(3, 7, [2, 2, 100, 2]),  # beyond the right side
    annotation(4, 7, [1, 1, 0.5, 4]),  # thinner than a pixel
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images: 5 with an instance and a crowd, 6 without anything, 7 with instances of odd boxes."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    images = []
    for number, (key, size) in enumerate({5: (8, 6), 6: (6, 8), 7: (10, 6)}.items()):
        pixels = np.full((size[1], size[0], 3), (10 * number, 20, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / f"{key}.png")
        images.append({"id": key, "file_name": f"{key}.png", "height": size[1], "width": size[0]})
    write(tmp_path, {"images": images, "annotations": ANNOTATIONS, "categories": CATEGORIES})
    return tmp_path


def write(data: Path, content: dict[str, Any]) -> None:
    (data / "annotations/instances_val.json").write_text(json.dumps(content))


def read(data: Path) -> dict[str, Any]:
    return json.loads((data / "annotations/instances_val.json").read_text())


def opened(data: Path, **options: Any) -> CocoDataset:
    return CocoDataset(data / "annotations/instances_val.json", data / "val", **options)


def test_an_image_and_its_target(data):
    dataset = opened(data)
    image, target = dataset[0]
    assert image.shape == (3, 6, 8)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [0, 20, 30]
    assert dataset.categories == ((1, "dog"), (3, "cat"))
    assert target.image_id == 5
    assert target.boxes.tolist() == [[1, 0, 5, 3], [6, 2, 8, 6]]
    assert target.labels.tolist() == [1, 0]
    assert target.iscrowd.tolist() == [False, True]
    expected = torch.zeros(2, 6, 8, dtype=torch.uint8)
    expected[0, 0:3, 1:5] = 1
    expected[1, 2:6, 6:8] = 1
    assert torch.equal(target.masks, expected)
    assert target.polygons is None


def test_an_image_without_annotations_has_an_empty_target(data):
    _, target = opened(data)[1]
    assert target.boxes.shape == (0, 4)
    assert target.labels.shape == (0,)
    assert target.masks.shape == (0, 8, 6)


def test_boxes_are_clipped_and_thin_ones_left_out_of_targets_only(data):
    dataset = opened(data)
    assert dataset[2][1].boxes.tolist() == [[2, 2, 10, 4]]
    boxes = [a["bbox"] for a in dataset.coco_gt().imgToAnns[7]]
    assert boxes == [[2, 2, 100, 2], [1, 1, 0.5, 4]]


def test_a_loop_ends_after_the_last_image(data):
    assert [target.image_id for _, target in itertools.islice(opened(data), 9)] == [5, 6, 7]


def test_polygons_come_on_request_and_run_lengths_have_none(data):
    _, target = opened(data, polygons=True)[0]
    assert target.polygons == (((1.0, 0.0, 5.0, 0.0, 5.0, 3.0, 1.0, 3.0),), None)


def test_sizes_and_ratios_are_width_by_height(data):
    dataset = opened(data)
    assert dataset.image_ids == [5, 6, 7]
    assert dataset.image_sizes.tolist() == [[6, 8], [8, 6], [6, 10]]
    assert dataset.aspect_ratios.tolist() == [8 / 6, 6 / 8, 10 / 6]


def test_training_drops_empty_and_small_images_on_request(data):
    assert opened(data, drop_empty=True).image_ids == [5, 7]
    assert opened(data, min_size=7).image_ids == []
    content = read(data)
    content["annotations"] = [ANNOTATIONS[1]]
    write(data, content)
    assert opened(data, drop_empty=True).image_ids == []  # only a crowd


def test_a_subset_keeps_order_and_ground_truth(data):
    part = opened(data).subset([2, 0])
    assert part.image_ids == [7, 5]
    assert part[0][1].image_id == 7
    assert sorted(part.coco_gt().imgs) == [5, 7]
    assert part.subset([1]).image_ids == [5]


def test_ground_truth_is_what_pycocotools_reads_from_the_file(data, capsys):
    ours = opened(data).coco_gt()
    assert capsys.readouterr().out == ""
    theirs = COCO(str(data / "annotations/instances_val.json"))
    assert ours.imgs.keys() == theirs.imgs.keys()
    assert ours.getCatIds() == [1, 3]
    for key, expected in theirs.anns.items():
        found = ours.anns[key]
        assert {k: found[k] for k in ("bbox", "area", "iscrowd", "category_id", "image_id")} == {
            k: expected[k] for k in ("bbox", "area", "iscrowd", "category_id", "image_id")
        }
        ours_rle, theirs_rle = ours.annToRLE(found), theirs.annToRLE(expected)
        assert ours_rle["counts"] == theirs_rle["counts"]


def test_a_missing_area_is_counted_from_the_mask(data):
    content = read(data)
    del content["annotations"][0]["area"]
    write(data, content)
    assert opened(data).coco_gt().anns[1]["area"] == 12


def test_missing_images_are_listed_or_skipped(data):
    (data / "val/6.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 3 images are not in .*: '6\.png'"):
        opened(data)
    dataset = opened(data, on_bad_sample="skip")
    assert dataset.image_ids == [5, 7]
    assert len(dataset.skipped) == 1
    assert "6.png" in dataset.skipped[0]


def test_a_corrupt_image_is_named_or_replaced_by_the_next(data):
    path = data / "val/5.png"
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(DatasetError, match=r"5\.png' cannot be read"):
        opened(data)[0]
    dataset = opened(data, on_bad_sample="skip")
    assert dataset[0][1].image_id == 6
    assert dataset[0][1].image_id == 6
    assert len(dataset.skipped) == 1


def test_a_link_out_of_the_folder_is_refused(data):
    outside = data / "outside.png"
    os.replace(data / "val/5.png", outside)
    (data / "val/5.png").symlink_to(outside)
    with pytest.raises(DatasetError, match="a link out of its folder"):
        opened(data)[0]


def test_an_image_of_another_size_is_refused(data):
    Image.new("RGB", (9, 6)).save(data / "val/5.png")
    with pytest.raises(DatasetError, match="is 6 x 9 px, its annotations say 6 x 8"):
        opened(data)[0]


def rotated(path: Path) -> None:
    """A 6 x 8 px (height, width) image whose tag says: turn by a quarter."""
    image = Image.new("RGB", (8, 6))
    image.paste((255, 0, 0), (0, 0, 8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def test_orientation_is_applied_only_where_the_annotations_were_made_on_the_turned_image(tmp_path):
    path = tmp_path / "a.png"
    rotated(path)
    assert read_image(path, size=(6, 8)).shape == (3, 6, 8)
    turned = read_image(path, size=(8, 6))
    assert turned.shape == (3, 8, 6)
    assert turned[0, :, -1].tolist() == [255] * 8  # the first row became the last column
    assert torch.equal(read_image(path), turned)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_turned_tiff_is_the_same_compressed_or_not(tmp_path, compression):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(grey).save(tmp_path / "a.tif", exif=exif, compression=compression)
    assert read_image(tmp_path / "a.tif")[0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_a_large_image_is_refused_from_its_header(tmp_path):
    Image.new("L", (300, 200)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="has 300 x 200 px; the limit is 0.05 megapixels"):
        read_image(tmp_path / "a.png", max_pixels=50_000)


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"\0" * 50])
def test_what_is_no_image_is_a_dataset_error(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("L", 7, [7, 7, 7]), ("RGBA", (1, 2, 3, 128), [1, 2, 3]), ("I;16", 770, [3, 3, 3]), ("1", 1, [255, 255, 255])],
)
def test_every_mode_becomes_rgb(tmp_path, mode, color, expected):
    Image.new(mode, (3, 2), color).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("json", "images", "layout"),
    [
        ("annotations/instances_{}2017.json", "{}2017", "COCO 2017"),
        ("annotations/instances_{}.json", "{}", "COCO"),
        ("{part}/_annotations.coco.json", "{part}", "annotations beside images"),
        ("{part}.json", "{part}/JPEGImages", "YouTube-VIS"),
        ("{part}/instances.json", "{part}/JPEGImages", "YouTube-VIS"),
        ("annotations/instances_{}_sub.json", "JPEGImages", "YouTube-VIS"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_layout_is_found(tmp_path, json, images, layout, split, monkeypatch):
    part = {"train": "train", "val": "valid"}[split]
    json_path = tmp_path / json.format(split, part=part)
    images_path = tmp_path / images.format(split, part=part)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    images_path.mkdir(parents=True, exist_ok=True)
    json_path.touch()
    found = locate(tmp_path, split)
    assert (found.json, found.images, found.layout) == (json_path, images_path, layout)
    monkeypatch.setenv("COCO_ROOT", str(tmp_path))
    assert locate(None, split) == found


def test_one_video_file_serves_train_and_val(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "annotations/instances_val_sub.json").touch()
    assert locate(tmp_path, "train").json == tmp_path / "annotations/instances_val_sub.json"


def test_explicit_files_come_first(data):
    found = locate(Path("nowhere"), "val", json=data / "annotations/instances_val.json", images=data / "val")
    assert found.layout == "explicit files"


def test_data_that_cannot_be_found_says_what_is_there(data, monkeypatch):
    monkeypatch.delenv("COCO_ROOT", raising=False)
    with pytest.raises(UsageError, match="COCO_ROOT is not set"):
        locate(None, "val")
    with pytest.raises(DatasetError, match="does not exist"):
        locate(data / "none", "val")
    with pytest.raises(DatasetError, match="is a file"):
        locate(data / "annotations/instances_val.json", "val")
    with pytest.raises(DatasetError, match="has a val split but no train split"):
        locate(data, "train")
    with pytest.raises(DatasetError, match=r"in no known layout; found there: 5\.png"):
        locate(data / "val", "val")
    with pytest.raises(UsageError, match="belong together"):
        locate(data, "val", json=data / "annotations/instances_val.json")
    with pytest.raises(DatasetError, match="annotation file .* does not exist"):
        locate(None, "val", json=data / "none.json", images=data / "val")
    with pytest.raises(DatasetError, match="image folder .* does not exist"):
        locate(None, "val", json=data / "annotations/instances_val.json", images=data / "none")


@pytest.mark.parametrize("name", ["coco_dev", "pennfudan", "ytvis_mini"])
def test_real_data_loads(shared, name):
    split = locate(shared / "data" / name, "val")
    dataset = CocoDataset(split.json, split.images)
    assert len(dataset) == {"coco_dev": 136, "pennfudan": 50, "ytvis_mini": 89}[name]
    for index in range(0, len(dataset), 10):
        image, target = dataset[index]
        assert tuple(image.shape[1:]) == tuple(dataset.image_sizes[index]) == tuple(target.masks.shape[1:])
        rows, columns = target.masks.any(2), target.masks.any(1)
        assert rows.any(1).all()
        inside = target.boxes.round().long().tolist()
        # A mask may lie a pixel beyond its annotated box.
        for (x1, y1, x2, y2), row, column in zip(inside, rows, columns, strict=True):
            assert y1 - 2 <= row.nonzero().min() <= row.nonzero().max() <= y2 + 1
            assert x1 - 2 <= column.nonzero().min() <= column.nonzero().max() <= x2 + 1
