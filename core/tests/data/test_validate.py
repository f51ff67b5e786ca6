"""What may not get past the annotation file."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from onestage.data.validate import file_name_problem, read_annotations
from onestage.errors import DatasetError

TRIANGLE = [1.0, 1.0, 7.0, 1.0, 7.0, 5.0]
CONTENT: dict[str, Any] = {
    "images": [
        {"id": 30, "file_name": "a.jpg", "height": 6, "width": 8},
        {"id": 10, "file_name": "sub/b.jpg", "height": 4, "width": 4},
    ],
    "categories": [{"id": 7, "name": "vest"}, {"id": 2, "name": "helmet"}],
    "annotations": [
        {
            "id": 5,
            "image_id": 10,
            "category_id": 7,
            "bbox": [0, 0, 2, 2],
            "area": 4,
            "iscrowd": 1,
            "segmentation": {"size": [4, 4], "counts": [0, 2, 2, 2, 10]},
        },
        {"id": 6, "image_id": 30, "category_id": 2, "bbox": [1, 1, 6, 4], "area": 12.5, "segmentation": [TRIANGLE]},
    ],
}


def written(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(**fields: Any) -> dict[str, Any]:
    """The content with other fields in its second annotation."""
    content = copy.deepcopy(CONTENT)
    content["annotations"][1] |= fields
    return content


def test_annotations_are_grouped_by_image_and_labels_follow_sorted_ids(tmp_path):
    flat = read_annotations(written(tmp_path, CONTENT))
    assert flat.categories == ((2, "helmet"), (7, "vest"))
    assert flat.image_ids.tolist() == [30, 10]
    assert [flat.file_name(0), flat.file_name(1)] == ["a.jpg", "sub/b.jpg"]
    assert [list(flat.of_image(0)), list(flat.of_image(1))] == [[0], [1]]
    assert flat.ids.tolist() == [6, 5]
    assert flat.labels.tolist() == [0, 1]
    assert flat.boxes.tolist() == [[1, 1, 6, 4], [0, 0, 2, 2]]
    assert flat.areas.tolist() == [12.5, 4]
    assert flat.crowds.tolist() == [False, True]
    assert flat.polygons(0) == [TRIANGLE]
    assert flat.polygons(1) is None
    assert coco_mask.area(flat.rle(1, (4, 4))) == 4


def test_masks_are_those_of_pycocotools(tmp_path):
    flat = read_annotations(written(tmp_path, CONTENT))
    expected = coco_mask.merge(coco_mask.frPyObjects([TRIANGLE], 6, 8))
    assert flat.rle(0, (6, 8)) == expected


def test_a_gzip_file_reads_like_the_plain_one(tmp_path):
    path = tmp_path / "data.json.gz"
    path.write_bytes(gzip.compress(json.dumps(CONTENT).encode()))
    assert read_annotations(path).ids.tolist() == [6, 5]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"segmentation": [TRIANGLE[:5]]}, "polygon 0 has 5 numbers; an even count of at least 6 is needed"),
        ({"segmentation": [TRIANGLE, TRIANGLE[:4]]}, "polygon 1 has 4 numbers"),
        ({"segmentation": [[*TRIANGLE[:5], float("inf")]]}, "polygon 0 has a coordinate that is not finite"),
        ({"segmentation": [[*TRIANGLE[:5], float("nan")]]}, "polygon 0 has a coordinate that is not finite"),
        ({"segmentation": [[*TRIANGLE[:5], "7"]]}, "polygon 0 is not a list of finite numbers"),
        ({"segmentation": [[*TRIANGLE[:5], 10**400]]}, "polygon 0 is not a list of finite numbers"),
        ({"segmentation": TRIANGLE}, "has a flat list as segmentation"),
        ({"segmentation": []}, "has no segmentation"),
        ({"segmentation": None}, "has no segmentation"),
        ({"segmentation": {"size": [6, 8], "counts": [47]}}, "RLE runs that sum to 47"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "RLE size [8, 6], the image has [6, 8]"),
        ({"segmentation": {"size": [6, 8], "counts": [-1, 49]}}, "RLE run below 0"),
        ({"segmentation": {"size": [6, 8], "counts": "\x00"}}, "damaged compressed RLE"),
        ({"segmentation": {"counts": [48]}}, "not a COCO RLE"),
        ({"bbox": [1, 1, 6]}, "four finite numbers"),
        ({"bbox": [1, 1, 6, float("nan")]}, "four finite numbers"),
        ({"bbox": [7, 5, -6, 4]}, "negative size"),
        ({"bbox": None}, "four finite numbers"),
        ({"area": "12"}, "has area '12'"),
        ({"iscrowd": 2}, "has iscrowd 2"),
        ({"category_id": 3}, "has category_id 3; known are 2, 7"),
        ({"category_id": [2]}, "has category_id [2]"),
        ({"image_id": 31}, "belongs to image 31, which is not in 'images'"),
        ({"image_id": "30"}, "belongs to image '30'"),
        ({"id": 1.5}, "not a whole number"),
    ],
)
def test_a_bad_annotation_is_named_or_skipped(tmp_path, fields, why):
    path = written(tmp_path, changed(**fields))
    with pytest.raises(DatasetError) as error:
        read_annotations(path)
    assert why in error.value.what
    assert "annotation" in error.value.what
    assert str(path) in error.value.what
    assert "--on-bad-sample skip" in error.value.fix
    flat = read_annotations(path, on_bad_sample="skip")
    assert flat.ids.tolist() == [5]
    assert [why in problem for problem in flat.problems] == [True]


def test_the_error_names_annotation_image_and_file_and_counts_the_others(tmp_path):
    content = changed(segmentation=[TRIANGLE[:5]])
    content["annotations"] += [content["annotations"][1] | {"id": key} for key in (8, 9)]
    path = written(tmp_path, content)
    with pytest.raises(DatasetError) as error:
        read_annotations(path)
    assert error.value.what == (
        f"dataset '{path}': annotation 6 (image 30, 'a.jpg') polygon 0 has 5 numbers; an even count of at least 6 is "
        "needed (2 more like this)"
    )


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ({"file_name": "../a.jpg"}, "has '..'"),
        ({"file_name": "/etc/passwd"}, "is an absolute path"),
        ({"file_name": "C:\\a.jpg"}, "is an absolute path"),
        ({"file_name": "a\0.jpg"}, "has a NUL character"),
        ({"file_name": ""}, "is not a file name"),
        ({"height": 0}, "above 0"),
        ({"width": "8"}, "whole numbers"),
        ({"width": 20_000_000}, "the limit is 100 megapixels"),
    ],
)
def test_a_bad_image_is_named_or_skipped_with_its_annotations(tmp_path, image, why):
    content = copy.deepcopy(CONTENT)
    content["images"][0] |= image
    path = written(tmp_path, content)
    with pytest.raises(DatasetError) as error:
        read_annotations(path)
    assert why in error.value.what
    flat = read_annotations(path, on_bad_sample="skip")
    assert flat.image_ids.tolist() == [10]
    assert flat.ids.tolist() == [5]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("<!DOCTYPE html><html></html>", "is an HTML or XML page"),
        ('{"images": [', "is not valid JSON: line 1, column 13"),
        ("[" * 100_000, "is not JSON text"),
        ([], "is it a results file?"),
        ({"images": [], "annotations": []}, "has no list 'categories'"),
        (3, "has no list 'images'"),
        (CONTENT | {"categories": []}, "has no categories"),
        (CONTENT | {"categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]}, "category id 2 occurs twice"),
        (CONTENT | {"categories": [{"id": "2", "name": "a"}]}, "needs a whole-number 'id' and a 'name'"),
        (CONTENT | {"images": CONTENT["images"] * 2}, "image id 30 occurs twice"),
        (CONTENT | {"images": [{"file_name": "a.jpg"}]}, "needs a whole-number 'id'"),
        (CONTENT | {"annotations": CONTENT["annotations"] * 2}, "annotation ids occur twice: 5, 6"),
        (CONTENT | {"annotations": [5]}, "annotations[0] is 5"),
        ({"videos": [{"id": 1}], "annotations": [], "categories": []}, "is not a complete YouTube-VIS file"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, why):
    with pytest.raises(DatasetError) as error:
        read_annotations(written(tmp_path, content), on_bad_sample="skip")
    assert why in error.value.what
    assert "\n" not in error.value.what


@pytest.mark.parametrize("damage", [slice(30), slice(0, 0), slice(5, None)])
def test_a_damaged_gzip_file_says_so(tmp_path, damage):
    path = tmp_path / "data.json.gz"
    path.write_bytes(gzip.compress(json.dumps(CONTENT).encode())[damage])
    with pytest.raises(DatasetError, match="cannot be read|is empty"):
        read_annotations(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        read_annotations(tmp_path / "none.json")


def test_polygons_far_outside_are_clamped_near_the_image(tmp_path):
    flat = read_annotations(written(tmp_path, changed(segmentation=[[0, 0, 1e200, 0, 1e200, 1e200, -3, -1e9]])))
    assert flat.points.tolist() == [0, 0, 16, 0, 16, 12, -3, -6]
    assert coco_mask.area(flat.rle(0, (6, 8))) <= 48


def test_polygons_a_little_outside_stay_as_they_are(tmp_path):
    outside = [-2.5, -1, 9.25, 0, 8, 7]
    assert read_annotations(written(tmp_path, changed(segmentation=[outside]))).polygons(0) == [outside]


def test_an_annotation_without_area_is_legal(tmp_path):
    content = copy.deepcopy(CONTENT)
    del content["annotations"][1]["area"]
    assert np.isnan(read_annotations(written(tmp_path, content)).areas).tolist() == [True, False]


def test_annotations_without_an_id_get_one_that_no_other_has(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["id"] = 2
    del content["annotations"][1]["id"]
    content["annotations"].append(content["annotations"][1] | {"image_id": 10})
    assert sorted(read_annotations(written(tmp_path, content)).ids.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("videos", [[], [{"id": 1, "name": "street"}]])
def test_a_file_with_images_is_in_coco_format_though_it_lists_videos(tmp_path, videos):
    flat = read_annotations(written(tmp_path, CONTENT | {"videos": videos}))
    assert flat.image_ids.tolist() == [30, 10]
    assert flat.videos == ()


def test_frames_of_a_video_are_images_of_their_own(tmp_path):
    mask = {"size": [4, 4], "counts": [0, 2, 14]}
    content = {
        "videos": [
            {"id": 9, "file_names": ["v/0.jpg", "v/1.jpg"], "height": 4, "width": 4},
            {"id": 4, "file_names": ["w/0.jpg"], "height": 4, "width": 4},
        ],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"id": 1, "video_id": 4, "category_id": 1, "segmentations": [mask], "bboxes": [[0, 0, 1, 2]]},
            {
                "id": 2,
                "video_id": 9,
                "category_id": 1,
                "segmentations": [None, mask],
                "bboxes": [None, [0, 0, 1, 2]],
                "areas": [None, 2],
            },
        ],
    }
    flat = read_annotations(written(tmp_path, content))
    assert [flat.file_name(i) for i in range(3)] == ["v/0.jpg", "v/1.jpg", "w/0.jpg"]
    assert flat.image_ids.tolist() == [1, 2, 3]
    assert [len(flat.of_image(i)) for i in range(3)] == [0, 1, 1]


def test_names_inside_the_folder_are_fine():
    assert [file_name_problem(name) for name in ("a.jpg", "sub/a.jpg", "..a.jpg", "größe 1.png")] == [None] * 4


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    field=st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"]),
    value=JSON_VALUES,
)
def test_whatever_a_field_holds_it_is_a_dataset_error_or_a_mask(tmp_path_factory, field, value):
    path = written(tmp_path_factory.mktemp("fuzz"), changed(**{field: value}))
    try:
        flat = read_annotations(path)
    except DatasetError:
        return
    assert 0 <= coco_mask.area(flat.rle(0, (6, 8))) <= 48
