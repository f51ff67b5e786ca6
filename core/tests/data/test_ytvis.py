"""Video data sets: what a YouTube-VIS file says, pairs of frames, and generated clips in the same form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onestage.config import InputConfig
from onestage.data.clips import EVENTS, ClipsDataset, make_clips
from onestage.data.coco import locate
from onestage.data.drawing import MIN_AREA
from onestage.data.loader import make_loader
from onestage.data.ytvis import FramePairs, VideoDataset
from onestage.errors import DatasetError, UsageError

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}]


def rle(first: int, count: int) -> dict[str, Any]:
    """On 6 x 8: `count` pixels from `first` on, column by column."""
    return {"size": [6, 8], "counts": [first, count, 48 - first - count]}


def content() -> dict[str, Any]:
    """Video 5 of three frames with a cat in two and a dog in one, video 2 of one frame with nothing."""
    videos = [
        {"id": 5, "file_names": ["a/0.png", "a/1.png", "a/2.png"], "height": 6, "width": 8},
        {"id": 2, "file_names": ["b/0.png"], "height": 6, "width": 8},
    ]
    cat = {"id": 11, "video_id": 5, "category_id": 3, "segmentations": [rle(0, 12), None, rle(6, 6)]}
    cat |= {"bboxes": [[0, 0, 2, 6], None, [1, 0, 1, 6]], "areas": [12, None, 6]}
    dog = {"id": 10, "video_id": 5, "category_id": 1, "segmentations": [None, None, rle(36, 12)]}
    dog |= {"bboxes": [None, None, [6, 0, 2, 6]]}
    return {"videos": videos, "annotations": [cat, dog], "categories": CATEGORIES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, content())
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png"):
        path = tmp_path / "valid/JPEGImages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 50 * int(path.stem), dtype=np.uint8)).save(path)
    return tmp_path


def write(folder: Path, what: Any) -> None:
    (folder / "valid.json").write_text(json.dumps(what))


def opened(folder: Path, **options: Any) -> VideoDataset:
    found = locate(folder, "val")
    assert found.layout == "YouTube-VIS"
    return VideoDataset(found.json, found.images, **options)


def test_frames_targets_and_tracks_of_a_file(folder):
    dataset = opened(folder)
    assert [(v.id, v.size, v.num_frames) for v in dataset.videos] == [(5, (6, 8), 3), (2, (6, 8), 1)]
    assert dataset.frame(0, 2)[:, 0, 0].tolist() == [100, 100, 100]
    target = dataset.target(0, 2)
    assert target.track_ids.tolist() == [11, 10]
    assert target.labels.tolist() == [1, 0]  # by category id
    assert target.boxes.tolist() == [[1, 0, 2, 6], [6, 0, 8, 6]]
    assert dataset.target(0, 1).boxes.shape == (0, 4)
    assert dataset.frames_with_objects(0) == [0, 2]
    assert dataset.frames_with_objects(1) == []
    dog, cat = dataset.tracks(0)
    assert (dog.id, dog.label, dog.area) == (10, 0, 12)  # counted: the file does not say
    assert (cat.id, cat.area, [mask is not None for mask in cat.masks]) == (11, 9, [True, False, True])
    assert dataset.tracks(1) == []
    assert dataset.subset([1]).videos[0].id == 2


def test_pairs_are_other_frames_of_the_same_video_with_the_same_objects(folder):
    pairs = FramePairs(opened(folder))
    assert len(pairs) == 2
    assert pairs.image_ids == [1, 3]
    assert pairs.aspect_ratios.tolist() == [8 / 6] * 2
    image, target = pairs[0]
    assert image[0, 0, 0] == 0
    assert target.reference.image[0, 0, 0] == 100
    assert target.reference.track_ids.tolist() == [11, 10]
    assert target.reference.boxes.tolist() == [[1, 0, 2, 6], [6, 0, 8, 6]]
    assert len(pairs.subset([1])) == 1
    assert [video.id for video in pairs.own_videos().videos] == [5]
    assert len(FramePairs(opened(folder), min_size=7)) == 0


def test_a_video_with_one_frame_of_objects_is_paired_with_itself(folder):
    short = content()
    short["annotations"] = short["annotations"][1:]
    write(folder, short)
    image, target = FramePairs(opened(folder))[0]
    assert torch.equal(image, target.reference.image)
    assert target.track_ids.tolist() == target.reference.track_ids.tolist() == [10]


def test_references_are_drawn_uniformly_and_again_from_the_same_seed():
    pairs = FramePairs(ClipsDataset(1, size=32, num_frames=4))
    torch.manual_seed(1)
    frames = [pairs.videos_of_frames.frame(0, t) for t in range(4)]
    references = [pairs[1][1].reference.image for _ in range(90)]
    drawn = [next(t for t in range(4) if torch.equal(frames[t], image)) for image in references]
    assert drawn.count(1) == 0
    assert min(drawn.count(t) for t in (0, 2, 3)) > 15

    def epoch() -> list[int]:
        loader = make_loader(pairs, InputConfig(augmentation="flip"), batch_size=2, training=True, seed=5)
        return [int(t.reference.image.long().sum()) for _, targets in loader for t in targets]

    assert epoch() == epoch()


def test_one_file_serves_both_splits(shared):
    train, val = (locate(shared / "data/ytvis_mini", split) for split in ("train", "val"))
    assert train.json == val.json
    dataset = VideoDataset(val.json, val.images)
    assert len(dataset) == 10
    pairs = FramePairs(dataset)
    assert len(pairs) == 89
    image, target = pairs[0]
    assert image.shape == target.reference.image.shape == (3, 480, 854)
    assert target.track_ids.tolist() == target.reference.track_ids.tolist()


def test_a_file_without_annotations_has_videos_without_objects(folder):
    write(folder, content() | {"annotations": None})  # so is the official file of the validation set
    dataset = opened(folder)
    assert len(dataset) == 2
    assert dataset.tracks(0) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c["annotations"][0]["segmentations"].pop(), "annotations[0] has 2 segmentations, 3 bboxes and 3"),
        (lambda c: c["annotations"][0].update(video_id=9), "annotations[0] belongs to video 9"),
        (lambda c: c["annotations"][1].update(id=11), "annotations[1] has the id 11"),
        (lambda c: c["videos"][1].update(id=5), "videos[1] has the id 5"),
        (lambda c: c.update(videos=None), "'videos' is not a list"),
        (lambda c: c.update(videos=0), "'videos' is not a list"),
        (lambda c: c["videos"][1].update(file_names=[]), "video 2 has no frames"),
        (lambda c: c["annotations"][0]["segmentations"].__setitem__(2, rle(0, 1) | {"counts": [9]}), "annotation 11"),
        (lambda c: c["videos"][0]["file_names"].__setitem__(1, "../x.png"), "has '..'"),
        (lambda c: c.pop("videos"), "has no list 'images'"),
    ],
)
def test_a_file_that_is_not_sound_says_where(folder, change, why):
    broken = content()
    change(broken)
    write(folder, broken)
    with pytest.raises(DatasetError) as caught:
        opened(folder)
    assert why in caught.value.what


def test_a_coco_file_is_no_video_file(folder):
    write(folder, {"images": [], "annotations": [], "categories": CATEGORIES})
    with pytest.raises(DatasetError, match="has no 'videos'"):
        opened(folder)


def test_a_video_with_a_missing_frame_is_an_error_or_left_out(folder):
    (folder / "valid/JPEGImages/a/1.png").unlink()
    with pytest.raises(DatasetError, match="1 of 4 images are not in"):
        opened(folder)
    dataset = opened(folder, on_bad_sample="skip")
    assert [video.id for video in dataset.videos] == [2]
    assert dataset.skipped[-1] == "video 5 lacks frames"


def test_an_unreadable_frame_is_an_error_or_the_one_before(folder):
    (folder / "valid/JPEGImages/a/2.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="cannot be read"):
        opened(folder).frame(0, 2)
    dataset = opened(folder, on_bad_sample="skip")
    assert dataset.frame(0, 2)[0, 0, 0] == 50
    assert len(dataset.skipped) == 1


def test_seed_split_and_number_decide_the_clip():
    frame = ClipsDataset(3).frame(1, 4)
    assert torch.equal(frame, ClipsDataset(9).subset([1]).frame(0, 4))
    assert not torch.equal(frame, ClipsDataset(3, seed=1).frame(1, 4))
    assert not torch.equal(frame, ClipsDataset(3, split="val").frame(1, 4))


def test_clips_hold_the_events_they_promise():
    """Of 16 clips: objects that cover each other, that touch, and that leave and come back."""
    clips = ClipsDataset(16, num_frames=16)
    covered = touched = returned = 0
    for index in range(16):
        seen: dict[int, list[int]] = {}
        areas: dict[int, list[int]] = {}
        for number in range(16):
            target = clips.target(index, number)
            assert len(target) >= 1
            assert target.masks.sum(0).max() <= 1
            assert target.masks.flatten(1).sum(1).min() >= MIN_AREA
            for key, mask in zip(target.track_ids.tolist(), target.masks, strict=True):
                seen.setdefault(key, []).append(number)
                areas.setdefault(key, []).append(int(mask.sum()))
            grown = torch.nn.functional.max_pool2d(target.masks.float(), 3, 1, 1)
            touched += bool((grown.sum(0) > 1).any()) and EVENTS[index % 4 % 3] == "touch"
        covered += any(min(a) < 0.8 * max(a) for a in areas.values()) and EVENTS[index % 4 % 3] == "cross"
        returned += any(len(n) < n[-1] - n[0] + 1 for n in seen.values()) and index % 4 >= 2
    assert covered >= 4
    assert touched >= 4
    assert returned >= 6


def test_what_is_written_is_what_is_in_memory(tmp_path):
    make_clips(tmp_path, clips=(1, 2), size=48, num_frames=3, seed=4)
    found = locate(tmp_path, "val")
    written, made = VideoDataset(found.json, found.images), ClipsDataset(2, split="val", size=48, num_frames=3, seed=4)
    assert written.categories == made.categories
    for index in range(2):
        for ours, theirs in zip(made.tracks(index), written.tracks(index), strict=True):
            assert (ours.id, ours.label, ours.area) == (theirs.id, theirs.label, theirs.area)
            assert ours.masks == theirs.masks
        assert torch.equal(made.target(index, 1).boxes, written.target(index, 1).boxes)
        assert (made.frame(index, 2).int() - written.frame(index, 2).int()).abs().float().mean() < 6


def test_wrong_numbers_are_usage_errors():
    with pytest.raises(UsageError):
        ClipsDataset(1, classes=9)
    with pytest.raises(UsageError):
        ClipsDataset(1, num_frames=0)
