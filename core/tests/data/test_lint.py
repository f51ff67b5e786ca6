"""What lint finds, that it agrees with the loader, and that its clean copies load."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onestage.data.coco import CocoDataset
from onestage.data.lint import KINDS, Report, as_json, compare_splits, lint_split, same_pictures
from onestage.data.validate import read_annotations
from onestage.errors import DatasetError

BOX = [10, 10, 20, 10]
SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]
ANNOTATION = {"image_id": 1, "category_id": 1, "bbox": BOX, "area": 200, "iscrowd": 0, "segmentation": [SQUARE]}
CONTENT: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.png", "height": 40, "width": 60, "license": 3},
        {"id": 2, "file_name": "b.png", "height": 40, "width": 60},
    ],
    "categories": [{"id": 1, "name": "vest"}],
    "annotations": [{"id": 1, **ANNOTATION}, {"id": 2, **ANNOTATION, "image_id": 2}],
}
FAR = [10.0, 10.0, 30.0, 10.0, 30.0, 500.0]
# Fields of the first annotation, the kind of problem they make, and what a clean copy holds in their place.
BROKEN = [
    ({"id": 1.5}, "bad annotation id", {"id": 1}),
    ({"image_id": 9}, "unknown image", None),
    ({"category_id": 9}, "unknown category", None),
    ({"segmentation": []}, "no mask", None),
    ({"segmentation": SQUARE}, "flat polygon", {"segmentation": [SQUARE]}),
    ({"segmentation": [SQUARE, [1, 2]]}, "short polygon", {"segmentation": [SQUARE]}),
    ({"segmentation": [[1, 2]]}, "short polygon", None),
    ({"segmentation": [SQUARE, [*SQUARE[:7], float("inf")]]}, "bad polygon", {"segmentation": [SQUARE]}),
    ({"segmentation": {"size": [40, 60], "counts": [1]}}, "bad RLE", None),
    ({"bbox": None}, "bad box", {"bbox": BOX}),
    ({"bbox": [10, 10, -20, 10]}, "bad box", {"bbox": BOX}),
    ({"area": "many"}, "bad area", {"area": 200}),
    ({"iscrowd": None}, "bad iscrowd", {"iscrowd": 0}),
    ({"iscrowd": 7}, "bad iscrowd", None),
]
QUIETLY_WRONG = [
    ({"segmentation": [FAR], "bbox": [10, 10, 20, 30]}, "far polygon", {"segmentation": [[*FAR[:5], 80]]}),
    ({"bbox": [10, 10, 30, 20]}, "box off its mask", {"bbox": BOX}),  # x1, y1, x2, y2
    ({"area": 0}, "under a pixel", {"area": 0}),
    ({"area": None}, "bad area", {"area": 200}),
    ({"image_id": 2}, "duplicate annotation", None),
]


def written(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content, default=as_json), encoding="utf-8")
    return path


def changed(**fields: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    content["annotations"][0] |= fields
    return content


def loads(path: Path) -> bool:
    try:
        read_annotations(path)
    except DatasetError:
        return False
    return True


def test_a_clean_file_has_no_problems_and_its_copy_is_equal(tmp_path):
    checked = lint_split(written(tmp_path, CONTENT), None)
    assert checked.report.counts == {}
    assert checked.report.numbers == {
        "images": 2,
        "annotations": 2,
        "categories": 1,
        "images without annotations": 0,
    }
    assert json.loads(json.dumps(checked.content, default=as_json)) == CONTENT


def test_an_object_at_the_far_end_of_a_long_image_is_no_problem(tmp_path):
    content = changed(bbox=[150, 10, 20, 10], segmentation=[[150, 10, 170, 10, 170, 20, 150, 20]])
    content["images"][0]["width"] = 180
    assert lint_split(written(tmp_path, content), None).report.counts == {}


@pytest.mark.parametrize(("fields", "kind", "mended"), BROKEN + QUIETLY_WRONG)
def test_a_problem_is_counted_and_the_copy_is_repaired_or_lacks_the_annotation(tmp_path, fields, kind, mended):
    path = written(tmp_path, changed(**fields))
    checked = lint_split(path, None)
    assert checked.report.counts == {kind: 1}
    assert "annotation" in checked.report.examples[kind][0]
    left = json.loads(json.dumps(checked.content, default=as_json))["annotations"]
    if mended is None:
        assert len(left) == 1
        assert checked.report.outcomes[kind] == {"dropped": 1}
    else:
        assert left[0] == CONTENT["annotations"][0] | fields | mended
        assert checked.report.outcomes[kind] == ({"kept": 1} if kind == "under a pixel" else {"repaired": 1})
    assert loads(written(tmp_path, checked.content, "clean.json"))


@pytest.mark.parametrize(("fields", "kind", "mended"), BROKEN + QUIETLY_WRONG)
def test_what_lint_calls_a_stop_or_skip_is_where_the_loader_stops(tmp_path, fields, kind, mended):
    path = written(tmp_path, changed(**fields))
    assert loads(path) == (KINDS[kind][0] not in ("stops", "skips"))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda c: c["categories"].append({"id": "x"}), "bad category"),
        (lambda c: c["categories"].append({"id": 1, "name": "again"}), "category id twice"),
        (lambda c: c["images"].append({"file_name": "c.png"}), "image without id"),
        (lambda c: c["images"].append(c["images"][0]), "image id twice"),
        (lambda c: c["annotations"].append(None), "no annotation"),
        (lambda c: c["annotations"].append(c["annotations"][0] | {"bbox": [10, 10, 20, 11]}), "annotation id twice"),
    ],
)
def test_what_stops_the_loader_in_any_case_is_counted_and_dropped_too(tmp_path, change, kind):
    content = copy.deepcopy(CONTENT)
    change(content)
    path = written(tmp_path, content)
    with pytest.raises(DatasetError):
        read_annotations(path, on_bad_sample="skip")
    checked = lint_split(path, None)
    assert checked.report.counts == {kind: 1}
    assert checked.report.with_effect("stops") == 1
    assert loads(written(tmp_path, checked.content, "clean.json"))


def test_a_file_that_is_none_is_one_problem(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("<html>")
    checked = lint_split(path, None)
    assert checked.content is None
    assert checked.report.counts == {"unusable file": 1}
    assert "HTML" in checked.report.examples["unusable file"][0]


def test_examples_are_few_however_many_problems_there_are():
    report = Report()
    for number in range(1000):
        report.add("no mask", str(number), "dropped")
    assert report.examples["no mask"] == ["0", "1", "2", "3", "4"]
    assert report.to_json()["problems"]["no mask"]["count"] == 1000


def saved(path: Path, seed: int = 0, size: tuple[int, int] = (40, 60), **options: Any) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)


def test_images_are_looked_at(tmp_path):
    names = ["ok.png", "gone.png", "page.png", "small.png", "turned.jpg", "tagged.jpg", "cut.png", "copy.png"]
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "ok.png")
    saved(tmp_path / "copy.png")
    (tmp_path / "page.png").write_text("<html>")
    saved(tmp_path / "small.png", 1, (20, 60))
    saved(tmp_path / "turned.jpg", 2, (60, 40), exif=exif)
    saved(tmp_path / "tagged.jpg", 3, exif=exif)
    saved(tmp_path / "cut.png", 4)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    images = [{"id": i, "file_name": name, "height": 40, "width": 60} for i, name in enumerate(names, 1)]
    path = written(tmp_path, CONTENT | {"images": images})
    expected = {
        "image missing": 1,
        "image unreadable": 2,
        "orientation applied": 1,
        "orientation ignored": 1,
        "same picture twice": 1,
    }
    checked = lint_split(path, tmp_path)
    assert checked.report.counts == expected
    assert lint_split(path, tmp_path, depth="decode").report.counts == expected | {"image unreadable": 3}
    assert lint_split(path, tmp_path, depth="none").report.counts == {}
    assert [image["file_name"] for image in checked.content["images"]] == [
        name for name in names if name not in ("gone.png", "page.png", "small.png")
    ]
    assert checked.report.numbers["annotations of images that cannot be used"] == 1
    clean = written(tmp_path, lint_split(path, tmp_path, depth="decode").content, "clean.json")
    dataset = CocoDataset(clean, tmp_path)
    assert [dataset[i][0].shape for i in range(len(dataset))] == [(3, 40, 60)] * 4


def test_pictures_and_categories_of_train_and_val_are_compared(tmp_path):
    checked = []
    for split, seed, categories in (("train", 0, CONTENT["categories"]), ("val", 1, [{"id": 1, "name": "boot"}])):
        (tmp_path / split).mkdir()
        saved(tmp_path / split / "a.png", seed)
        saved(tmp_path / split / "b.png", 7)
        path = written(tmp_path / split, CONTENT | {"categories": categories})
        checked.append(lint_split(path, tmp_path / split))
    report = compare_splits(*checked)
    assert report.counts == {"in train and val": 1, "categories differ": 1}
    assert "train/b.png' is" in report.examples["in train and val"][0]


def test_same_pictures_differ_in_the_middle_too(tmp_path):
    content = bytes(range(256)) * 40
    for name, data in (("a", content), ("b", content), ("c", content[:5000] + b"?" + content[5001:]), ("d", b"")):
        (tmp_path / name).write_bytes(data)
    groups = sorted(sorted(path.name for path in group) for group in same_pictures(tmp_path.iterdir()))
    assert groups == [["a", "b"], ["c"], ["d"]]


VIDEOS: dict[str, Any] = {
    "videos": [{"id": 4, "file_names": ["v/0.jpg", "v/1.jpg"], "height": 40, "width": 60}],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [
        {
            "id": 1,
            "video_id": 4,
            "category_id": 1,
            "iscrowd": 0,
            "segmentations": [[SQUARE], [SQUARE]],
            "bboxes": [BOX, BOX],
            "areas": [200, 200],
        }
    ],
}


def test_a_clean_video_file_has_no_problems_and_its_copy_is_equal(tmp_path):
    checked = lint_split(written(tmp_path, VIDEOS), None)
    assert checked.report.counts == {}
    assert json.loads(json.dumps(checked.content, default=as_json)) == VIDEOS


def test_tracks_are_cleaned_frame_by_frame(tmp_path):
    content = copy.deepcopy(VIDEOS)
    track = content["annotations"][0]
    track["segmentations"][1] = {"size": [40, 60], "counts": [3]}
    track["bboxes"][0] = [1, 1]
    content["annotations"] += [
        track | {"id": 1},
        track | {"id": 3, "video_id": 8},
        track | {"id": 5, "segmentations": [None, []]},
    ]
    content["videos"].append({"id": 9, "file_names": [], "height": 40, "width": 60})
    checked = lint_split(written(tmp_path, content), None)
    assert checked.report.counts == {"bad track": 2, "bad RLE": 1, "bad box": 1, "no mask": 1, "bad video": 1}
    assert [video["id"] for video in checked.content["videos"]] == [4]
    (left,) = checked.content["annotations"]
    assert (left["segmentations"][1], left["bboxes"][0]) == (None, BOX)
    flat = read_annotations(written(tmp_path, checked.content, "clean.json"))
    assert flat.image_ids.tolist() == [1, 2]
    assert flat.track_ids.tolist() == [1]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(st.floats(-1e9, 1e9), min_size=6, max_size=8)
        | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    place=st.sampled_from(
        [
            ("annotations", "id"), ("annotations", "image_id"), ("annotations", "category_id"),
            ("annotations", "bbox"), ("annotations", "area"), ("annotations", "iscrowd"),
            ("annotations", "segmentation"), ("annotations", None), ("images", "id"), ("images", "file_name"),
            ("images", "height"), ("images", None), ("categories", "id"), ("categories", "name"),
        ]
    ),
    value=JSON_VALUES,
)  # fmt: skip
def test_lint_and_loader_agree_on_whatever_a_field_holds(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("agree")
    content = copy.deepcopy(CONTENT)
    name, key = place
    if key is None:
        content[name][0] = value
    else:
        content[name][0][key] = value
    path = written(folder, content)
    checked = lint_split(path, None)
    assert loads(path) == (checked.report.with_effect("stops", "skips") == 0)
    if checked.content is not None:
        assert loads(written(folder, checked.content, "clean.json"))
