"""Whole verbs with the toy method of conftest.py: files, numbers and what is printed."""

import contextlib
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onestage.cli import convert
from onestage.cli.app import main
from onestage.engine.checkpoint import WeightsInfo, load_checkpoint, load_weights, save_weights


def train(call, *words):
    code, out, err = call("train", "--small", "--device", "cpu", "--epochs", "2", "--json", *words)
    assert code == 0, err
    return json.loads(out)


def test_train_leaves_a_run_folder_that_config_json_repeats(call, shapes):
    result = train(call, "--data", "shapes")
    run = Path(result["run"])
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "environment.json", "log.txt", "metrics.csv", "metrics.jsonl", "last.ckpt"} <= names
    assert json.loads((run / "config.json").read_text())["model"]["num_classes"] == 3
    state, info = load_weights(result["weights"])
    assert info.package == "onestage"
    assert [name for _, name in info.categories] == ["ring", "star", "heart"]
    code, out, _ = call("train", "--config", run / "config.json", "--json", "--output", "again")
    assert code == 0
    again, _ = load_weights(json.loads(out)["weights"])
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_fp16_goes_through_every_verb(call, shapes):
    half = ["--precision", "fp16", "--device", "cpu", "--json"]
    weights = train(call, "--data", "shapes", *half)["weights"]
    assert load_checkpoint(Path(weights).with_name("last.ckpt"))["scaler"]["scale"] > 0
    for words in (
        ["eval", "--data", "shapes", "--weights", weights],
        ["predict", "shapes/val", "--weights", weights],
        ["benchmark", "--small", "--image-size", "64", "64", "--iters", "1", "--warmup", "0"],
    ):
        code, out, err = call(*words, *half)
        assert code == 0, err
        assert json.loads(Path(json.loads(out)["run"], "config.json").read_text())["flags"]["precision"] == "fp16"


def test_train_says_what_next_and_that_can_be_run(call, shapes):
    _, _, err = call("train", "--small", "--device", "cpu", "--epochs", "1", "--data", "shapes")
    (line,) = [line for line in err.splitlines() if ".eval " in line]
    words = line.split()
    assert words[:3] == ["python", "-m", "onestage.eval"]
    assert call("eval", *words[3:], "--device", "cpu")[0] == 0


def test_resume_goes_on_in_the_same_folder(call, shapes, here):
    whole = train(call, "--data", "shapes", "--output", "whole")
    code, _, _ = call("train --small --device cpu --epochs 2 --data shapes --output part")
    assert code == 0
    code, out, _ = call("train", "--resume", "part/last.ckpt", "--json")
    assert code == 0
    resumed = json.loads(out)
    assert resumed["run"] == "part"
    assert resumed["steps"] == whole["steps"]


def test_a_refused_resume_leaves_the_run_as_it_was(call, shapes):
    words = "train --small --device cpu --data shapes --output out --epochs 2"
    assert call(words)[0] == 0
    kept = {name: Path("out", name).read_bytes() for name in ("config.json", "environment.json", "metrics.jsonl")}
    code, _, err = call(f"{words} --resume --batch-size 2 --seed 5")
    assert (code, err.count("was made with seed 0, this run has 5")) == (2, 1)
    assert {name: Path("out", name).read_bytes() for name in kept} == kept
    Path("out/environment.json").write_text("{}")
    assert call("train --resume out/last.ckpt")[0] == 0
    assert json.loads(Path("out/config.json").read_text())["flags"]["seed"] == 0
    assert json.loads(Path("out/environment.json").read_text())["commit"]  # of what went on


