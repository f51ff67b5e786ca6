"""The stage that trains MBRM: its loss, what it learns, and that the detector stays as it is."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from onestage.cli.app import main
from onestage.data.synth import ShapesDataset, make_shapes
from onestage.engine.checkpoint import WeightsInfo, load_weights, save_weights
from onestage.errors import UsageError
from onestage.ops.edges import Profiles, refine_boxes
from onestage.structures import Detections
from rdsnet.config import DEMO, YOLACT, RefineConfig
from rdsnet.method import METHOD
from rdsnet.model import RDSNet
from rdsnet.refine import (
    RELEASED_WEIGHT,
    FitOptions,
    Observed,
    Samples,
    collect,
    coordinate_loss,
    fit,
    observe,
    train_refinement,
)

TINY = replace(
    DEMO,
    width=64,
    tower_depth=1,
    input=replace(DEMO.input, test_size=(64, 64), train_sizes=((64, 64),)),
    inference=replace(DEMO.inference, score_threshold=0.0, max_detections=5),
)


def rectangles(count=60, size=80, seed=0, blur=2):
    """Soft rectangles, and boxes that were predicted a few pixels off."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(8, 30, (count, 2), generator=generator)
    truth = torch.cat((corner, corner + torch.randint(12, 40, (count, 2), generator=generator)), 1).float()
    index = torch.arange(size, dtype=torch.float32)
    columns, rows = (
        ((index - truth[:, axis, None]) / blur + 0.75).clamp(0, 1)
        * ((truth[:, axis + 2, None] - index) / blur + 0.75).clamp(0, 1)
        for axis in (0, 1)
    )
    boxes = truth + 1.5 * torch.randn(count, 4, generator=generator)
    return Samples(Profiles(columns, rows), boxes, truth)


def test_the_loss_of_an_untrained_kernel_is_that_of_the_prior():
    sample = rectangles(1)
    weight, bias = torch.zeros(9), torch.zeros(1)
    sides = []
    for axis in (0, 1):
        deviation = max(1.0, 0.05 * float(sample.boxes[0, axis + 2] - sample.boxes[0, axis]))
        for side in (axis, axis + 2):
            prior = torch.exp(-((torch.arange(80) - sample.boxes[0, side]) ** 2) / (2 * deviation**2))
            prior[prior <= 0.0044] = 0
            probability = (prior / prior.sum())[int(sample.truth[0, side])]
            if probability > 0:
                sides.append(-probability.log())
    torch.testing.assert_close(coordinate_loss([sample], weight, bias, 0.05), torch.stack(sides).mean())


def test_images_of_several_sizes_count_as_one_batch():
    samples = [rectangles(3, 80, 1), rectangles(5, 90, 2), rectangles(2, 80, 3)]
    weight, bias = 0.1 * torch.randn(9), torch.zeros(1)
    alone = [coordinate_loss([sample], weight, bias, 0.3) for sample in samples]
    mean = sum(loss * len(sample) for loss, sample in zip(alone, samples, strict=True)) / 10
    torch.testing.assert_close(coordinate_loss(samples, weight, bias, 0.3), mean)


def test_training_finds_the_sides_of_rectangles():
    samples = [rectangles(seed=seed) for seed in range(8)]
    weight, bias = fit(samples, RefineConfig(), FitOptions(steps=300, lr=0.05))
    unseen = rectangles(seed=99)
    refined = refine_boxes(unseen.profiles, unseen.boxes, weight, bias, 0.05)
    before, after = ((boxes - unseen.truth).abs().mean() for boxes in (unseen.boxes, refined))
    assert after < 0.5 * before
    # As released: dark one pixel outside, bright one pixel inside.
    assert weight[3] < 0 < weight[5]
    assert RELEASED_WEIGHT[3] < 0 < RELEASED_WEIGHT[5]


def test_without_a_prior_there_is_nothing_to_learn():
    weight, bias = fit([rectangles()], RefineConfig(gamma=0.0, reach=2), FitOptions(steps=5))
    assert weight.shape == (5,)
    assert bias.item() == 0


def test_the_stage_refuses_images_where_nothing_trains_masks():
    config = replace(TINY, min_mask_area=64 * 64)
    options = FitOptions(steps=3, images=4, batch_size=2)
    with pytest.raises(UsageError, match="nothing to learn"):
        train_refinement(RDSNet(config), ShapesDataset(4, size=64), options)
    asked_for = replace(config, refine=RefineConfig(gamma=0.0))
    assert train_refinement(RDSNet(asked_for), ShapesDataset(4, size=64), options).inference.refine == "mbrm"


def test_the_stage_changes_ten_numbers_and_turns_refinement_on():
    torch.manual_seed(0)
    model = RDSNet(TINY).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = train_refinement(model, ShapesDataset(6, size=64), FitOptions(steps=3, images=6, batch_size=2))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"mbrm.weight", "mbrm.bias"}
    assert config == model.config == replace(TINY, inference=replace(TINY.inference, refine="mbrm"))
    assert not any(parameter.requires_grad for parameter in model.mbrm.parameters())
    assert not model.training


