import pytest
import torch

from onestage.errors import WeightsError
from sais.config import R50_768
from sais.method import METHOD


def test_any_checkpoint_is_refused_with_the_reason():
    state = {"backbone.conv1.weight": torch.zeros(1)}
    for read in (METHOD.infer_config, lambda state: METHOD.convert(state, R50_768)):
        with pytest.raises(WeightsError, match="no official SAIS weights.*never released") as error:
            read(state)
        assert "sais.train" in error.value.fix


def test_an_empty_file_is_refused_too():
    with pytest.raises(WeightsError, match="nothing"):
        METHOD.infer_config({})
