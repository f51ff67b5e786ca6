"""The whole-image benchmark with the packages' small models: equal work is what it claims, and what it asserts."""

import json
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
IMAGE = torch.randint(256, (3, 128, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import images

    monkeypatch.setattr(images, "NUM_CANDIDATES", 200)
    return images


@torch.no_grad()
@pytest.mark.parametrize("package", PAPERS)
def test_the_same_number_of_candidates_enters_nms(package, images):
    model = images.lively(f"{package}:demo", IMAGE)
    assert images.admit(model, IMAGE) == 200
    with images.counted_candidates() as counts:
        (found,) = model.detect([IMAGE])
    assert counts == [200]  # the threshold stays, and NMS works again
    filled = float(found.masks.area().sum()) / float(images.box_areas(found.boxes).sum())
    assert 0.02 < filled < 0.98


@torch.no_grad()
def test_in_bfloat16_about_as_many_enter(images):
    with torch.autocast("cpu", torch.bfloat16):
        model = images.lively("sipmask:demo", IMAGE)
        count = images.admit(model, IMAGE)
        torch.clear_autocast_cache()  # a cast weight from before it was scaled would be noticed
        with images.counted_candidates() as counts:
            model.detect([IMAGE], masks=False)
    assert abs(count - 200) <= 20
    assert counts == [count]


@torch.no_grad()
def test_a_run_records_times_stages_and_ratios(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "NUM_INSTANCES", 20)
    config = import_module("sais.method").METHOD.variants["demo"]
    limited = replace(config, inference=replace(config.inference, max_detections=20))
    monkeypatch.setitem(import_module("sais.method").METHOD.variants, "demo", limited)
    size = ["--image-size", "128", "160"]
    arguments = ["--models", "sais:demo", "--peers", "--rounds", "1", *size, "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["images.py", *arguments])
    images.main()
    (file,) = tmp_path.glob("*.json")
    (row,) = json.loads(file.read_text())["results"]
    assert list(row["stages_ms"]) == ["preprocess", "network", "boxes", "masks", "bool", "rle"]
    assert row["candidates"] == 200
    assert "by stage" in capsys.readouterr().out


def test_a_run_that_is_ended_leaves_the_models_and_rounds_it_has(images, tmp_path, monkeypatch, capsys):
    counts = {"a": 0, "b": 0}

    def side(name, *_):
        def call():
            counts[name] += 1
            if counts["b"] == 5:  # warm-up, first look, one round, and then
                raise KeyboardInterrupt

        return images.Side(name, {"boxes": call}, 200, 100, 1.0, None)

    monkeypatch.setattr(images, "own_side", side)
    monkeypatch.setattr("sys.argv", ["images.py", "--models", "a", "b", "--peers", "--output", str(tmp_path)])
    records = []
    monkeypatch.setattr(images, "write_record", lambda *how: records.append(json.dumps(how[-1])))
    with pytest.raises(KeyboardInterrupt):
        images.main()
    records = [json.loads(record) for record in records]
    assert [record["protocol"]["rounds"] for record in records] == [0, 0, 1]
    assert [[row["model"] for row in record["results"]] for record in records] == [["a"], ["a", "b"], ["a", "b"]]
    assert "a                ms: boxes" in capsys.readouterr().out


def test_only_waits_are_counted_as_waits(images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        torch.cuda,
        "set_sync_debug_mode",
        lambda mode: warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=1,
        ),
    )
    assert images.synchronisations(lambda: None) == 0
    wait = lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # noqa: E731
    assert images.synchronisations(lambda: [wait(), wait()]) == 2


def test_ratios_compare_equal_forms_only(images):
    times = {"boxes": {"median": 2.0}, "bool": {"median": 4.0}}
    rows = [
        {"model": "sipmask:r50", "milliseconds": times},
        {"model": "mask_rcnn", "milliseconds": {"bool": {"median": 6.0}}},
        {"model": "fcos", "milliseconds": {"boxes": {"median": 1.0}}},
    ]
    flags = images.read_flags(["--forms", "boxes", "bool"])
    assert images.compare(rows, flags) == [
        {"model": "sipmask:r50", "peer": "mask_rcnn", "form": "bool", "ratio": 1.5},
        {"model": "sipmask:r50", "peer": "fcos", "form": "boxes", "ratio": 0.5},
    ]


def test_another_number_of_candidates_stops_a_model_and_no_other(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        images, "own_side", lambda name, *_: images.Side(name, {"boxes": lambda: 0}, 220, 100, 1.0, None)
    )
    monkeypatch.setattr("sys.argv", ["images.py", "--models", "sais:demo", "--peers", "--output", str(tmp_path)])
    assert images.main() == 1
    assert "sais:demo failed: AssertionError: 220 candidates" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert list(json.loads(file.read_text())["failed"]) == ["sais:demo"]
