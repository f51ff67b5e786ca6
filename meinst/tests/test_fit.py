import gzip
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from meinst.codec import Encoding, MaskCodec
from meinst.config import DEMO, MEInstConfig
from meinst.fit import annotation_masks, dataset_masks, fit, prepare_codec, reconstruct
from meinst.fit_encoding import run
from meinst.model import MEInst
from onestage.data.coco import CocoDataset
from onestage.data.synth import ShapesDataset
from onestage.data.validate import read_annotations
from onestage.errors import DatasetError, UsageError, WeightsError

CONFIG = MEInstConfig(num_classes=2, mask_size=8)


def _discs(count, seed=0, size=8):
    """Discs and boxes in a grid, chunk by chunk."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for start in range(0, count, 100):
        n = min(100, count - start)
        cy, cx, radius = (torch.rand(3, n, 1, 1, generator=generator) * size).unbind()
        labels = torch.arange(n) % 2
        discs = (y - cy) ** 2 + (x - cx) ** 2 < (2 + radius / 2) ** 2
        boxes = ((y - cy).abs() < 2 + radius / 2) & ((x - cx).abs() < 2)
        yield torch.where((labels == 0)[:, None, None], discs, boxes).byte(), labels


def test_longer_codes_bring_masks_back_better():
    encodings = fit(_discs(2000), [2, 8, 32, 64], CONFIG, batch=200)
    assert [encodings[length].components.shape for length in (2, 64)] == [(1, 2, 64), (1, 64, 64)]
    ious = reconstruct(_discs(500, seed=9), list(encodings.values()), CONFIG)
    assert ious == sorted(ious)
    assert ious[0] < 0.9
    assert ious[-1] > 0.999  # as many numbers as pixels
    assert encodings[8].facts == {"noisy_logits": True, "mask_size": 8, "class_agnostic": True, "masks": 2000}


def test_without_noise_all_components_give_every_pixel_back():
    config = replace(CONFIG, noisy_logits=False)
    encodings = fit(_discs(2000), [64], config, batch=200)
    assert reconstruct(_discs(300, seed=9), [encodings[64]], config) == [1.0]


def test_components_of_a_class_fit_its_shapes_better():
    config = replace(CONFIG, class_agnostic=False)
    agnostic = fit(_discs(2000), [6], CONFIG, batch=200)[6]
    specific = fit(_discs(2000), [6], config, batch=200)[6]
    assert specific.components.shape == (2, 6, 64)
    (one,), (two,) = reconstruct(_discs(500, 9), [agnostic], CONFIG), reconstruct(_discs(500, 9), [specific], config)
    assert two > one


def test_a_class_with_too_few_masks_takes_the_components_of_all():
    config = replace(CONFIG, class_agnostic=False, num_classes=3)
    specific = fit(_discs(400), [6], config, batch=100)[6]
    agnostic = fit(_discs(400), [6], CONFIG, batch=100)[6]
    assert_close(specific.components[2], agnostic.components[0])
    assert not torch.equal(specific.components[0], specific.components[2])


@pytest.mark.parametrize("count", [5, 6])  # six masks about their mean span five directions
def test_too_few_masks_for_the_code_are_refused(count):
    with pytest.raises(DatasetError, match=f"{count} masks are too few for codes of length 6"):
        fit(_discs(count), [3, 6], CONFIG)


def test_codes_of_other_masks_stay_small_after_a_fit_on_the_fewest():
    encoding = fit(_discs(21), [20], CONFIG)[20]
    codec = MaskCodec(replace(CONFIG, code_length=20))
    codec.load(encoding)
    ((others, _),) = _discs(50, seed=9)
    assert codec.encode(others).abs().max() < 30


def test_masks_that_are_all_alike_are_refused():
    config = replace(CONFIG, noisy_logits=False)
    full = torch.ones(100, 8, 8, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    with pytest.raises(DatasetError, match="100 masks are too alike for codes of length 2"):
        fit(iter([full]), [2], config)
    assert fit(iter([full]), [2], CONFIG)[2].variance.min() > 0.01  # noise is variance enough


def test_a_class_of_as_many_masks_as_numbers_takes_the_components_of_all():
    config = replace(CONFIG, class_agnostic=False)
    ((masks, labels),) = _discs(100)
    few = [torch.cat((masks[labels == 0], masks[labels == 1][:6])), torch.tensor([0] * 50 + [1] * 6)]
    specific = fit(iter([few]), [6], config)[6]
    agnostic = fit(iter([few]), [6], CONFIG)[6]
    assert_close(specific.components[1], agnostic.components[0])
    assert not torch.equal(specific.components[0], agnostic.components[0])


@pytest.fixture
def annotations(tmp_path):
    """A bare COCO file of triangles (polygons), one crowd and one run-length mask."""
    records = []
    for i in range(40):
        x, y, side = 5 + i, 3 + i % 7, 8 + i % 13
        part = [x, y, x + side, y, x, y + side]
        records.append({"bbox": [x, y, side, side], "segmentation": [part], "category_id": 1 + i % 2, "iscrowd": 0})
    counts = [100 * 10 + 10, 20] + [80, 20] * 19 + [100 * 100 - 100 * 29 - 30]
    rle = {"size": [100, 100], "counts": counts}
    records.append({"bbox": [10, 10, 20, 20], "segmentation": rle, "category_id": 1, "iscrowd": 0})
    records.append({"bbox": [0, 0, 99, 99], "segmentation": rle, "category_id": 1, "iscrowd": 1})
    for i, record in enumerate(records):
        record |= {"id": i + 1, "image_id": 7, "area": 1.0}
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 100, "width": 100}],
        "annotations": records,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    path = tmp_path / "bare.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def test_annotations_become_masks_in_their_boxes_without_crowds(annotations):
    ((masks, labels),) = annotation_masks(read_annotations(annotations), 28)
    assert masks.shape == (41, 28, 28)
    assert masks[40].all()  # the run-length square fills its box
    assert labels.tolist() == [0, 1] * 20 + [0]
    triangle = torch.ones(28, 28, dtype=torch.uint8).triu(1).flip(1)
    assert (masks[:40] == triangle).all()


def _opened(path, folder, **options):
    """The data set of an annotation file; its images are empty files, which nothing opens."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    content["images"] += [{"id": 8, "file_name": "b.jpg", "height": 20, "width": 100}]
    square = {"bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]], "category_id": 2, "iscrowd": 0}
    content["annotations"] += [square | {"id": 50 + i, "image_id": 8, "area": 81.0} for i in range(3)]
    (folder / "two.json").write_text(json.dumps(content))
    for image in content["images"]:
        (folder / image["file_name"]).touch()
    return CocoDataset(folder / "two.json", folder, **options)


def test_only_a_data_sets_own_images_are_fitted(annotations, tmp_path):
    dataset = _opened(annotations, tmp_path)

    def count(part):
        return sum(len(masks) for masks, _ in dataset_masks(part, 28))

    assert count(dataset) == 41 + 3
    assert count(dataset.subset([1])) == 3
    assert count(dataset.subset([])) == 0
    assert count(_opened(annotations, tmp_path, min_size=50)) == 41
    (whole,) = annotation_masks(dataset.annotations, 28)
    (ours,) = dataset_masks(dataset, 28)
    assert torch.equal(ours[0], whole[0])


def test_a_handful_of_training_masks_leaves_the_cosines_and_says_so(annotations, tmp_path, caplog):
    model = MEInst(replace(DEMO, code_length=20))
    before = model.codec.components.clone()
    prepare_codec(model, _opened(annotations, tmp_path).subset([1]))
    assert torch.equal(model.codec.components, before)
    assert "3 masks are too few for codes of length 20; cosines take their place" in caplog.text


def test_the_verb_writes_a_file_that_the_model_takes(annotations, tmp_path, capsys):
    output = tmp_path / "codes.safetensors"
    words = [str(annotations), "--length", "5", "--lengths", "3", "9", "--output", str(output), "--json"]
    assert run(words) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert [row["length"] for row in result["lengths"]] == [3, 5, 9]
    assert result["masks"] == 41
    assert "mIoU" in said.err
    facts = Encoding.read(output).facts
    assert facts["annotations"] == "bare.json.gz"
    assert facts["reconstruction_error"] == result["lengths"][1]["error"]
    model = MEInst(replace(DEMO, code_length=5, encoding_file=str(output)))
    prepare_codec(model, None)
    assert_close(model.codec.components, Encoding.read(output).components[0])
    with pytest.raises(UsageError, match="exists"):
        run(words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no annotations"),
        (["x.json", "--length", "900"], "length 900 for masks of 28 x 28"),
        (["x.json", "--batch", "50"], "below the longest code"),
        (["x.json", "--lenght", "9"], "nearest: '--length'"),
    ],
)
def test_flags_that_cannot_be_used_are_named(words, problem):
    with pytest.raises(UsageError, match=problem):
        run(words)