def test_resume_needs_nothing_of_what_the_run_started_from(call, shapes):
    first = train(call, "--data", "shapes", "--output", "first", "--model.inference.score-threshold", "0.2")
    words = ["train", "--device", "cpu", "--data", "shapes", "--weights", first["weights"], "--epochs", "1"]
    assert call(*words, "--output", "second")[0] == 0
    Path(first["weights"]).unlink()
    assert call("train --resume second/last.ckpt")[0] == 0
    config = json.loads(Path("second/config.json").read_text())
    assert config["model"]["inference"]["score_threshold"] == 0.2
    (Path("second") / "last.ckpt").rename("moved.ckpt")
    code, _, err = call("train --resume moved.ckpt --config second/config.json --output third")
    assert code == 0, err
    assert json.loads(Path("third/config.json").read_text())["model"] == config["model"]


def test_the_same_command_with_resume_goes_on_too(call, shapes):
    words = "train --small --device cpu --epochs 2 --data shapes --batch-size 2 --output out"
    assert call(words)[0] == 0
    assert call(words)[0] == 2  # not empty
    assert call(words, "--resume")[0] == 0


def test_an_interrupted_run_is_saved_and_says_how_to_go_on(call, shapes, monkeypatch):
    from onestage.cli import train as verb
    from onestage.engine.train import Interrupted

    def stop(*arguments, **more):
        raise Interrupted(15, Path("runs/x/last.ckpt"), 3)

    monkeypatch.setattr(verb, "train", stop)
    code, _, err = call("train", "--small", "--data", "shapes", "--output", "out")
    assert code == 143
    assert "python -m onestage.train --resume runs/x/last.ckpt" in err
    assert not Path("out/error.json").exists()


def test_an_interrupted_demo_does_not_promise_to_go_on(call, here, monkeypatch):
    from onestage.cli import train as verb
    from onestage.engine.train import Interrupted

    def stop(*arguments, **more):
        raise Interrupted(2, Path("out/last.ckpt"), 3)

    monkeypatch.setattr(verb, "train", stop)
    code, _, err = call("demo", "--device", "cpu", "--output", "out", "--limit", "4")
    assert code == 130
    assert "a demo is not resumed: it starts anew" in err
    assert "go on" not in err


def test_overfit_trains_and_evaluates_on_the_same_few_images(call, shapes):
    result = train(call, "--data", "shapes", "--overfit", "2", "--output", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["model"]["input"]["augmentation"] == "none"
    found = json.loads(Path("out/results.json").read_text())
    assert {entry["image_id"] for entry in found} <= {1, 2}
    assert result["steps"] == 2  # 2 epochs of at most one batch


def test_a_trunk_without_weights_learns_all_of_itself(call, shapes):
    _, out, err = call("train", "--data", "shapes", "--dry-run", "--json", "--device", "cpu")
    assert json.loads(out)["dry_run"]
    assert "the trunk starts from random numbers" in err
    assert not Path("runs").exists()


def test_metrics_go_to_tensorboard_too_where_that_is_asked_for(call, shapes, monkeypatch):
    written = {}

    class SummaryWriter(contextlib.nullcontext):  # stands for TensorBoard's, which is not installed here
        def add_scalar(self, name, value, step):
            written[name, step] = value

        def __enter__(self):
            return self

    library = types.ModuleType("torch.utils.tensorboard")
    library.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, library.__name__, library)
    train(call, "--data", "shapes", "--output", "out", "--log", "tensorboard", "--log-every", "1")
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    expected = {(key, row["step"]): row[key] for row in rows for key in row if key not in ("step", "epoch")}
    assert written == expected
    assert ("segm/AP", rows[-1]["step"]) in expected
    monkeypatch.setitem(sys.modules, library.__name__, None)
    code, _, err = call("train", "--small", "--data", "shapes", "--log", "tensorboard")
    assert code == 5
    assert err.endswith("pip install tensorboard, or leave --log away\n")


