"""AP and AR of tracks, and identity switches: by hand, and equal to the official evaluation."""

import json

import numpy as np
import pytest
import torch

from onestage.data.clips import ClipsDataset
from onestage.data.validate import Video
from onestage.data.ytvis import Track, VideoDataset, mean_area
from onestage.engine.ytvis_eval import (
    VideoEvaluator,
    check_video_results,
    evaluate_tracks,
    evaluate_video_results_file,
    identity_switches,
    majority,
    sequence_iou,
    track_results,
)
from onestage.errors import DatasetError
from onestage.masks import Masks
from onestage.structures import Detections

CATEGORIES = ((4, "dog"), (9, "cat"))
SIDE = 20
# Names of the golden statistics and of ours.
NAMES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "APs", "AP_medium": "APm", "AP_large": "APl"}
NAMES |= {"AR@1": "AR1", "AR@10": "AR10", "AR@100": "AR100", "AR_small": "ARs", "AR_medium": "ARm", "AR_large": "ARl"}


def strip(x: int, width: int = 4) -> torch.Tensor:
    """[20, 20] bool: `width` full columns from x on; 20 px a column."""
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[:, x : x + width] = True
    return mask


def track(*places: int | None) -> list[dict | None]:
    return [None if x is None else Masks.from_bool(strip(x)[None]).to_rle()[0] for x in places]


def entry(label_id: int, masks: list, video: int = 1, **fields) -> dict:
    return {"image_id": video, "category_id": label_id, "masks": masks, "iscrowd": 0, **fields}


class OneVideo:
    """A set of one video with the tracks it is given."""

    name = "one"
    categories = CATEGORIES
    skipped: tuple = ()

    def __init__(self, *tracks: Track):
        self._tracks = list(tracks)
        self.videos = (Video(7, (SIDE, SIDE), len(tracks[0].masks), 1),)

    def tracks(self, video: int) -> list[Track]:
        return self._tracks


def test_iou_of_tracks_sums_over_frames_by_hand():
    true = track(0, 0, None, 0)
    found = track(0, 2, 5, None)  # all, half, beside, missing: 80 + 40 of 80 + 120 + 80 + 80 pixels
    assert sequence_iou([found], [true]) == pytest.approx(np.array([[120 / 360]]))
    assert sequence_iou([track(None, None)], [track(None, None)]).tolist() == [[0.0]]
    assert sequence_iou([], [true]).shape == (0, 1)


def test_there_may_be_hundreds_of_tracks():
    assert sequence_iou([track(0, 2)] * 256, [track(0, 0)]) == pytest.approx(np.full((256, 1), 120 / 200))


def test_the_tracks_themselves_are_ap_1():
    clips = ClipsDataset(4, size=64, num_frames=4)
    evaluator = VideoEvaluator(clips, clips.categories)
    for index in range(len(clips)):
        found = []
        for number in range(4):
            target = clips.target(index, number)
            masks = Masks.from_bool(target.masks)
            scores = torch.full((len(target),), 0.9)
            found.append(Detections((64, 64), target.boxes, scores, target.labels, masks, track_ids=target.track_ids))
        evaluator.add(index, found)
    metrics = evaluator.summarize(per_class=True)
    assert metrics["segm/AP"] == pytest.approx(1)
    assert metrics["segm/AR100"] == pytest.approx(1)
    assert metrics["segm/AP/ring"] == pytest.approx(1)
    assert metrics["identity_switches"] == 0
    assert metrics["frames_followed"] == 1


def test_a_video_without_results_counts_and_none_at_all_is_ap_0():
    clips = ClipsDataset(2, size=64, num_frames=2)
    assert VideoEvaluator(clips, clips.categories).summarize()["segm/AP"] == 0


def test_score_is_the_mean_and_category_the_majority_over_frames():
    def frame(label: int, score: float, ids: list[int]) -> Detections:
        masks = Masks.from_bool(strip(0)[None].expand(len(ids), -1, -1))
        boxes = torch.zeros(len(ids), 4)
        parts = torch.full((len(ids),), score), torch.full((len(ids),), label), masks
        return Detections((SIDE, SIDE), boxes, *parts, track_ids=torch.tensor(ids, dtype=torch.int64))

    first, second = track_results(7, [frame(1, 0.9, [0]), frame(0, 0.5, []), frame(0, 0.6, [0, 3])], (4, 9))
    assert first["score"] == pytest.approx(0.75)
    assert first["category_id"] == 4  # one frame each: the smaller label
    assert [mask is not None for mask in first["segmentations"]] == [True, False, True]
    assert [mask is not None for mask in second["segmentations"]] == [False, False, True]
    assert second["video_id"] == 7
    assert majority([1, 2, 2, 1, 0]) == 1


def test_crowds_are_neither_found_nor_missed():
    dataset = OneVideo(Track(1, 0, tuple(track(0, 0)), 80.0), Track(2, 0, tuple(track(10, 10)), 80.0, iscrowd=True))
    alone = {"video_id": 7, "category_id": 4, "score": 0.9, "segmentations": track(0, 0)}
    on_crowd = {"video_id": 7, "category_id": 4, "score": 0.95, "segmentations": track(10, 10)}
    assert evaluate_tracks(dataset, [alone, on_crowd])["segm/AP"] == pytest.approx(1)


def test_area_is_the_mean_over_the_frames_with_a_mask():
    assert mean_area([10, 30, 0]) == 20
    assert mean_area([]) == 0


