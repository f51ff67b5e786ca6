"""Key rules: every tensor is accounted for."""

import pytest
import torch

from onestage.engine.official import convert_keys, plain, rename
from onestage.errors import WeightsError

RULES = ((r"old\.(\d+)\.weight", r"new.\1.weight"), (r"scale|factor", r"factor"), (r"old\.bn\.(.+)", r"new.bn.\1"))
OLD = {"old.0.weight": torch.ones(2, 3), "scale": torch.tensor([7.0]), "old.bn.num_batches_tracked": torch.tensor(3)}
NEW = {"new.0.weight": torch.zeros(2, 3), "factor": torch.tensor(0.0)}


def test_the_first_rule_that_fits_the_whole_key_names_it():
    assert rename("old.3.weight", RULES) == "new.3.weight"
    assert rename("old.3.weights", RULES) is None


def test_tensors_move_and_single_numbers_take_our_shape():
    converted, notes = convert_keys(OLD, RULES, NEW)
    assert sorted(converted) == ["factor", "new.0.weight"]
    assert converted["factor"].shape == ()
    assert notes == []


def test_what_the_released_model_never_reads_stays_behind_with_a_note():
    _, notes = convert_keys(OLD | {"dead.weight": torch.ones(1)}, RULES, NEW, lambda key: key.startswith("dead"))
    assert notes == ["left out, unused by the released model: dead.weight"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (OLD | {"old.x": torch.ones(1)}, r"no place for old\.x"),
        ({"scale": torch.ones(1)}, r"nothing for new\.0\.weight"),
        (OLD | {"factor": torch.ones(1)}, r"a second tensor for the place of factor"),
        (OLD | {"old.0.weight": torch.ones(3, 2)}, r"another shape: new\.0\.weight \(3, 2\), expected \(2, 3\)"),
    ],
)
def test_leftover_missing_and_misshapen_tensors_are_refused(state, message):
    with pytest.raises(WeightsError, match=message):
        convert_keys(state, RULES, NEW)


def test_the_prefix_of_data_parallel_training_is_taken_off():
    assert list(plain({"module.a": torch.ones(1), "b": torch.ones(1)})) == ["a", "b"]
    with pytest.raises(WeightsError, match="a second tensor for the place of a"):
        plain({"module.a": torch.ones(1), "a": torch.ones(1)})