def test_an_encoding_of_another_size_is_refused_before_training(tmp_path):
    path = tmp_path / "other.safetensors"
    fit(_discs(300), [60], CONFIG, batch=100)[60].write(path)
    with pytest.raises(WeightsError, match="encodes 64 pixels"):
        prepare_codec(MEInst(replace(DEMO, encoding_file=str(path))), None)


def test_without_a_file_the_training_masks_are_fitted():
    shapes = ShapesDataset(60)
    model = MEInst(replace(DEMO, code_length=20))
    before = model.codec.components.clone()
    prepare_codec(model, shapes)
    assert not torch.equal(model.codec.components, before)
    encoding = fit(dataset_masks(shapes, 28), [20], model.config)[20]
    assert_close(model.codec.mean, encoding.mean[0])
    (iou,) = reconstruct(dataset_masks(shapes, 28), [encoding], model.config)
    assert iou > 0.9


def test_a_model_without_an_encoding_has_nothing_to_prepare():
    prepare_codec(MEInst(replace(DEMO, encoding="none")), None)


STREAM = """
import sys, torch
from pathlib import Path
from meinst.config import MEInstConfig
from meinst.fit import fit
def peak():  # in MB; ru_maxrss would count what the process was before it became this program
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
def masks(count):
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    for start in range(0, count, 1000):
        cy, cx, r = (torch.rand(3, 1000, 1, 1) * 28).unbind()
        yield (((y - cy) ** 2 + (x - cx) ** 2 < (4 + r / 2) ** 2).byte(), torch.zeros(1000, dtype=torch.int64))
before = peak()
encoding = fit(masks(int(sys.argv[1])), [20], MEInstConfig(), batch=4096)[20]
print(encoding.facts["masks"], before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_hundred_thousand_masks_stream_through_under_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", STREAM, "100000"], capture_output=True, text=True, check=True)
    masks, before, after = map(int, done.stdout.split())
    assert masks == 100_000
    assert after < 1024  # MB of the whole process, torch included
    assert after - before < 400
