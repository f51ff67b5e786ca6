"""Which object of the video each detection is (Sec. 3.5): MaskTrack R-CNN's score against a memory of one box, class
and embedding per object.

`associate` is one frame; `Tracker` keeps the memory between frames and forgets where it is told to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onestage.boxes import iou_matrix
from onestage.errors import UsageError
from onestage.structures import Detections
from sipmask.config import AssociationConfig
from sipmask.tracking import match_logits

LOWEST = -100.0  # what a detection must score more than to be taken for a known object


@dataclass(frozen=True)
class Memory:
    """What is remembered of K objects of one video.

    Args:
        track_ids: [K] int64.
        boxes: [K, 4] exclusive xyxy, image pixels: where each was last seen.
        labels: [K] int64, its class when it was first seen.
        embeddings: [K, D] as last seen.
        last_seen: [K] int64, number of the frame.
        frame: Frames so far.
        next_id: The id of the next new object; ids are never given twice.
    """

    track_ids: Tensor
    boxes: Tensor
    labels: Tensor
    embeddings: Tensor
    last_seen: Tensor
    frame: int = 0
    next_id: int = 0

    def __len__(self) -> int:
        return len(self.track_ids)

    @staticmethod
    def empty(like: Detections) -> Memory:
        """No object yet; types, device and D are those of some detections with embeddings."""
        assert like.embeddings is not None
        return Memory(like.labels[:0], like.boxes[:0], like.labels[:0], like.embeddings[:0], like.labels[:0])

    def __getitem__(self, keep: Tensor) -> Memory:
        """The objects that `keep` (bool or int64 index) selects."""
        return replace(
            self,
            track_ids=self.track_ids[keep],
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            embeddings=self.embeddings[keep],
            last_seen=self.last_seen[keep],
        )


@dataclass(frozen=True)
class Association:
    """What one frame came to.

    Args:
        track_ids: [N] int64 of each detection, -1 if it was dropped. An id may stand twice: the last one holds.
        scores: [N, 1 + K] of being new and of being each object that was remembered before the frame.
        memory: After the frame.
    """

    track_ids: Tensor
    scores: Tensor
    memory: Memory


@torch.no_grad()
def associate(memory: Memory, found: Detections, rules: AssociationConfig) -> Association:
    """Gives the detections of one frame their objects.

    Each detection, best score first, goes for the object it fits best in the memory as it was before the frame. An
    object is taken by whoever fits it better than those before; a detection that comes too late is dropped, neither
    new nor its second choice.

    Args:
        memory: Before the frame.
        found: N detections with embeddings, scores descending, boxes in image pixels.
        rules: Weights of the score.
    """
    assert found.embeddings is not None
    scores = matching_scores(memory, found, rules)
    best, choice = scores.max(1)
    track_ids = choice.new_full((len(found),), -1)
    taken_by = [(LOWEST, -1)] * len(memory)  # of each object: the best score so far and whose it is
    new: list[int] = []
    for detection, (score, column) in enumerate(zip(best.tolist(), choice.tolist(), strict=True)):
        if column == 0:
            track_ids[detection] = memory.next_id + len(new)
            new.append(detection)
        elif score > taken_by[column - 1][0]:
            track_ids[detection] = memory.track_ids[column - 1]
            taken_by[column - 1] = (score, detection)
    seen = [place for place, (_, detection) in enumerate(taken_by) if detection >= 0]
    by = [taken_by[place][1] for place in seen]
    return Association(track_ids, scores, _remember(memory, found, track_ids, seen, by, new))


def matching_scores(memory: Memory, found: Detections, rules: AssociationConfig) -> Tensor:
    """How well each detection fits each remembered object; column 0 is a new one.

    The log-probability of the embeddings' dot products (0 for a new object), the log of the detection score, the IoU of
    the boxes and the equality of classes, weighted. A new object has IoU 0 and an equal class.

    Returns:
        [N, 1 + K] float32.
    """
    assert found.embeddings is not None
    log_probability = match_logits(found.embeddings, memory.embeddings).log_softmax(1)
    overlap = iou_matrix(found.boxes, memory.boxes)
    same_class = (found.labels[:, None] == memory.labels).float()
    return (
        log_probability
        + rules.score_weight * found.scores.float().log()[:, None]
        + rules.iou_weight * torch.cat((overlap.new_zeros(len(found), 1), overlap), 1)
        + rules.label_weight * torch.cat((same_class.new_ones(len(found), 1), same_class), 1)
    )


def forget(memory: Memory, rules: AssociationConfig) -> Memory:
    """The memory without objects not seen for `max_age` frames, and with the `max_tracks` latest seen ones only.

    Of objects seen in the same frame the older ones stay.
    """
    if rules.max_age is not None:
        memory = memory[memory.frame - 1 - memory.last_seen <= rules.max_age]
    if rules.max_tracks is not None and len(memory) > rules.max_tracks:
        latest = memory.last_seen.argsort(descending=True, stable=True)[: rules.max_tracks]
        memory = memory[latest.sort().values]
    return memory


class Tracker:
    """Follows objects through one video, frame by frame; its memory is all it keeps.

    Args:
        rules: Weights of the score; `max_age` and `max_tracks` bound the memory.

    Raises:
        UsageError: a bound that cannot be meant.
    """

    def __init__(self, rules: AssociationConfig):
        for name, value, least in (("max_age", rules.max_age, 0), ("max_tracks", rules.max_tracks, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}", f"use {least} or more, or None to remember everything")
        self.rules = rules
        self.memory: Memory | None = None

    def reset(self) -> None:
        """Forgets everything: a new video begins, ids count from 0 again."""
        self.memory = None

    def update(self, found: Detections) -> Detections:
        """The detections of the next frame with their `track_ids`.

        Args:
            found: With embeddings, scores descending; may be empty.

        Returns:
            The detections that are an object each, in their order; no id stands twice.
        """
        memory = Memory.empty(found) if self.memory is None else self.memory
        result = associate(memory, found, self.rules)
        self.memory = forget(result.memory, self.rules)
        keep = _last_of_each(result.track_ids)
        return replace(found[keep], track_ids=result.track_ids[keep])


def _remember(
    memory: Memory, found: Detections, track_ids: Tensor, seen: list[int], by: list[int], new: list[int]
) -> Memory:
    """The memory after a frame: places `seen` take over from detections `by`, detections `new` are appended."""
    assert found.embeddings is not None
    boxes, embeddings, last_seen = memory.boxes.clone(), memory.embeddings.clone(), memory.last_seen.clone()
    boxes[seen], embeddings[seen], last_seen[seen] = found.boxes[by], found.embeddings[by], memory.frame
    return Memory(
        torch.cat((memory.track_ids, track_ids[new])),
        torch.cat((boxes, found.boxes[new])),
        torch.cat((memory.labels, found.labels[new])),
        torch.cat((embeddings, found.embeddings[new])),
        torch.cat((last_seen, track_ids.new_full((len(new),), memory.frame))),
        memory.frame + 1,
        memory.next_id + len(new),
    )


def _last_of_each(track_ids: Tensor) -> Tensor:
    """[M] int64 positions, ascending, of the last detection of each object."""
    last = {number: position for position, number in enumerate(track_ids.tolist()) if number >= 0}
    return torch.tensor(sorted(last.values()), dtype=torch.int64, device=track_ids.device)