def test_validation_data_may_have_other_ids_for_the_same_names(call, shapes):
    usual = train(call, "--data", "shapes")
    file = shapes / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["id"] = 10 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 10 - annotation["category_id"]
    file.write_text(json.dumps(content))
    other = train(call, "--data", "shapes")
    assert {name: other[name] for name in usual if "/" in name} == {n: v for n, v in usual.items() if "/" in n}
    results = [json.loads((Path(run["run"]) / "results.json").read_text()) for run in (usual, other)]
    assert results[0]
    assert [10 - entry["category_id"] for entry in results[0]] == [entry["category_id"] for entry in results[1]]
    content["categories"][0]["name"] = "bird"
    file.write_text(json.dumps(content))
    assert call("train --small --device cpu --epochs 1 --data shapes")[0] == 3


def test_weights_of_other_categories_are_refused_unless_the_head_starts_anew(call, shapes):
    weights = train(call, "--data", "shapes", "--output", "first")["weights"]
    for split in ("train", "val"):
        file = shapes / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"].append({"id": 99, "name": "moon"})
        file.write_text(json.dumps(content))
    words = ["train", "--small", "--device", "cpu", "--epochs", "1", "--data", "shapes", "--weights", weights]
    code, _, err = call(*words)
    assert code == 4
    assert err.endswith("add --head reinit to keep the trunk and start a new head\n")
    code, out, err = call(*words, "--head", "reinit", "--json")
    assert code == 0
    assert "new head: " in err
    assert len(load_weights(json.loads(out)["weights"])[1].categories) == 4


def test_eval_of_weights_and_of_the_file_it_wrote_agree(call, shapes):
    weights = train(call, "--data", "shapes")["weights"]
    words = ["eval", "--data", "shapes", "--device", "cpu", "--per-class", "--json"]
    code, out, _ = call(*words, "--weights", weights, "--score-thr", "0")
    assert code == 0
    first = json.loads(out)
    assert first["images_with_detections"] == 4
    code, out, _ = call(*words, "--results", first["results"])
    assert code == 0
    second = json.loads(out)
    metrics = [name for name in first if "/" in name and not isinstance(first[name], str)]
    assert "segm/AP/star" in metrics
    assert [first[name] for name in metrics] == [second[name] for name in metrics]


def test_eval_says_how_to_count_the_same_again(call, shapes):
    words = "--data shapes --limit 2 --max-dets 1 2 3 --iou-types segm"
    code, out, err = call(f"eval --small --device cpu --score-thr 0 --output out --json {words}")
    assert code == 0
    first = json.loads(out)
    (again,) = re.findall(r"the same numbers from that file: python -m onestage\.(.+)", err)
    second = json.loads(call(f"{again} --json")[1])
    assert {name: second[name] for name in first if "/" in name} == {n: v for n, v in first.items() if "/" in n}
    assert second["images"] == 2
    assert re.search(r"python -m onestage\.explore shapes --results out/results\.json --limit 2\n", err)


def test_eval_of_a_results_file_leaves_its_metrics_where_output_says(call, shapes):
    (shapes / "results.json").write_text("[]")
    words = ["eval", "--data", "shapes", "--results", "shapes/results.json", "--json"]
    code, out, _ = call(*words, "--output", "scored")
    assert code == 0
    metrics = json.loads(Path("scored/metrics.json").read_text())
    assert metrics["segm/AP"] == 0
    assert json.loads(out) == metrics | {"images": 4, "results": "shapes/results.json", "run": "scored"}
    code, _, err = call(*words, "--output", "shapes", "--overwrite")
    assert (code, err.splitlines()[0]) == (2, "error: --output 'shapes' is the folder of --results")
    assert (shapes / "results.json").exists()
    assert call(*words)[0] == 0
    assert not Path("runs").exists()


def test_eval_reads_images_in_as_many_processes_as_training_does(call, shapes, monkeypatch):
    from onestage.cli import eval as verb

    seen = []
    monkeypatch.setattr(verb, "default_workers", lambda device: 3)
    monkeypatch.setattr(verb, "evaluate", lambda *_, workers, **more: seen.append(workers) or ({}, []))
    words = ["eval", "--small", "--data", "shapes", "--device", "cpu"]
    for more in ([], ["--workers", "0"]):
        assert call(*words, *more)[0] == 0
    assert seen == [3, 0]


