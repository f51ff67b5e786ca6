import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from onestage.errors import UsageError
from onestage.structures import Detections
from sipmask.association import Memory, Tracker, associate, forget
from sipmask.config import PUBLISHED_ASSOCIATION as PUBLISHED

BOX = (0.0, 0.0, 10.0, 10.0)
PLACES = [(12.0 * i, 0.0, 12.0 * i + 10.0, 10.0) for i in range(8)]  # the first is BOX


def _found(*rows):
    """Detections from (box, score, label, embedding direction 0..7)."""
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    embeddings = 2.0 * torch.eye(8)[[row[3] for row in rows]].reshape(-1, 8)
    labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    return Detections((100, 100), boxes, torch.tensor([row[1] for row in rows]), labels, embeddings=embeddings)


def _ids(tracker, *rows):
    return tracker.update(_found(*rows)).track_ids.tolist()


def _object(number, score=0.9, label=0):
    """An object of its own place and looks."""
    return PLACES[number], score, label, number


def test_the_score_by_hand():
    memory = associate(Memory.empty(_found()), _found((BOX, 0.8, 1, 0)), PUBLISHED).memory
    half = (0.0, 0.0, 10.0, 5.0)  # IoU 0.5 with what is remembered
    result = associate(memory, _found((half, 0.5, 1, 0), (BOX, 0.4, 2, 1)), PUBLISHED)
    similar = math.log(1 + math.exp(4.0))
    expected = [
        [0 - similar + math.log(0.5) + 10, 4.0 - similar + math.log(0.5) + 2 * 0.5 + 10],
        [-math.log(2) + math.log(0.4) + 10, -math.log(2) + math.log(0.4) + 2],
    ]
    assert_close(result.scores, torch.tensor(expected), atol=1e-4, rtol=0)
    assert result.track_ids.tolist() == [0, 1]
    assert result.memory.boxes[0].tolist() == list(half)


def test_objects_keep_their_ids_through_a_gap_and_a_new_one_counts_on():
    tracker = Tracker(PUBLISHED)
    assert _ids(tracker, _object(0), _object(1, 0.8)) == [0, 1]
    assert _ids(tracker) == []
    assert _ids(tracker, _object(2), _object(1, 0.8), _object(0, 0.7)) == [2, 1, 0]


def test_a_better_late_comer_takes_the_id_and_a_worse_one_is_dropped():
    memory = associate(Memory.empty(_found()), _found((BOX, 0.9, 0, 0)), PUBLISHED).memory
    away = (60.0, 60.0, 70.0, 70.0)
    rows = [(away, 0.9, 0, 0), (BOX, 0.8, 0, 0), (BOX, 0.7, 0, 0)]
    assert associate(memory, _found(*rows), PUBLISHED).track_ids.tolist() == [0, 0, -1]
    tracker = Tracker(PUBLISHED)
    tracker.update(_found((BOX, 0.9, 0, 0)))
    followed = tracker.update(_found(*rows))
    assert followed.track_ids.tolist() == [0]
    assert followed.scores.tolist() == pytest.approx([0.8])
    assert tracker.memory.boxes.tolist() == [list(BOX)]


def test_an_object_of_another_class_is_new_and_the_first_class_stays():
    tracker = Tracker(PUBLISHED)
    tracker.update(_found((BOX, 0.9, 0, 0)))
    assert _ids(tracker, (BOX, 0.9, 1, 0)) == [1]
    assert tracker.memory.labels.tolist() == [0, 1]


def test_a_new_video_starts_from_nothing_even_if_its_first_frame_is_empty():
    tracker = Tracker(PUBLISHED)
    tracker.update(_found((BOX, 0.9, 0, 0)))
    tracker.reset()
    assert _ids(tracker) == []
    assert _ids(tracker, (BOX, 0.9, 0, 0), (BOX, 0.8, 0, 1)) == [0, 1]


def test_nothing_is_forgotten_as_published():
    tracker = Tracker(PUBLISHED)
    tracker.update(_found((BOX, 0.9, 0, 0)))
    for _ in range(50):
        _ids(tracker)
    assert _ids(tracker, (BOX, 0.9, 0, 0)) == [0]


@pytest.mark.parametrize(("gap", "expected"), [(1, 0), (2, 0), (3, 1)])
def test_an_object_that_is_away_for_longer_than_max_age_comes_back_as_another(gap, expected):
    tracker = Tracker(replace(PUBLISHED, max_age=2))
    tracker.update(_found((BOX, 0.9, 0, 0)))
    for _ in range(gap):
        _ids(tracker)
    assert _ids(tracker, (BOX, 0.9, 0, 0)) == [expected]


def test_max_tracks_keeps_the_latest_seen_and_ids_are_not_given_twice():
    tracker = Tracker(replace(PUBLISHED, max_tracks=2))
    assert _ids(tracker, _object(0)) == [0]
    assert _ids(tracker, _object(1)) == [1]
    assert _ids(tracker, _object(0)) == [0]
    assert _ids(tracker, _object(2)) == [2]  # 1 was seen the longest ago
    assert tracker.memory.track_ids.tolist() == [0, 2]
    assert _ids(tracker, _object(1)) == [3]


def test_memory_of_a_bounded_tracker_does_not_grow():
    tracker = Tracker(replace(PUBLISHED, max_age=5, max_tracks=3))
    for frame in range(100):
        tracker.update(_found(*(_object((frame + i) % 8, 0.9 - 0.1 * i, (frame + i) % 7) for i in range(5))))
        assert len(tracker.memory) <= 3
        assert tracker.memory.embeddings.untyped_storage().nbytes() <= 3 * 8 * 4


def test_equally_old_objects_go_by_their_age():
    memory = associate(Memory.empty(_found()), _found(*(_object(i) for i in range(4))), PUBLISHED).memory
    assert forget(memory, replace(PUBLISHED, max_tracks=3)).track_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("change", [{"max_age": -1}, {"max_tracks": 0}])
def test_a_bound_that_cannot_be_meant_is_refused(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        Tracker(replace(PUBLISHED, **change))
