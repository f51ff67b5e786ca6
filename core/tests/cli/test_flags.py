import json
from dataclasses import asdict, replace
from typing import get_args

import pytest

from onestage.cli.flags import Talk, parse, parse_flags
from onestage.config import Precision
from onestage.errors import UsageError


def config(method, *words, verb="train"):
    return parse(method, verb, list(words)).config


def test_without_flags_the_default_variant_counts(method):
    assert config(method) == method.variants["big"]


def test_small_and_variant_choose_a_configuration(method):
    assert config(method, "--small") == config(method, "--variant", "small") == method.variants["small"]


def test_the_demo_trains_the_demo_variant(method):
    assert config(method, verb="demo") == method.variants["demo"]


def test_every_field_of_the_config_has_a_flag(method):
    got = config(method, "--model.grid", "1", "3", "--model.no-align-features", "--optim.lr", "0.5")
    assert (got.grid, got.align_features, got.schedule.lr) == ((1, 3), False, 0.5)


def test_underscores_in_flags_are_fine(method):
    assert config(method, "--model.no-align_features").align_features is False


def test_size_keeps_the_proportion_of_the_sides(method):
    got = config(method, "--variant", "big", "--size", "400").input
    assert got.test_size == (400, round(1333 / 2))
    assert got.train_sizes == ((400, 666),)


def test_backbone_is_short_for_its_name(method):
    assert config(method, "--backbone", "resnet50").backbone.name == "resnet50"


def test_epochs_move_milestones_along(method):
    schedule = config(method, "--epochs", "24").schedule
    assert (schedule.length, schedule.milestones, schedule.unit) == (24, (16, 22), "epochs")


def test_the_demo_takes_a_batch_size_and_keeps_the_steps_that_are_given(method):
    usual = method.variants["demo"].schedule
    assert config(method, "--batch-size", "8", verb="demo").schedule.batch_size == 8
    assert config(method, "--batch-size", "8", "--steps", "3", verb="demo").schedule.length == 3
    assert config(method, "--batch-size", str(usual.batch_size), verb="demo").schedule == usual


def test_batch_size_scales_the_learning_rate_of_sgd(method):
    assert config(method, "--batch-size", "4").schedule.lr == pytest.approx(0.01 / 4)
    assert config(method, "--batch-size", "4", "--no-autoscale").schedule.lr == 0.01
    assert config(method, "--batch-size", "4", "--optim.lr", "0.3").schedule.lr == 0.3


def test_another_variants_schedule_can_be_taken(method):
    assert config(method, "--schedule", "demo") == replace(
        method.variants["big"], schedule=method.variants["demo"].schedule
    )


def test_flags_of_recipe_reach_the_schedule(method):
    schedule = config(method, "--ema", "0.9", "--grad-clip", "3", "--drop-empty").schedule
    assert (schedule.ema, schedule.clip_norm, schedule.drop_empty) == (0.9, 3.0, True)


def test_config_json_gives_the_same_settings_again(method, tmp_path):
    from onestage.cli.app import config_record

    words = ["--small", "--size", "96", "--batch-size", "8", "--model.grid", "1", "2", "--seed", "3", "--data", "x"]
    first = parse(method, "train", words)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_record(method, first)))
    again = parse(method, "train", ["--config", str(file)])
    assert again.config == first.config
    assert (again.flags.seed, str(again.flags.data), again.flags.variant) == (3, "x", "small")
    assert parse(method, "train", ["--config", str(file), "--seed", "4"]).flags.seed == 4


def test_config_json_of_another_verb_gives_the_model(method, tmp_path):
    from onestage.cli.app import config_record

    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_record(method, parse(method, "train", ["--model.grid", "1", "2"]))))
    assert parse(method, "eval", ["--config", str(file)]).config.grid == (1, 2)


def test_weights_keep_their_config_but_for_the_flags_given(method):
    stored = replace(method.variants["small"], grid=(3, 3))
    parsed = parse(method, "eval", ["--score-thr", "0.2", "--model.no-align-features"])
    got = parsed.on_top_of(stored)
    assert got == replace(stored, align_features=False, inference=replace(stored.inference, score_threshold=0.2))


