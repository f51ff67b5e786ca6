from dataclasses import replace

import pytest

from onestage.errors import UsageError
from onestage.tables.plan import Settings, chosen_rows, config_of, entries_of, entry_of, methods_of, tables_of


def keys(toy, settings, seed=0):
    table = toy.tables()[0]
    return {row.name: entry_of(toy, table, row, settings, seed) for row in table.rows if row.config is not None}


def test_rows_that_differ_in_inference_share_a_training(toy, small):
    found = keys(toy, small)
    assert found["2x2"].training == found["2x2 strict"].training
    assert found["2x2"].key != found["2x2 strict"].key


def test_rows_that_differ_in_the_trunk_are_one_run_on_generated_shapes_and_two_at_full_size(toy, small, coco):
    assert keys(toy, small)["2x2"].key == keys(toy, small)["2x2 large"].key
    full = keys(toy, Settings(profile="full", data=str(coco)))
    assert full["2x2"].training != full["2x2 large"].training


@pytest.mark.parametrize(
    "change", [{"steps": 3}, {"limit": 5}, {"size": 64}, {"difficulty": "hard"}, {"precision": "bf16"}, {"seed": 1}]
)
def test_a_training_is_another_one_with_other(toy, small, change):
    seed = change.get("seed", 0)
    other = replace(small, **{name: value for name, value in change.items() if name != "seed"})
    assert keys(toy, small)["2x2"].training != keys(toy, other, seed)["2x2"].training


def test_where_it_runs_makes_no_other_training(toy, small):
    assert keys(toy, small)["2x2"].key == keys(toy, replace(small, workers=2))["2x2"].key


def test_what_is_measured_without_training_has_no_seed(toy, small):
    table = toy.tables()[1]
    assert len({entry_of(toy, table, table.rows[0], small, seed).key for seed in range(3)}) == 1


def test_small_recipe_has_its_steps_and_size(toy, small):
    config = config_of(toy, toy.tables()[0].row("1x1"), small)
    assert (config.schedule.length, config.schedule.unit, config.input.test_size) == (2, "steps", (32, 32))
    assert config.grid == (1, 1)


def test_small_recipe_keeps_the_several_sizes_of_a_row(toy, small):
    several = {"input.train_sizes": ((96, 96), (128, 128)), "input.train_draw": "range"}
    row = replace(toy.tables()[0].row("1x1"), small=several)
    config = config_of(toy, row, replace(small, size=64))
    assert (config.input.train_sizes, config.input.train_draw) == (((48, 48), (64, 64)), "range")


def test_full_recipe_is_the_row_with_a_trunk_that_can_learn(toy):
    row = toy.tables()[0].row("1x1")
    config = config_of(toy, row, Settings(profile="full"))
    assert config == replace(row.config, backbone=replace(row.config.backbone, norm="train", frozen_stages=0))
    assert config_of(toy, row, Settings(profile="full", weights_backbone=__file__)) == row.config


def test_departures_from_the_recipe_label_every_number():
    assert Settings(profile="full", weights_backbone="r50.pth").label == ""
    cut = Settings(profile="full", steps=10, weights_backbone="r50.pth")
    assert (cut.label, cut.departures) == ("cut short", ("10 steps in place of the schedule",))
    assert "generated" in Settings(profile="smoke").label


def test_patterns_choose_rows_and_case_does_not_matter(toy):
    tables = tables_of([toy], ["table2"])
    assert [row.name for _, _, row in chosen_rows(tables, ["2X2 l*", "FINE"])] == ["2x2 large", "fine"]
    with pytest.raises(UsageError, match="no row fits"):
        chosen_rows(tables, ["nothing"])


def test_sessions_choose_tables(toy):
    assert [table.number for _, table in tables_of([toy], ["table2"])] == ["2a", "2b"]
    assert [table.number for _, table in tables_of([toy], ["all"])] == ["2a", "2b", "figure5"]
    with pytest.raises(UsageError, match="table9"):
        tables_of([toy], ["table9"])


def test_package_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="'no_such_paper' is not installed") as caught:
        methods_of(["no_such_paper"])
    assert caught.value.fix.startswith("installed are: ")


def test_cited_rows_and_rows_without_their_weights_are_no_entries(toy, coco, tmp_path, rows):
    settings = Settings(profile="full", data=str(coco), weights=str(tmp_path))
    assert not list(entries_of(rows(), settings, [0]))
    (tmp_path / "toy-2a-1x1.safetensors").write_bytes(b"weights")
    assert [entry.row.name for entry in entries_of(rows(), settings, [0])] == ["1x1"]
