from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from sprnet.coder import decode, encode
from sprnet.config import R50_800

CORNERS = replace(R50_800, box_coder="corners")
ANCHOR, BOX = torch.tensor([[10.0, 20.0, 50.0, 40.0]]), torch.tensor([[14.0, 19.0, 66.0, 45.0]])


def test_both_codes_by_hand():
    # The anchor is 40 x 20 around (30, 30), the box 52 x 26 around (40, 32).
    log = torch.tensor(1.3).log().item()
    assert_close(encode(ANCHOR, BOX, R50_800), torch.tensor([[0.25, 0.1, log, log]]))
    assert_close(encode(ANCHOR, BOX, CORNERS), torch.tensor([[0.5, -0.25, 2.0, 1.25]]))


@pytest.mark.parametrize("config", [R50_800, CORNERS], ids=lambda config: config.box_coder)
def test_decoding_undoes_encoding(config):
    assert_close(decode(ANCHOR, encode(ANCHOR, BOX, config), config), BOX)
    assert_close(decode(ANCHOR, torch.zeros(1, 4), config), ANCHOR)