def test_the_largest_image_is_for_the_user_to_say(call, shapes):
    words = ["--small", "--data", "shapes", "--device", "cpu", "--dry-run"]
    for verb in ("train", "eval"):
        code, _, err = call(verb, *words, "--max-pixels", "4095")
        assert code == 3
        assert "has 64 x 64 px" in err
        assert call(verb, *words, "--max-pixels", "4096")[0] == 0


def test_eval_counts_the_same_with_the_other_backend(call, shapes):
    pytest.importorskip("faster_coco_eval")
    words = ["eval", "--data", "shapes", "--device", "cpu", "--score-thr", "0", "--json"]
    weights = train(call, "--data", "shapes")["weights"]
    first = json.loads(call(*words, "--weights", weights)[1])
    again = json.loads(call(*words, "--weights", weights, "--backend", "faster-coco-eval")[1])
    file = json.loads(call(*words, "--results", first["results"], "--backend", "faster-coco-eval")[1])
    metrics = [name for name in first if name.startswith(("segm/", "bbox/"))]
    assert metrics
    for other in (again, file):  # sums in another order
        assert [other[name] for name in metrics] == pytest.approx([first[name] for name in metrics], abs=1e-12)


def test_eval_says_how_to_explore_its_results_and_weights_alone_show_the_same(
    call, method, shapes, monkeypatch, capsys
):
    import onestage.method
    from onestage.explore import main as explore

    monkeypatch.setattr(onestage.method, "METHOD", method, raising=False)  # as an installed package of that name
    weights = train(call, "--data", "shapes")["weights"]
    _, _, err = call("eval", "--data", "shapes", "--device", "cpu", "--weights", weights)
    (words,) = re.findall(r"python -m onestage.explore (.*)", err)
    assert explore([*words.split(), "--score-thr", "0.1", "--output", "one"]) == 0
    assert explore(["shapes", "--weights", weights, "--score-thr", "0.1", "--output", "two", "--device", "cpu"]) == 0
    one, two = (json.loads(Path(folder, "explore.json").read_text()) for folder in ("one", "two"))
    assert one["errors"] == two["errors"]
    assert one["counts"]["all"]["detections"] > 0


def test_a_model_that_finds_boxes_alone_goes_through_every_verb(method, shapes, capsys):
    class Boxes(method.build):
        def _find(self, image, scores):
            return replace(super()._find(image, scores), masks=None)

    def run(words):
        code = main(replace(method, build=Boxes), *words.split(maxsplit=1)[:1], words.split()[1:])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    code, trained, err = run("train --small --device cpu --epochs 2 --data shapes --output boxes --json")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("boxes/metrics.jsonl").read_text().splitlines()]
    assert trained["bbox/AP"] == max(row["bbox/AP"] for row in rows if "bbox/AP" in row)
    assert not [name for row in [trained, *rows] for name in row if name.startswith("segm")]

    words = f"eval --data shapes --device cpu --json --weights {trained['weights']} --model.inference.score-threshold 0"
    code, found, err = run(words)
    assert code == 0, err
    assert found["detections"] > 0
    code, again, err = run(f"eval --data shapes --device cpu --json --results {found['results']}")
    assert code == 0, err
    metrics = [name for name in found if "/" in name and not isinstance(found[name], str)]
    assert [found[name] for name in metrics] == [again[name] for name in metrics]
    assert not [name for name in metrics if name.startswith("segm")]
    code, _, err = run(f"{words} --iou-types segm")
    assert code == 2
    assert "the model finds boxes and no masks" in err

    predict = f"predict shapes/val --device cpu --score-thr 0 --json --weights {trained['weights']}"
    code, result, err = run(f"{predict} --output found")
    assert code == 0, err
    entries = json.loads(Path("found/predictions.json").read_text())["annotations"]
    assert len(entries) == result["instances"] == 12
    assert entries[0].keys() == {"id", "image_id", "category_id", "bbox", "score", "area", "iscrowd"}
    assert entries[0]["area"] == entries[0]["bbox"][2] * entries[0]["bbox"][3]
    assert len(list(Path("found/images").iterdir())) == 4
    code, _, err = run(f"{predict} --save masks")
    assert code == 2
    assert "the model finds boxes and no masks" in err

    timed = f"benchmark --device cpu --iters 1 --warmup 0 --json --weights {trained['weights']}"
    code, record, err = run(timed)
    assert code == 0, err
    assert "masks" not in record["stages"]
    code, _, err = run(f"{timed} --compare maskrcnn")
    assert code == 2
    assert "compares masks, and this model finds boxes" in err

    code, shown, err = run("demo --device cpu --json --steps 3 --limit 12")
    assert code == 0, err
    assert {"bbox/AP", "seconds", "page", "run"} == set(shown)