def test_resume_alone_means_the_newest_run(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/onestage/train/now"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"x")
    stored = asdict(replace(method.variants["small"], grid=(4, 4)))
    (folder / "config.json").write_text(json.dumps({"verb": "train", "flags": {"seed": 7}, "model": stored}))
    parsed = parse(method, "train", ["--resume"])
    assert (parsed.flags.resume, parsed.flags.seed, parsed.config.grid) == ("auto", 7, (4, 4))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--modle.grid", "2", "2"], "unknown flag '--modle.grid'; nearest: '--model.grid'"),
        (["--lr", "0.1"], "unknown flag '--lr'; nearest: '--optim.lr'"),
        (["--learning-rate", "0.1"], "unknown flag '--learning-rate'"),  # like none of ours
        (["-data", "x"], "unknown flag '-data'; nearest: '--data'"),
        (["--batchsize=3"], "unknown flag '--batchsize'; nearest: '--batch-size'"),
        (["--model.grid", "2"], "missing value for argument '--model.grid'. Expected 2 values"),
        (["--optim.lr", "fast"], "--optim.lr: could not convert string to float: 'fast'"),
        (["--steps", "many"], "--steps is 'many'; expected INT"),
        (["--ema", "high"], "--ema is 'high'; expected FLOAT"),
        (
            ["--precision", "fp8"],
            f"invalid choice 'fp8' for argument '--precision'. Expected one of {get_args(Precision)}",
        ),
        (["--variant", "smal"], "unknown variant 'smal'; nearest: 'small'"),
        (["--schedule", "dem"], "unknown variant 'dem'; nearest: 'demo'"),
        (["--epochs", "0"], "the length of training is 0"),
        (["--epochs", "1", "--steps", "1"], "--epochs and --steps both say how long to train"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--size", "8"], "--size is 8; at least 32 is needed"),
        (["--config", "nowhere.json"], "config 'nowhere.json' does not exist"),
        (["--resume", "nowhere.ckpt"], "checkpoint 'nowhere.ckpt' does not exist"),
        (["stray"], "unrecognized options: stray"),
    ],
)
def test_a_command_line_that_cannot_be_meant_says_why(method, words, what):
    with pytest.raises(UsageError) as caught:
        parse(method, "train", words)
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("verb", "words", "what", "fix"),
    [
        ("train", ["--accumulate", "0"], "--accumulate is 0", "give at least 1"),
        ("train", ["--log-every", "0"], "--log-every is 0", "give at least 1"),
        ("train", ["--overfit", "0"], "--overfit is 0", "give at least 1"),
        ("train", ["--save-every", "-1"], "--save-every is -1", "give at least 0"),
        ("train", ["--seed", "-1"], "--seed is -1", f"give a number from 0 to {2**63 - 1}"),
        ("train", ["--seed", str(2**63)], f"--seed is {2**63}", f"give a number from 0 to {2**63 - 1}"),
        ("train", ["--ema", "2"], "--ema is 2.0", "give a number from 0 to 1"),
        ("train", ["--grad-clip", "-1"], "--grad-clip is -1.0", "give at least 0"),
        ("train", ["--optim.lr", "-1"], "--optim.lr is -1.0", "give at least 0"),
        ("train", ["--optim.length", "0", "--steps", "3"], "--optim.length is 0", "give at least 1"),
        ("demo", ["--optim.batch-size", "0"], "--optim.batch-size is 0", "give at least 1"),
        ("train", ["--model.grid", "2", "0"], "--model.grid is 0", "give at least 1"),
        (
            "eval",
            ["--model.inference.max-detections", "-1"],
            "--model.inference.max-detections is -1",
            "give at least 1",
        ),
        (
            "eval",
            ["--model.backbone.frozen-stages", "9"],
            "--model.backbone.frozen-stages is 9",
            "give a number from 0 to 5",
        ),
        ("predict", ["x", "--score-thr", "50"], "--score-thr is 50.0", "give a number from 0 to 1"),
        ("demo", ["--workers", "-1"], "--workers is -1", "give at least 0"),
        ("demo", ["--batch-size", "0"], "--batch-size is 0", "give at least 1"),
        ("eval", ["--batch-size", "0"], "--batch-size is 0", "give at least 1"),
        ("eval", ["--max-dets", "1", "0", "100"], "--max-dets is 0", "give at least 1"),
        ("eval", ["--max-pixels", "nan"], "--max-pixels is nan", "give at least 1"),
        ("predict", ["--limit", "-1"], "--limit is -1", "give at least 1"),
        ("predict", ["--stride", "0"], "--stride is 0", "give at least 1"),
        ("benchmark", ["--iters", "0"], "--iters is 0", "give at least 1"),
        ("benchmark", ["--image-size", "0", "64"], "--image-size is 0", "give at least 1"),
    ],
)
def test_a_number_out_of_range_is_told_before_anything_starts(method, verb, words, what, fix):
    with pytest.raises(UsageError) as caught:
        parse(method, verb, words)
    assert (caught.value.what, caught.value.fix) == (what, fix)


def test_an_argument_without_a_flag_has_none(method):
    with pytest.raises(UsageError, match="unknown flag '--source'"):
        parse(method, "predict", ["--source", "photo.jpg"])


def test_a_checkpoint_without_the_settings_of_its_run_says_so(method, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(UsageError, match="has no config.json beside it"):
        parse(method, "train", ["--resume", str(tmp_path / "last.ckpt")])
    assert parse(method, "train", ["--small", "--resume", str(tmp_path / "last.ckpt")]).flags.resume


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        *((verb, ["--deterministic"]) for verb in ("eval", "predict", "export", "benchmark")),
        *((verb, ["--workers", "1"]) for verb in ("predict", "export", "benchmark")),
        *((verb, ["--limit", "1"]) for verb in ("export", "benchmark")),
    ],
)
def test_a_flag_that_would_do_nothing_is_unknown(method, verb, words):
    with pytest.raises(UsageError, match=f"unknown flag '{words[0]}'"):
        parse(method, verb, words)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not JSON"),
        ("[]", "has no 'model'"),
        ('{"package": "other", "model": {}}', "belongs to other, not to onestage"),
        ('{"model": {"gird": [1, 1]}}', "model: unknown key 'gird'; nearest: 'grid'"),
        ('{"verb": "train", "flags": {"sed": 1}, "model": {}}', "flags: unknown key 'sed'; nearest: 'seed'"),
    ],
)
def test_a_config_file_that_does_not_fit_says_why(method, tmp_path, text, what):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse(method, "train", ["--config", str(file)])
    assert what in caught.value.what


def test_a_papers_own_verb_gets_the_same_errors():
    assert parse_flags(Talk, ["-q"], "python -m x.y").quiet
    with pytest.raises(UsageError, match="nearest: '--json'"):
        parse_flags(Talk, ["--jsno"], "python -m x.y")
