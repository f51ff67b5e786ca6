"""The code of docs/at_scale.md, but for Ray itself."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from onestage.cli.app import main
from onestage.data.synth import make_shapes
from sipmask.method import METHOD


@pytest.fixture(scope="module")
def at_scale():
    spec = importlib.util.spec_from_file_location("at_scale", Path(__file__).parent / "at_scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["at_scale"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three images."""
    return make_shapes(tmp_path / "shapes", images=(0, 3), size=64) / "val"


@pytest.fixture
def weights(at_scale, tmp_path) -> Path:
    return at_scale.random_weights("sipmask", tmp_path / "weights.safetensors")


def test_partitions_of_spark_find_what_one_worker_finds(at_scale, images, weights):
    (images / "broken.jpg").write_bytes(b"no image")
    page = at_scale.recipe()
    everything = page.images_in(images)
    one = page.Find(weights, 0.0)
    expected = [one(image) for image in everything]
    parts = [list(page.find_partition(iter(part), weights, 0.0)) for part in (everything[:2], everything[2:])]
    assert at_scale.compare(expected, [*parts[1], *parts[0]]) is None
    assert [bool(image["error"]) for image in expected] == [False, False, False, True]
    assert at_scale.compare(expected, parts[0]) == "4 images went in, 2 came out"
    changed = [{**image, "results": "[]"} for image in expected]
    assert at_scale.compare(expected, changed).startswith("3 of 4 images differ")


def test_shards_merge_into_what_one_run_writes(at_scale, images, weights, tmp_path):
    for shard, folder in (("0/1", "one"), ("0/2", "two"), ("1/2", "two")):
        words = ["--weights", str(weights), "--score-thr", "0", "--shard", shard, "--save", "json", "--device", "cpu"]
        words += ["--output", str(tmp_path / folder), "-q"]
        assert main(METHOD, "predict", [str(images), *words]) == 0
    merged = at_scale.recipe().merge(tmp_path / "two")
    whole = json.loads((tmp_path / "one" / "predictions.json").read_text())
    assert merged["categories"] == whole["categories"]
    assert [entry["id"] for entry in merged["annotations"]] == list(range(1, len(merged["annotations"]) + 1))

    def found(content):
        names = {image["id"]: image["file_name"] for image in content["images"]}
        entries = [{**entry, "image_id": names[entry["image_id"]], "id": 0} for entry in content["annotations"]]
        return sorted(map(json.dumps, entries))

    assert found(merged) == found(whole)
    assert len(found(whole)) > 3