def test_eval_without_weights_says_that_numbers_are_random(call, shapes):
    code, out, err = call("eval", "--small", "--data", "shapes", "--device", "cpu", "--limit", "2", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 2
    assert "no --weights: small with random parameters" in err


def test_eval_with_test_time_augmentation_says_so(call, shapes):
    words = ["eval", "--small", "--device", "cpu", "--data", "shapes", "--json"]
    for more, said in (([], None), (["--tta"], "flip")):
        code, out, err = call(*words, *more)
        assert code == 0, err
        result = json.loads(out)
        assert result["tta"] == said
        assert json.loads(Path(result["run"], "metrics.json").read_text())["tta"] == said
        assert ("test-time augmentation" in err) == bool(said)
    code, _, err = call("eval --tta --data shapes --results", result["results"])
    assert (code, err.count("\n")) == (2, 2)
    assert err.startswith("error: --tta is for weights")


def test_eval_of_several_seeds_gives_mean_and_spread(call, shapes):
    state, info = load_weights(train(call, "--data", "shapes")["weights"])
    files = ["first.safetensors", "second.safetensors"]
    for file, bias in zip(files, (1.0, -10.0), strict=True):  # finds something, and nothing
        save_weights(file, {**state, "head.bias": torch.full((3,), bias)}, info)
    words = ["eval", "--device", "cpu", "--data", "shapes", "--json"]
    single = [json.loads(call(*words, "--weights", file)[1]) for file in files]
    code, out, err = call(*words, "--output", "both", "--seeds", *files)
    assert code == 0, err
    both = json.loads(out)
    assert single[0]["bbox/AR100"] != single[1]["bbox/AR100"]
    for name in ("bbox/AR100", "segm/AP"):
        first, second = (one[name] for one in single)
        assert both[name] == pytest.approx((first + second) / 2)
        assert both["spread"][name] == pytest.approx(abs(first - second) / 2**0.5)
    assert (both["seeds"], both["runs"], both["run"]) == (2, ["both/1", "both/2"], "both")
    assert json.loads(Path("both/metrics.json").read_text())["spread"] == both["spread"]
    assert json.loads(Path("both/2/config.json").read_text())["flags"]["weights"] == files[1]
    assert "bbox/AP" in err
    code, _, err = call("eval --config both/config.json --output both --overwrite")
    assert code == 0, err


def test_eval_of_seeds_refuses_weights_that_differ_in_more(call, shapes):
    first = train(call, "--data", "shapes")["weights"]
    other = train(call, "--data", "shapes", "--optim.lr", "0.5", "--model.grid", "1", "1")["weights"]
    for words, what in (
        (["--seeds", first], "--seeds has one file, which has no spread"),
        (["--seeds", first, other], f"'{other}' and '{first}' have different configurations (grid, schedule)"),
        (["--seeds", first, first, "--weights", first], "--weights and --seeds are both given"),
    ):
        code, _, err = call("eval --data shapes --device cpu", *words)
        assert (code, err.count("\n")) == (2, 2)
        assert err.startswith(f"error: {what}\n  fix: ")


def test_eval_of_weights_and_results_at_once_is_refused(call, shapes):
    assert call("eval", "--data", "shapes", "--weights", "a", "--results", "b")[0] == 2


@pytest.mark.parametrize(
    ("words", "code", "start"),
    [
        (["--data", "nowhere"], 3, "error: dataset folder 'nowhere' does not exist"),
        ([], 2, "error: no data set: --data is not given and COCO_ROOT is not set"),
        (["--data", "shapes", "--device", "tpu9"], 2, "error: device 'tpu9' is unknown"),
        (["--data", "shapes", "--weights", "page.pth"], 4, "error: weights 'page.pth' is an HTML page"),
        (
            ["--data", "shapes", "--weights", "a", "--weights-backbone", "b"],
            2,
            "error: --weights and --weights-backbone",
        ),
        (["--data", "shapes", "--head", "reinit"], 2, "error: --head reinit is for --weights, and none are given"),
        (["--data", "shapes", "--model.num-classes", "80"], 2, "error: --model.num-classes is 80, the data set has 3"),
    ],
)
def test_what_a_newcomer_gets_wrong_has_its_exit_code(call, shapes, monkeypatch, words, code, start):
    monkeypatch.delenv("COCO_ROOT", raising=False)
    Path("page.pth").write_text("<!doctype html><html>please log in</html>")
    got, _, err = call("train", "--small", *words)
    assert (got, f"\n{start}" in f"\n{err}") == (code, True), err


def test_broken_annotations_are_told_in_two_lines(call, shapes):
    (shapes / "annotations" / "instances_train.json").write_text("{")
    code, _, err = call("train", "--small", "--device", "cpu", "--data", "shapes")
    assert code == 3
    assert err.startswith("error: ")
    assert "\n  fix: " in err


def test_a_training_set_without_objects_teaches_nothing(call, shapes):
    file = shapes / "annotations" / "instances_train.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    code, _, err = call("train", "--small", "--device", "cpu", "--data", "shapes")
    assert code == 3
    assert f"error: dataset '{file.relative_to(shapes.parent)}' has no objects to learn from\n" in err


def test_a_validation_set_without_objects_has_no_ap_and_leaves_the_last_weights(call, shapes):
    file = shapes / "annotations" / "instances_val.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    code, _, err = call("train --small --device cpu --data shapes --epochs 2 --batch-size 4 --output out")
    assert code == 0, err
    assert "step 2: bbox/AP -, segm/AP -, segm/AP50 -\n" in err
    assert "best weights (step 4)" in err


def test_demo_leaves_a_page_weights_and_commands(call, here):
    code, out, err = call("demo", "--device", "cpu", "--json", "--output", "out", "--steps", "3", "--limit", "12")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert {"segm/AP", "bbox/AP", "seconds", "page", "run"} == set(result)
    html = Path(result["page"]).read_text()
    assert "generated shapes, not COCO" in html
    assert html.count("data:image/jpeg") == 24
    (line,) = [line for line in err.splitlines() if ".predict " in line]
    assert call("predict", *line.split()[3:], "--device", "cpu")[0] == 0


def test_convert_accounts_for_the_file_and_verifies(call, here):
    torch.save({"state_dict": {"theirs.weight": torch.ones(3, 1)}}, "theirs.pth")
    code, out, err = call("convert", "--from", "theirs.pth", "--to", "ours.safetensors", "--verify", "--map", "--json")
    assert code == 0, err
    assert json.loads(out)["verified"]
    assert "every tensor and 3 detections in a random image" in err
    state, info = load_weights("ours.safetensors")
    assert torch.equal(state["head.weight"], torch.ones(3, 1))
    assert len(info.source_sha256) == 64
    code, out, _ = call("info", "ours.safetensors")
    assert code == 0
    assert "theirs.pth" in out
    code, _, err = call("convert", "--from", "theirs.pth", "--to", "ours.safetensors")
    assert (code, err.splitlines()[0]) == (2, "error: --to 'ours.safetensors' exists")


def test_info_of_a_configuration_that_does_not_fit_says_where(call, here):
    save_weights("odd.safetensors", {}, WeightsInfo(package="onestage", config={"backbone": 3}))
    code, _, err = call("info", "odd.safetensors")
    assert (code, err.splitlines()[0]) == (2, "error: odd.safetensors: config.backbone is 3; expected BackboneConfig")
    save_weights("short.safetensors", {}, WeightsInfo(package="onestage", config={}))
    code, out, _ = call("info", "short.safetensors")
    assert code == 0
    assert "resnet18, input 800 x 1333" in out


def test_what_reads_back_with_another_configuration_is_not_verified(call, here, monkeypatch):
    torch.save({"theirs.weight": torch.ones(3, 1)}, "theirs.pth")
    written = convert.save_weights
    monkeypatch.setattr(
        convert, "save_weights", lambda path, state, info: written(path, state, replace(info, config={"grid": [3, 3]}))
    )
    code, _, err = call("convert", "--from", "theirs.pth", "--to", "ours.safetensors", "--verify")
    assert (code, err.splitlines()[-2]) == (6, "error: 'ours.safetensors' reads back with another configuration")


def test_convert_of_a_method_without_official_weights_refuses_with_the_reason(method, here, capsys):
    torch.save({"P3.weight": torch.zeros(1)}, "theirs.pth")
    words = ["--from", "theirs.pth", "--to", "ours.safetensors"]
    unreleased = replace(method, convert=None, infer_config=None, unreleased="they were lost")
    assert main(unreleased, "convert", words) == 4
    what, fix = capsys.readouterr().err.splitlines()
    assert what == "error: there are no official weights of Toy: they were lost (this file's first key is P3.weight)"
    assert "onestage.train" in fix
    assert not Path("ours.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--to", "x.safetensors"], "--from is missing"),
        (["--from", "x.pth"], "--to is missing"),
        (["--from", "x.pth", "--to", "x.pth"], "--to 'x.pth' does not end in .safetensors"),
    ],
)
def test_convert_asks_for_both_files(call, here, words, what):
    code, _, err = call("convert", *words)
    assert (code, err.splitlines()[0]) == (2, f"error: {what}")


