"""There is nothing to convert: neither code nor weights of the paper were ever released.

`python -m sprnet.convert` says so. Repositories of the same name are about faces, scene text or radio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from onestage.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from sprnet.config import SPRNetConfig


def convert_state_dict(state: dict[str, Tensor], config: SPRNetConfig) -> NoReturn:
    """Refuses: no official checkpoint exists.

    Raises:
        WeightsError: always.
    """
    _refuse(state)


def config_of(state: dict[str, Tensor]) -> NoReturn:
    """Refuses: no official checkpoint exists.

    Raises:
        WeightsError: always.
    """
    _refuse(state)


def _refuse(state: dict[str, Tensor]) -> NoReturn:
    first = sorted(state)[0] if state else "nothing"
    raise WeightsError(
        "there are no official SPRNet weights: neither code nor models of the paper were ever released "
        f"(this file's first key is {first})",
        "train your own with python -m sprnet.train; weights it wrote need no conversion",
    )


if __name__ == "__main__":
    from sprnet.__main__ import run_verb

    run_verb("convert")
