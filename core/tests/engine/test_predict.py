import sys
import threading
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from onestage.config import InputConfig, ScheduleConfig
from onestage.data.coco import coco_object
from onestage.engine.checkpoint import WeightsInfo, save_weights
from onestage.engine.coco_eval import CocoEvaluator
from onestage.engine.predict import Predictor, Result, find_method, to_tensor
from onestage.errors import DatasetError, MachineError, UsageError, WeightsError
from onestage.masks import Masks
from onestage.method import Method
from onestage.structures import Detections


@dataclass(frozen=True, kw_only=True)
class Inference:
    score_threshold: float = 0.5
    max_detections: int = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    num_classes: int = 2
    input: InputConfig = field(default_factory=InputConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    inference: Inference = field(default_factory=Inference)


class FourCorners(torch.nn.Module):
    """Finds the image's four quarters with scores 0.9, 0.7, 0.5, 0.3 as far as its config lets it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def detect(self, images, masks=True):
        assert not self.training
        return [self.quarters(*image.shape[-2:]) for image in images]

    def quarters(self, height, width):
        h, w = height // 2, width // 2
        windows = torch.tensor([[0, 0, w, h], [w, 0, 2 * w, h], [0, h, w, 2 * h], [w, h, 2 * w, 2 * h]])
        masks = Masks((height, width), windows, torch.ones(4 * h * w, dtype=torch.bool))
        scores, labels = torch.tensor([0.9, 0.7, 0.5, 0.3]), torch.tensor([0, 1, 0, 1])
        found = Detections((height, width), windows.float(), scores, labels, masks)
        return found[scores >= self.config.inference.score_threshold][: self.config.inference.max_detections]


METHOD = Method(
    name="corners",
    title="",
    config_type=Config,
    variants={},
    default_variant="",
    small_variant="",
    demo_variant="",
    build=FourCorners,
    convert=lambda state, config: (state, []),
    infer_config=lambda state: Config(),
)
CATEGORIES = ((5, "cat"), (9, "dog"))


@pytest.fixture
def weights(tmp_path):
    info = WeightsInfo(package="corners", config=asdict(Config()), categories=CATEGORIES)
    save_weights(tmp_path / "w.safetensors", {"weight": torch.zeros(1)}, info)
    return tmp_path / "w.safetensors"


@pytest.fixture
def predictor(weights):
    return Predictor.from_weights(weights, method=METHOD, device="cpu", score_threshold=0.0)


def test_a_result_by_hand(predictor):
    result = predictor(torch.zeros(3, 8, 6, dtype=torch.uint8))
    assert len(result) == 4
    assert result.boxes.tolist() == [[0, 0, 3, 4], [3, 0, 6, 4], [0, 4, 3, 8], [3, 4, 6, 8]]
    assert result.names == ["cat", "dog", "cat", "dog"]
    assert result.category_ids == [5, 9, 5, 9]
    assert result.scores.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3])
    assert result.masks.to_bool().sum((1, 2)).tolist() == [12] * 4
    entry = result.to_coco(image_id=17)[1]
    assert entry["image_id"] == 17
    assert entry["category_id"] == 9
    assert entry["bbox"] == [3, 0, 3, 4]
    assert entry["segmentation"] == result.rle[1]


def test_entries_of_a_result_are_those_of_evaluation(predictor):
    result = predictor(torch.zeros(3, 8, 6, dtype=torch.uint8))
    detections = replace(result.detections, mask_scores=result.scores.flip(0))
    categories = list(enumerate("abc"))
    evaluator = CocoEvaluator(coco_object([{"id": 17, "height": 8, "width": 6}], [], categories), categories)
    evaluator.add(17, detections)
    assert Result(detections, tuple(categories)).to_coco(17) == evaluator.results()


@pytest.mark.parametrize("keep", [slice(1, 3), torch.tensor([False, True, True, False]), torch.tensor([1, 2])])
def test_results_can_be_sliced(predictor, keep):
    part = predictor(torch.zeros(3, 8, 6))[keep]
    assert isinstance(part, Result)
    assert part.names == ["dog", "cat"]
    assert len(part.rle) == 2


def test_one_instance_by_index(predictor):
    result = predictor(torch.zeros(3, 8, 6))
    assert result[-1].names == ["dog"]
    with pytest.raises(IndexError):
        result[4]
    assert [len(one) for one in result] == [1, 1, 1, 1]


def test_every_form_of_image_gives_the_same(predictor, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    results = predictor([str(path), path, Image.fromarray(pixels), pixels, tensor, tensor / 255])
    assert len({str(result.boxes.tolist()) + str(result.rle) for result in results}) == 1
    for source in (path, Image.fromarray(pixels), pixels):
        assert torch.equal(to_tensor(source), tensor)


def test_a_picture_of_16_bit_grey_is_the_same_from_its_file_and_from_memory(tmp_path):
    grey = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(8, 6) * 1024)
    grey.save(tmp_path / "grey.png")
    assert to_tensor(grey)[0].flatten()[[0, 1, 47]].tolist() == [0, 4, 188]
    assert torch.equal(to_tensor(grey), to_tensor(tmp_path / "grey.png"))


def test_a_result_without_masks_has_entries_and_is_drawn(predictor, monkeypatch):
    image = torch.full((3, 80, 60), 100, dtype=torch.uint8)
    found = predictor(image)
    result = Result(replace(found.detections, masks=None), CATEGORIES)
    assert (result.masks, result.rle) == (None, None)
    entries = [dict(entry) for entry in found.to_coco(1)]
    assert result.to_coco(1) == [{k: v for k, v in e.items() if k != "segmentation"} for e in entries]
    assert torch.equal(result.draw(image, boxes=False), image)
    assert not torch.equal(result[:2].draw(image), image)
    module = ModuleType("supervision")
    module.Detections = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "supervision", module)
    assert result.to_supervision()["mask"] is None


def test_orientation_tags_are_applied(predictor, tmp_path):
    image = Image.new("RGB", (6, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert predictor(tmp_path / "turned.jpg").image_size == (6, 8)
    assert predictor(Image.open(tmp_path / "turned.jpg")).image_size == (6, 8)


def test_a_low_threshold_reaches_the_model_and_a_high_one_filters(weights):
    def count(**options):
        predictor = Predictor.from_weights(weights, method=METHOD, device="cpu", **options)
        return len(predictor(torch.zeros(3, 8, 6)))

    assert count(score_threshold=0.2) == 4  # below the 0.5 of the config
    assert count(score_threshold=0.6) == 2
    assert count(score_threshold=0.2, max_detections=1) == 1
    assert count() == 4


def test_drawing_colours_the_masks_and_only_them(predictor):
    image = torch.full((3, 8, 6), 100, dtype=torch.uint8)
    result = predictor(image)
    drawn = result[:1].draw(image, opacity=1.0, boxes=False)
    assert drawn.dtype == torch.uint8
    assert drawn[:, 0, 0].tolist() == [230, 60, 60]
    assert (drawn[:, 4:] == 100).all()
    assert (image == 100).all()
    assert not torch.equal(result.draw(image), image)
    assert torch.equal(result[:0].draw(image), image)
    with pytest.raises(UsageError, match="draw on the image that was predicted"):
        result.draw(image[:, :4])


def test_threads_may_share_a_predictor(predictor):
    image, found = torch.zeros(3, 8, 6), []
    threads = [threading.Thread(target=lambda: found.append(predictor(image).boxes)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(boxes, found[0]) for boxes in found)


def test_nothing_that_is_not_an_image_passes(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(DatasetError, match=r"text\.jpg"):
        predictor(tmp_path / "text.jpg")
    with pytest.raises(DatasetError, match="does not exist"):
        predictor(tmp_path / "nothing.jpg")
    with pytest.raises(UsageError, match="cannot be a dict"):
        predictor({})
    for shape in ((8, 6), (1, 8, 6), (3, 0, 6)):
        with pytest.raises(UsageError, match="image tensor is"):
            predictor(torch.zeros(shape))
    with pytest.raises(UsageError, match="image array is"):
        predictor(np.zeros((8, 6, 2), dtype=np.uint8))


def test_images_over_the_limit_are_refused(weights, tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    predictor = Predictor.from_weights(weights, method=METHOD, device="cpu", max_pixels=9999)
    with pytest.raises(DatasetError, match=r"large\.png"):
        predictor(tmp_path / "large.png")


def test_methods_are_found_by_name_and_never_imported_unannounced(weights, monkeypatch):
    with pytest.raises(WeightsError, match="belong to the package 'corners', which is not installed"):
        Predictor.from_weights(weights)
    module = ModuleType("corners.method")
    module.METHOD = METHOD
    monkeypatch.setitem(sys.modules, "corners.method", module)
    assert find_method("corners") is METHOD
    assert Predictor.from_weights(weights, device="cpu").categories == CATEGORIES
    with pytest.raises(WeightsError):
        find_method("os")


def test_weights_of_another_method_are_refused(weights):
    with pytest.raises(WeightsError, match="belong to corners, not to other"):
        Predictor.from_weights(weights, method=replace(METHOD, name="other"))


def test_supervision_is_optional(predictor, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MachineError, match="supervision is not installed"):
        predictor(torch.zeros(3, 8, 6)).to_supervision()


def test_supervision_gets_boxes_masks_and_names(predictor, monkeypatch):
    module = ModuleType("supervision")
    module.Detections = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "supervision", module)
    found = predictor(torch.zeros(3, 8, 6)).to_supervision()
    assert found["mask"].shape == (4, 8, 6)
    assert found["class_id"].tolist() == [0, 1, 0, 1]
    assert found["data"]["class_name"].tolist() == ["cat", "dog", "cat", "dog"]
