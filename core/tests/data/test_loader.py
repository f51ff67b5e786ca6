"""Order, augmentation and workers."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.config import CAFFE_MEAN, InputConfig
from onestage.data import loader
from onestage.data.loader import ResumableSampler, augment, expand_and_crop, make_loader, random_flip
from onestage.data.synth import ShapesDataset
from onestage.errors import DatasetError, UsageError
from onestage.structures import Reference, Target

SHAPES = ShapesDataset(10, size=64)
SSD = InputConfig(augmentation="ssd")
RATIOS = [2.0, 0.5, 2.0, 0.5, 2.0, 2.0, 0.5, 1.0, 2.0, 2.0]


def indices(sampler: ResumableSampler) -> list[list[int]]:
    return [[index for _, index in batch] for batch in sampler]


def sample() -> tuple[torch.Tensor, Target]:
    """A 6 x 8 px image (height, width) with an instance of 2 x 3 px from x = 1, y = 2."""
    masks = torch.zeros(1, 6, 8, dtype=torch.uint8)
    masks[0, 2:5, 1:3] = 1
    image = torch.full((3, 6, 8), 10, dtype=torch.uint8)
    image[:, 2:5, 1:3] = 200
    boxes = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    polygons = (((1.0, 2.0, 3.0, 2.0, 3.0, 5.0),),)
    return image, Target(boxes, torch.tensor([4]), masks, torch.tensor([False]), 9, polygons)


def seeded(change: Any, seed: int, *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return change(*args)


def test_an_epoch_holds_every_image_and_repeats_only_to_fill_the_last_batch():
    sampler = ResumableSampler(np.ones(10), 4)
    assert len(sampler) == 3
    batches = indices(sampler)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert sorted({index for batch in batches for index in batch}) == list(range(10))


def test_wide_and_other_images_are_batched_apart_but_for_the_rest():
    # 6 wide images and 4 others in batches of 2: all full.
    for batch in indices(ResumableSampler(RATIOS, 2)):
        assert len({RATIOS[index] > 1 for index in batch}) == 1
    # In batches of 4: one of each kind, and a mixed one with two images repeated.
    kinds = sorted(sum(RATIOS[index] > 1 for index in batch) for batch in indices(ResumableSampler(RATIOS, 4)))
    assert kinds[0] == 0
    assert kinds[2] == 4


def test_epochs_differ_and_seeds_repeat_them():
    sampler = ResumableSampler(RATIOS, 2, seed=3)
    first, second = indices(sampler), indices(sampler)
    assert first != second
    again = ResumableSampler(RATIOS, 2, seed=3)
    assert [indices(again), indices(again)] == [first, second]
    assert indices(ResumableSampler(RATIOS, 2, seed=4)) != first


def test_items_carry_their_epoch():
    sampler = ResumableSampler(RATIOS, 5)
    assert {epoch for batch in sampler for epoch, _ in batch} == {0}
    assert {epoch for batch in sampler for epoch, _ in batch} == {1}


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    ratios=st.lists(st.sampled_from([0.5, 2.0]), min_size=1, max_size=30),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 3),
    taken=st.integers(0, 12),
)
def test_a_resumed_sampler_goes_on_exactly_on_every_rank(ratios, batch_size, world, taken):
    seen = []
    for rank in range(world):
        whole = ResumableSampler(ratios, batch_size, seed=1, rank=rank, world=world)
        epochs = [batch for _ in range(13) for batch in whole]
        epoch, batch = divmod(taken, len(whole))
        resumed = ResumableSampler(ratios, batch_size, seed=1, rank=rank, world=world)
        resumed.load_state_dict({"epoch": epoch, "batch": batch})
        assert [*resumed, *resumed] == epochs[taken : (epoch + 2) * len(whole)]
        seen += [index for batch in epochs[: len(whole)] for _, index in batch]
    assert set(seen) == set(range(len(ratios)))
    assert len(seen) == len(whole) * batch_size * world


def test_the_state_is_the_next_batch():
    sampler = ResumableSampler(RATIOS, 2)
    batches = iter(sampler)
    next(batches), next(batches)
    assert sampler.state_dict() == {"epoch": 0, "batch": 2}


def test_flip_by_hand():
    image, target = sample()
    flipped = [seeded(random_flip, seed, image, target) for seed in range(8)]
    mirrored = [(i, t) for i, t in flipped if not torch.equal(i, image)]
    assert 0 < len(mirrored) < 8
    i, t = mirrored[0]
    assert torch.equal(i, image.flip(-1))
    assert t.boxes.tolist() == [[5, 2, 7, 5]]
    assert torch.equal(t.masks[0] == 1, i[0] == 200)
    assert t.polygons == (((7.0, 2.0, 5.0, 2.0, 5.0, 5.0),),)
    assert t.image_id == 9


def pair() -> tuple[torch.Tensor, Target]:
    image, target = sample()
    other = Reference(image.roll(3, -1), target.boxes + torch.tensor([3.0, 0.0, 3.0, 0.0]), torch.tensor([5]))
    return image, replace(target, track_ids=torch.tensor([5]), reference=other)


def test_both_frames_of_a_pair_are_mirrored_together():
    image, target = pair()
    for seed in range(8):
        i, t = seeded(random_flip, seed, image, target)
        mirrored = not torch.equal(i, image)
        assert t.boxes.tolist() == ([[5, 2, 7, 5]] if mirrored else [[1, 2, 3, 5]])
        assert t.reference.boxes.tolist() == ([[2, 2, 4, 5]] if mirrored else [[4, 2, 6, 5]])
        assert torch.equal(t.reference.image, target.reference.image.flip(-1) if mirrored else target.reference.image)
        assert t.track_ids.tolist() == t.reference.track_ids.tolist() == [5]


def test_a_pair_cannot_be_cropped():
    with pytest.raises(UsageError, match="pairs of frames"):
        augment(SSD)(*pair())


def test_what_a_data_set_draws_follows_from_seed_epoch_and_image():
    class Drawing(ShapesDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
            image, target = super().__getitem__(index)
            return image, replace(target, image_id=int(torch.randint(1 << 30, ())))

    def drawn(epoch: int, seed: int) -> list[int]:
        loaded = loader.AugmentedDataset(Drawing(3, size=64), augment(InputConfig(augmentation="none")), seed)
        return [loaded[epoch, index][1].image_id for index in range(3)]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({*drawn(0, 0), *drawn(1, 0), *drawn(0, 1)}) == 9


def test_expanding_and_cropping_moves_everything_alike():
    image, target = sample()
    sizes = set()
    for seed in range(40):
        changed, moved = seeded(expand_and_crop, seed, image, target, (1, 2, 3))
        sizes.add(tuple(changed.shape))
        assert len(moved) == 1  # the only instance's centre must stay inside
        assert torch.equal(moved.masks[0] == 1, changed[0] == 200)
        x1, y1, x2, y2 = moved.boxes[0].int().tolist()
        assert (changed[0, y1:y2, x1:x2] == 200).all()
        assert int((changed[0] == 200).sum()) == (x2 - x1) * (y2 - y1)
        outside = (changed[0] != 200) & (changed[0] != 10)
        assert (changed[:, outside] == torch.tensor([[1], [2], [3]])).all()
        x, y = moved.polygons[0][0][:2]
        assert max(x, 0) == x1
        assert max(y, 0) == y1
    assert len(sizes) > 20
    assert max(size[1] for size in sizes) > 6
    assert min(size[1] for size in sizes) < 6


def test_every_box_keeps_the_drawn_iou_with_the_crop(monkeypatch):
    monkeypatch.setattr(loader, "CROP_MODES", (0.7,))
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 90, 100], [10, 0, 100, 100]])
    target = Target(boxes, torch.zeros(2).long(), torch.ones(2, 100, 100).byte(), torch.zeros(2).bool())
    for seed in range(20):
        window = seeded(loader._random_crop, seed, (0, 0, 100, 100), boxes, True)
        assert loader.box_iou(boxes, torch.tensor([window]).float()).min() >= 0.7
        assert 0.5 <= (window[3] - window[1]) / (window[2] - window[0]) <= 2
    assert len(seeded(expand_and_crop, 0, image[:, :, :], target, (0, 0, 0))[1]) == 2


def test_yolacts_crop_is_held_to_a_centre_and_to_no_iou(monkeypatch):
    monkeypatch.setattr(loader, "CROP_MODES", (None, 0.9))
    image, target = sample()
    target = replace(target, boxes=torch.tensor([[1.0, 2.0, 2.0, 3.0]]))  # a pixel: no crop has that IoU with it
    cropped = {}
    for name in ("ssd", "yolact"):
        made = [seeded(augment(replace(SSD, augmentation=name)), seed, image, target) for seed in range(20)]
        assert all(len(moved) == 1 for _, moved in made)
        cropped[name] = sum(changed.shape[-1] < 8 for changed, _ in made)
    assert cropped["ssd"] == 0 < cropped["yolact"]


def test_instances_whose_centre_is_cut_off_are_dropped():
    image, target = sample()
    _, left = loader._cut(image, target, (2, 0, 8, 6), (0, 0, 0))  # the centre is x = 2, on the edge
    assert len(left) == 0
    _, left = loader._cut(image, target, (1, 0, 8, 6), (0, 0, 0))
    assert left.boxes.tolist() == [[0, 2, 2, 5]]


def test_images_without_instances_can_be_augmented():
    image, target = sample()
    empty = target[torch.tensor([False])]
    for seed in range(20):
        _, moved = seeded(augment(SSD), seed, image, empty)
        assert moved.masks.shape[0] == 0


def test_the_canvas_is_filled_with_the_mean_in_rgb():
    config = replace(SSD, channel_order="bgr", mean=CAFFE_MEAN)
    image, target = sample()
    corners = {tuple(seeded(augment(config), seed, image, target)[0][:, 0, 0].tolist()) for seed in range(30)}
    assert (123, 116, 103) in corners


@pytest.mark.parametrize("augmentation", ["flip", "ssd", "yolact"])
def test_batches_do_not_depend_on_workers_or_on_the_global_random_state(augmentation):
    config = InputConfig(augmentation=augmentation)

    def batches(workers: int, start: int = 0) -> list[Any]:
        torch.rand(workers + 1)
        made = make_loader(SHAPES, config, batch_size=3, training=True, workers=workers, seed=5)
        made.batch_sampler.load_state_dict({"epoch": 2, "batch": start})
        return list(made)

    alone, apart = batches(0), batches(2)
    assert len(alone) == 4
    for (images, targets), (others, other_targets) in zip(alone, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        assert all(torch.equal(a.masks, b.masks) for a, b in zip(targets, other_targets, strict=True))
        assert [t.image_id for t in targets] == [t.image_id for t in other_targets]
    resumed = batches(0, start=2)
    assert torch.equal(resumed[0][0][0], alone[2][0][0])


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(make_loader(SHAPES, InputConfig(), batch_size=3, training=True))
    # A DataLoader itself draws one base seed.
    torch.set_rng_state(before)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    list(make_loader(SHAPES, InputConfig(), batch_size=3, training=True))
    assert torch.equal(torch.get_rng_state(), expected)


def test_an_image_looks_different_in_another_epoch():
    made = make_loader(SHAPES.subset([0]), SSD, batch_size=1, training=True)
    shapes = {tuple(image.shape) for _ in range(6) for images, _ in made for image in images}
    assert len(shapes) > 1


def test_evaluation_takes_every_image_once_in_order_and_unchanged():
    ids = []
    for rank in range(3):
        for images, targets in make_loader(SHAPES, SSD, batch_size=2, training=False, rank=rank, world=3):
            ids += [target.image_id for target in targets]
            assert torch.equal(images[0], SHAPES[targets[0].image_id - 1][0])
    assert ids == [1, 4, 7, 10, 2, 5, 8, 3, 6, 9]


class Broken(ShapesDataset):
    def __getitem__(self, index: int) -> Any:
        raise DatasetError("image 'a.jpg' cannot be read", "replace the file")


@pytest.mark.parametrize(("training", "workers"), [(True, 0), (True, 1), (False, 0)])
def test_a_users_error_arrives_as_it_was_raised(training, workers):
    made = make_loader(Broken(4), InputConfig(), batch_size=2, training=training, workers=workers)
    with pytest.raises(DatasetError) as error:
        next(iter(made))
    assert error.value.what == "image 'a.jpg' cannot be read"
    assert error.value.fix == "replace the file"


@pytest.mark.skipif(sys.platform != "linux", reason="the others do not tell who sent a signal")
def test_a_worker_obeys_the_sigterm_of_the_main_process_alone():
    made = make_loader(SHAPES, InputConfig(), batch_size=2, training=True, workers=1)
    batches = iter(made)
    next(batches)
    (worker,) = made._iterator._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
