import torch

from onestage.nn.retinanet import IGNORED, NEGATIVE, STRIDES, Assignment, anchors
from onestage.structures import ImageFrame, Target
from rdsnet.config import R50
from rdsnet.decode import own_padded_size
from rdsnet.model import RawOutput
from rdsnet.targets import RDSNetTargets, anchors_in, assign_targets, mask_instances

SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]


def test_cells_beyond_an_image_have_no_anchors_there():
    every = anchors(SIZES, STRIDES, legacy=True)
    inside = anchors_in((96, 64), SIZES, every).view(-1, 9)
    assert (inside == inside[:, :1]).all()
    counts = [int(level.sum()) for level in inside[:, 0].split([h * w for h, w in SIZES])]
    assert counts == [12 * 8, 6 * 4, 3 * 2, 2 * 1, 1]


def test_the_canvas_an_image_would_have_had_alone():
    frame = ImageFrame((100, 80), (120, 96), (160, 128), (1.2, 1.2))
    assert own_padded_size(frame, R50) == (128, 96)


def test_every_instance_has_an_anchor_and_small_ones_train_no_mask():
    every = anchors(SIZES, STRIDES, legacy=True)
    raw = RawOutput(torch.zeros(1, len(every), 80), torch.zeros(1, len(every), 4), every, SIZES, [], None)
    boxes = torch.tensor([[3.0, 5.0, 8.0, 9.0], [30.0, 20.0, 90.0, 77.0]])
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    masks[0, 5:10, 3:9] = 1
    masks[1, 20:78, 30:91] = 1
    target = Target(boxes, torch.tensor([7, 3]), masks, torch.zeros(2, dtype=torch.bool))
    frame = ImageFrame((128, 128), (128, 128), (128, 128), (1.0, 1.0))
    targets = assign_targets([target], [frame], raw, R50)
    assert set(targets.anchors.index.flatten().tolist()) == {NEGATIVE, IGNORED, 0, 1}
    assert set(targets.anchors.labels[targets.anchors.index == 0].tolist()) == {7}
    assert set(targets.anchors.labels[targets.anchors.index == 1].tolist()) == {3}
    assert targets.trains_mask[0].tolist() == [False, True]
    chosen = mask_instances(targets, 0, R50)
    assert set(targets.anchors.index[0, chosen].tolist()) == {1}


def test_of_many_positives_some_are_drawn():
    index = torch.zeros(1, 300, dtype=torch.int64)
    targets = RDSNetTargets(Assignment(index, index), [], [], [torch.tensor([True])])
    torch.manual_seed(0)
    first, second = (mask_instances(targets, 0, R50) for _ in range(2))
    assert len(first) == len(first.unique()) == R50.masks_per_image
    assert not torch.equal(first.sort().values, second.sort().values)
