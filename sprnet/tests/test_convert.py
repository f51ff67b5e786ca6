import pytest
import torch

from onestage.errors import WeightsError
from sprnet.config import R50_800
from sprnet.method import METHOD


@pytest.mark.parametrize("read", [METHOD.infer_config, lambda state: METHOD.convert(state, R50_800)])
@pytest.mark.parametrize("state", [{"P3.weight": torch.zeros(1)}, {}])
def test_whatever_is_to_be_converted_is_refused_with_the_reason(read, state):
    with pytest.raises(WeightsError, match=r"no official SPRNet weights.*P3\.weight|nothing") as error:
        read(state)
    assert "sprnet.train" in error.value.fix