def test_two_tracks_that_swap_objects_are_two_switches():
    objects = [entry(4, track(0, 0, 0, 0)), entry(4, track(10, 10, 10, 10))]
    kept = [entry(4, track(0, 0, 0, 0), score=0.9), entry(4, track(10, 10, 10, 10), score=0.8)]
    assert identity_switches(objects, kept)["identity_switches"] == 0
    swapped = [entry(4, track(0, 0, 10, 10), score=0.9), entry(4, track(10, 10, 0, 0), score=0.8)]
    counted = identity_switches(objects, swapped)
    assert counted == {"identity_switches": 2, "objects": 2, "frames_followed": 1}


def test_an_object_that_returns_under_its_number_has_not_switched():
    objects = [entry(4, track(0, None, 0, 0))]
    gap = [entry(4, track(0, None, None, 0), score=0.9)]
    assert identity_switches(objects, gap) == {"identity_switches": 0, "objects": 1, "frames_followed": 2 / 3}
    anew = [entry(4, track(0, None, None, None), score=0.9), entry(4, track(None, None, 0, 0), score=0.9)]
    assert identity_switches(objects, anew)["identity_switches"] == 1


def test_a_better_overlap_does_not_take_over_from_a_track_that_still_fits():
    objects = [entry(4, track(0, 0))]
    both = [entry(4, track(0, 1), score=0.9), entry(4, track(None, 0), score=0.9)]
    assert identity_switches(objects, both)["identity_switches"] == 0


def test_switches_are_counted_within_a_category_and_on_tracks_that_are_shown():
    objects = [entry(4, track(0, 0))]
    other = [entry(9, track(0, 0), score=0.9), entry(4, track(0, 0), score=0.1)]
    assert identity_switches(objects, other)["frames_followed"] == 0


def test_results_of_other_processes_are_merged():
    clips = ClipsDataset(1, size=64, num_frames=2)
    tracks = [{"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": list(t.masks)} for t in clips.tracks(0)]
    evaluator = VideoEvaluator(clips, clips.categories)
    evaluator.merge(tracks)
    evaluator.merge(tracks)  # the same video again replaces it
    assert len(evaluator.results()) == len(tracks)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"video_id": 8}, "has video_id 8, which the data set does not have"),
        ({"category_id": 1}, "has category_id 1; known are 4, 9"),
        ({"score": None}, "has score None"),
        ({"segmentations": track(0)}, "has 1 segmentations, video 7 has 2 frames"),
        ({"segmentations": [None, {"size": [20, 20], "counts": [1]}]}, "frame 1 has RLE runs that sum to 1"),
        ({"segmentations": [None, {"size": [9, 9], "counts": [81]}]}, "frame 1 has RLE size"),
        ({"segmentations": [None, []]}, "frame 1 is not a COCO RLE"),
        ({"segmentations": [{}, None]}, "frame 0 is not a COCO RLE"),
    ],
)
def test_a_results_file_that_does_not_fit_says_where(change, why):
    dataset = OneVideo(Track(1, 0, tuple(track(0, 0)), 80.0))
    good = {"video_id": 7, "category_id": 4, "score": 0.9, "segmentations": track(0, 0)}
    with pytest.raises(DatasetError, match="r: entry 1") as caught:
        check_video_results([good, good | change], dataset, "r")
    assert why in caught.value.what


def test_uncompressed_run_lengths_give_the_same_numbers(tmp_path):
    dataset = OneVideo(Track(1, 0, tuple(track(0, 0)), 80.0))
    plain = {"size": [20, 20], "counts": [0, 80, 320]}
    content = [{"video_id": 7, "category_id": 4, "score": 0.9, "segmentations": [plain, None]}]
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert evaluate_video_results_file(tmp_path / "r.json", dataset)["segm/AP50"] == pytest.approx(1)
    assert evaluate_video_results_file(tmp_path / "r.json", dataset)["segm/AP75"] == 0  # half of its frames


def test_statistics_of_the_official_evaluation(golden, tmp_path):
    data = golden("sipmask_ytvis_eval")
    (tmp_path / "gt.json").write_text(json.dumps(data["gt"]))
    for video in data["gt"]["videos"]:
        for name in video["file_names"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    (tmp_path / "results.json").write_text(json.dumps(data["results"]))
    metrics = evaluate_video_results_file(tmp_path / "results.json", VideoDataset(tmp_path / "gt.json", tmp_path))
    for name, expected in zip(data["stat_names"], data["stats"].tolist(), strict=True):
        assert metrics[f"segm/{NAMES[name]}"] == pytest.approx(expected, abs=1e-6), name


def test_iou_of_tracks_of_the_official_evaluation(golden):
    data = golden("sipmask_ytvis_eval")
    compared = 0
    for key, expected in data["sequence_iou_by_video_category"].items():
        if not torch.is_tensor(expected) or not expected.numel():
            continue
        video, category = map(int, key.split("_"))
        chosen = [
            [part for part in parts if (part["video_id"], part["category_id"]) == (video, category)]
            for parts in (data["results"], data["gt"]["annotations"])
        ]
        found = sorted(chosen[0], key=lambda part: -part["score"])
        ious = sequence_iou([part["segmentations"] for part in found], [p["segmentations"] for p in chosen[1]])
        np.testing.assert_allclose(ious, expected.numpy(), atol=1e-6)
        compared += 1
    assert compared
