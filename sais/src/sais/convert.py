"""There is nothing to convert: the code and the weights behind the paper's tables were never released.

`python -m sais.convert` says so. A later repository of the first author has the same title and another architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from onestage.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from sais.config import SAISConfig


def convert_state_dict(state: dict[str, Tensor], config: SAISConfig) -> NoReturn:
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
        "there are no official SAIS weights: the code behind the paper was never released "
        f"(this file's first key is {first})",
        "train your own with python -m sais.train; weights it wrote need no conversion",
    )


if __name__ == "__main__":
    from sais.__main__ import run_verb

    run_verb("convert")
