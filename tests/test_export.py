"""Every package's network in other runtimes: exported, run there, compared, and predicted with."""

import copy
import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from onestage.cli.app import main
from onestage.engine import export as engine
from onestage.engine.checkpoint import WeightsInfo, save_weights
from onestage.engine.predict import Predictor
from onestage.errors import UsageError

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
OPEN = ("rdsnet", "sipmask")  # sizes too: tracing them takes longest, and the others are of the same parts
CATEGORIES = ((3, "ring"), (5, "star"), (9, "heart"))


def tiny(package):
    """The package and the smallest network that has all its parts."""
    method = import_module(f"{package}.method").METHOD
    small = method.variants[method.small_variant]
    size = replace(small.input, resize="keep_ratio", test_size=(64, 128))
    if package not in OPEN:
        size = replace(size, resize="fixed", test_size=(64, 96))
    return method, replace(small, num_classes=len(CATEGORIES), tower_depth=1, input=size)


def save(method, config, path):
    """Weights whose scores are well apart, so that rounding decides nothing; nothing is learnt."""
    torch.manual_seed(0)
    model = method.build(config).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.head.logits.weight, std=0.2)
        if hasattr(model.head, "distances"):
            torch.nn.init.constant_(model.head.distances.bias, 2.0)  # boxes of some pixels
    info = WeightsInfo(package=method.name, config=asdict(config), categories=CATEGORIES)
    save_weights(path, model.state_dict(), info)
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """`call(method, "--format", "torch")` exports the weights beside it: exit code, what --json says, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(method, *words):
        code = main(method, "export", ["--weights", "w.safetensors", "--output", "out", "--json", *words])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]), err

    return run


def variants():
    """(package, config) of every kind of decoding."""
    for package in PAPERS:
        yield package, tiny(package)[1]
    yield "sipmask", replace(tiny("sipmask")[1], rescore=True)
    yield "sipmask", replace(tiny("sipmask")[1], profile="vis", track_depth=1, track_channels=16)
    yield "meinst", replace(tiny("meinst")[1], large_kernel=3)
    yield "sprnet", replace(tiny("sprnet")[1], fusion="c33x4")
    method, config = tiny("rdsnet")
    for name in ("s", "yolact"):
        variant = method.variants[name]
        size = replace(variant.input, test_size=(96, 96))
        yield "rdsnet", replace(variant, num_classes=3, width=64, backbone=config.backbone, input=size)


@pytest.mark.parametrize(("package", "config"), list(variants()))
@torch.no_grad()
def test_dense_outputs_decode_to_what_the_model_finds(package, config):
    torch.manual_seed(0)
    config = replace(config, inference=replace(config.inference, score_threshold=0.0, max_detections=20))
    model = tiny(package)[0].build(config).eval()
    torch.nn.init.normal_(model.head.logits.weight, std=0.2)
    dense = copy.copy(model)
    object.__setattr__(dense, "raw_outputs", model.dense_outputs)
    image = torch.rand(3, 80, 110, generator=torch.Generator().manual_seed(1))
    (expected,), (found,) = model.detect([image]), dense.detect([image])
    assert len(expected) > 3
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)
    assert (found.masks.to_bool() != expected.masks.to_bool()).float().mean() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("package", PAPERS)
def test_other_runtimes_find_what_the_model_finds(package, call, tmp_path, capsys):
    method, config = tiny(package)
    weights = save(method, config, tmp_path / "w.safetensors")
    code, record, err = call(method, "--format", "both")
    assert code == 0, err
    for form in ("onnx", "torch"):
        lying, standing = record["differences"][form]
        assert lying["input_shape"] == [1, 3, 64, 96]
        assert standing["input_shape"] == ([2, 3, 96, 64] if package in OPEN else [2, 3, 64, 96])
        for difference in (lying, standing):
            assert difference["detections"] > 0
            assert difference["unpaired"] == 0
            assert difference["boxes"] <= 1e-3
            assert difference["masks"] <= 1e-4
    # Another size, from the folder alone.
    image = torch.randint(256, (3, 100, 170), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    limits = {"method": method, "device": "cpu", "score_threshold": record["score_threshold"]}
    expected = Predictor.from_weights(weights, **limits)(image)
    assert len(expected) > 0
    for runtime in ("onnx", "torch"):
        found = Predictor.from_export("out", runtime=runtime, **limits)(image)
        assert found.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
        differing = found.masks.to_bool() != expected.masks.to_bool()
        assert differing.float().mean((1, 2)).max() <= 1e-4
    to_pil_image(image).save("image.png")
    words = ["image.png", "--weights", "out", "--output", "found", "--score-thr", str(record["score_threshold"])]
    assert main(method, "predict", [*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["instances"] == len(expected)


def test_a_network_that_differs_leaves_with_6_and_the_numbers(call, tmp_path, monkeypatch):
    method, config = tiny("sais")
    save(method, config, tmp_path / "w.safetensors")
    written = torch.export.save

    def damaged(program, path):
        name = "model.head.distances.bias"  # distances are exponentials of it
        program.state_dict[name] = torch.nn.Parameter(program.state_dict[name] + 0.01)
        written(program, path)

    monkeypatch.setattr(torch.export, "save", damaged)
    words = ("--format", "torch", "--no-dynamic")
    code, record, err = call(method, *words)
    assert code == 6
    assert record["exit_code"] == 6
    assert "network.pt2 differs from the model on an input of (1, 3, 64, 96): boxes by 0." in err
    assert (tmp_path / "out" / "results.json").is_file()
    code, record, _ = call(method, *words, "--overwrite", "--no-check")
    assert (code, record["differences"]) == (0, None)
    code, _, _ = call(method, *words, "--overwrite", "--tolerance", "100", "1", "1")
    assert code == 0


def test_a_fixed_network_takes_its_size_and_refuses_others(call, tmp_path):
    method, config = tiny("meinst")
    config = replace(config, input=replace(config.input, resize="keep_ratio"))
    save(method, config, tmp_path / "w.safetensors")
    code, record, err = call(method, "--format", "torch", "--no-dynamic", "--model.input.test-size", "64", "150")
    assert code == 0, err  # compared on an image of that shape
    assert record["input"] == record["differences"]["torch"][0]["input_shape"] == [1, 3, 64, 160]
    assert "Predictor.from_export('out', runtime='torch')('photo.jpg')" in err
    code, record, err = call(method, "--format", "torch", "--no-dynamic", "--overwrite")
    assert record["input"] == [1, 3, 64, 96]
    predictor = Predictor.from_export("out", runtime="torch", method=method, score_threshold=0.0)
    assert len(predictor(torch.zeros(3, 64, 96)).boxes.T) == 4
    with pytest.raises(UsageError, match="takes pixels of 1 x 3 x 64 x 96, this batch is 1 x 3 x 96 x 64"):
        predictor(torch.zeros(3, 96, 64))


def test_categories_without_names_are_numbers(call, tmp_path):
    method, config = tiny("sais")
    save(method, config, tmp_path / "w.safetensors")
    state, info = engine.load_weights(tmp_path / "w.safetensors")
    save_weights(tmp_path / "w.safetensors", state, replace(info, categories=()))
    assert call(method, "--format", "torch", "--no-check", "--no-dynamic")[0] == 0
    found = Predictor.from_export("out", runtime="torch", method=method, score_threshold=0.0)(torch.rand(3, 64, 96))
    assert set(found.names) <= {"0", "1", "2"}
    assert found.category_ids == found.labels.tolist() != []


def test_an_opset_that_the_exporter_cannot_write_is_refused(call, tmp_path):
    method, config = tiny("sais")
    save(method, config, tmp_path / "w.safetensors")
    code, record, _ = call(method, "--no-check", "--no-dynamic", "--opset", "99")
    assert code == 2
    assert "--opset is 99" in record["error"]
    assert not (tmp_path / "out" / "network.onnx").exists()


def test_weights_of_decoding_must_be_those_of_the_model(call, tmp_path):
    method, config = tiny("meinst")
    save(method, config, tmp_path / "w.safetensors")
    assert call(method, "--format", "torch", "--no-check", "--no-dynamic")[0] == 0
    card = json.loads((tmp_path / "out" / "export.json").read_text())
    assert card["networks"] == {"torch": "network.pt2"}
    assert card["outputs"]["codes"][2] == config.num_codes
    path = tmp_path / "out" / engine.DECODE
    state, info = engine.load_weights(path)
    assert all(name.startswith("codec.") for name in state)
    save_weights(path, {}, info)
    with pytest.raises(engine.WeightsError, match="holds other weights than decoding needs"):
        Predictor.from_export("out", runtime="torch", method=method)
    save_weights(path, state, info)
    for runtime, name in (("torch", "network.pt2"), ("onnx", "network.onnx")):
        (tmp_path / "out" / name).write_bytes(b"junk")
        with pytest.raises(engine.WeightsError, match=f"cannot read 'out/{name}'"):
            Predictor.from_export("out", runtime=runtime, method=method)


def test_without_the_extra_nothing_is_written(call, tmp_path, monkeypatch):
    method, config = tiny("sipmask")
    save(method, config, tmp_path / "w.safetensors")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    code, record, _ = call(method)
    assert code == 5
    assert record["fix"] == "pip install './sipmask[export]' in the checkout"
    assert not (tmp_path / "out").exists()