def test_collected_profiles_belong_to_positives_and_end_at_the_limit():
    torch.manual_seed(0)
    model = RDSNet(TINY).train()
    shapes = ShapesDataset(6, size=64)
    samples = list(collect(model, shapes, FitOptions(images=4, batch_size=2)))
    assert 1 <= len(samples) <= 4
    assert model.training
    for sample in samples:
        assert sample.profiles.columns.shape == sample.profiles.rows.shape == (len(sample), 64)
        assert ((sample.profiles.columns >= 0) & (sample.profiles.columns <= 1)).all()
        assert (sample.truth[:, 2:] > sample.truth[:, :2]).all()


def test_what_is_observed_is_what_is_detected():
    torch.manual_seed(0)
    model = RDSNet(TINY).eval()
    image, _ = ShapesDataset(1, size=64)[0]
    (seen,) = observe(model, [image])
    model.config = replace(TINY, inference=replace(TINY.inference, refine="mbrm"))
    (found,) = model.detect([image])
    assert torch.equal(found.boxes, seen.refined(model.mbrm(seen.profiles, seen.boxes)).boxes)
    assert torch.equal(found.unrefined_boxes, seen.found.boxes)


def test_sides_that_passed_each_other_change_places():
    none = torch.zeros(1, 4)
    found = Detections((64, 64), none, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    seen = Observed(found, none, Profiles(torch.zeros(1, 64), torch.zeros(1, 64)))
    assert seen.refined(torch.tensor([[20.0, 5.0, 17.0, 70.0]])).boxes.tolist() == [[18, 5, 20, 64]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", images=(4, 2), size=64)


@pytest.fixture
def weights(tmp_path, shapes):
    torch.manual_seed(0)
    info = WeightsInfo(package="rdsnet", config=asdict(TINY), categories=ShapesDataset(1).categories, recipe="none")
    path = tmp_path / "plain.safetensors"
    save_weights(path, RDSNet(TINY).state_dict(), info)
    return path


def test_the_verb_writes_weights_that_refine(weights, shapes, capsys):
    words = ["--weights", str(weights), "--data", str(shapes), "--steps", "3", "--reach", "2", "--gamma", "0.1"]
    assert main(METHOD, "train_mbrm", [*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    state, info = load_weights(result["weights"], package="rdsnet")
    assert state["mbrm.weight"].flatten().tolist() == pytest.approx(result["kernel"])
    assert len(result["kernel"]) == 5
    assert info.config["refine"] == {"reach": 2, "gamma": 0.1}
    assert info.config["inference"]["refine"] == "mbrm"
    assert "MBRM" in info.recipe
    assert main(METHOD, "train_mbrm", words) == 2  # the file exists
    assert main(METHOD, "eval", ["--weights", result["weights"], "--data", str(shapes), "--json", "-q"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"bbox/AP", "unrefined_bbox/AP", "segm/AP"} <= metrics.keys()


def test_the_sweep_has_the_baseline_in_every_row(weights, shapes, capsys, monkeypatch):
    monkeypatch.setattr("rdsnet.train_mbrm.REACHES", (1, 2))
    monkeypatch.setattr("rdsnet.train_mbrm.GAMMAS", (0.1,))
    words = ["--weights", str(weights), "--data", str(shapes), "--steps", "2", "--sweep", "--json"]
    assert main(METHOD, "train_mbrm", words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["sweep"]
    assert [(row["s"], row["gamma"]) for row in rows] == [(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)]
    assert rows[0]["AP"] == rows[2]["AP"]


def test_the_verb_refuses_what_it_cannot_refine(tmp_path, shapes, capsys):
    assert main(METHOD, "train_mbrm", ["--data", str(shapes)]) == 2
    assert "no weights" in capsys.readouterr().err
    path = tmp_path / "yolact.safetensors"
    save_weights(path, {"x": torch.zeros(1)}, WeightsInfo(package="rdsnet", config=asdict(YOLACT)))
    assert main(METHOD, "train_mbrm", ["--weights", str(path), "--data", str(shapes)]) == 4
    assert "detector 'yolact'" in capsys.readouterr().err
    info = WeightsInfo(package="rdsnet", config=asdict(replace(TINY, min_mask_area=64 * 64)))
    path = tmp_path / "unlearned.safetensors"
    save_weights(path, RDSNet(TINY).state_dict(), info)
    words = ["--weights", str(path), "--data", str(shapes), "--steps", "3"]
    assert main(METHOD, "train_mbrm", words) == 2
    assert "nothing to learn" in capsys.readouterr().err
    assert not path.with_name("unlearned_mbrm.safetensors").exists()
    assert main(METHOD, "train_mbrm", [*words, "--gamma", "0"]) == 0