def test_coco_categories_are_the_eighty_with_their_ids():
    from onestage.cli.convert import coco_categories

    categories = coco_categories()
    assert len(categories) == 80
    assert (categories[0], categories[11], categories[-1]) == ((1, "person"), (13, "stop sign"), (90, "toothbrush"))


def test_benchmark_counts_instances_and_times_stages(call, here):
    code, out, _ = call("benchmark", "--small", "--device", "cpu", "--iters", "2", "--warmup", "0", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["instances_per_image"] == 80  # one per category
    assert {"backbone", "head", "masks"} == set(record["stages"])
    assert record["milliseconds"]["p50"] > 0
    assert (Path(record["run"]) / "results.json").exists()


def test_benchmark_measures_memory_before_a_rival_takes_any(call, here, monkeypatch):
    from onestage.cli import benchmark

    memory = [3 * 2**20]
    monkeypatch.setattr(benchmark, "peak_memory", lambda device: memory[-1])
    monkeypatch.setattr(benchmark, "_mask_rcnn", lambda *_: memory.append(9 * 2**20) or (lambda: None))
    words = ["--small", "--device", "cpu", "--iters", "1", "--warmup", "0", "--compare", "maskrcnn", "--json"]
    code, out, _ = call("benchmark", *words)
    assert code == 0
    assert json.loads(out)["peak_memory_mib"] == 3
    monkeypatch.setattr(benchmark, "peak_memory", lambda device: float("nan"))
    assert json.loads(call("benchmark", *words)[1])["peak_memory_mib"] is None
