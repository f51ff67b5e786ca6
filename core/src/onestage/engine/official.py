"""Official checkpoints by key rules: every tensor gets a place, a reason to stay behind, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from onestage.errors import WeightsError, some

if TYPE_CHECKING:
    from torch import Tensor

KeyRules = tuple[tuple[str, str], ...]  # (pattern of their key, our key); the first match counts


def rename(key: str, rules: KeyRules) -> str | None:
    """Our name of one official tensor, None where no rule knows it."""
    for theirs, ours in rules:
        match = re.fullmatch(theirs, key)
        if match:
            return match.expand(ours)
    return None


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the `module.` that data-parallel training puts in front."""
    found = {key.removeprefix("module."): value for key, value in state.items()}
    _refuse([key for key in found if key in state and f"module.{key}" in state], "a second tensor for the place of")
    return found


def convert_keys(
    state: Mapping[str, Tensor],
    rules: KeyRules,
    wanted: Mapping[str, Tensor],
    unused: Callable[[str], bool] = lambda key: False,
) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one.

    Args:
        state: Their tensors, without `module.`.
        rules: From their keys to ours.
        wanted: A state dict of our model; may lie on the meta device. `num_batches_tracked`, which nothing reads, may
            be absent on either side.
        unused: True for those of their keys that the released model holds but never reads.

    Returns:
        The state dict and one note per group of tensors left out on purpose.

    Raises:
        WeightsError: a tensor is left over, missing or of another shape.
    """
    converted: dict[str, Tensor] = {}
    unknown, twice, left_out = [], [], []
    for key, value in state.items():
        ours = rename(key, rules)
        if ours is not None and ours in wanted:
            if ours in converted:
                twice.append(key)
            scalar = value.numel() == 1 and wanted[ours].numel() == 1  # () in one layout, (1,) in the other
            converted[ours] = value.reshape(wanted[ours].shape) if scalar else value
        elif unused(key):
            left_out.append(key)
        elif not key.endswith("num_batches_tracked"):
            unknown.append(key)
    _refuse(unknown, "no place for")
    _refuse(twice, "a second tensor for the place of")
    _refuse([key for key in wanted if key not in converted and not key.endswith("num_batches_tracked")], "nothing for")
    for key, value in converted.items():
        if value.shape != wanted[key].shape:
            _refuse([f"{key} {tuple(value.shape)}, expected {tuple(wanted[key].shape)}"], "another shape:")
    return converted, [f"left out, unused by the released model: {some(left_out)}"] if left_out else []


def _refuse(keys: list[str], what: str) -> None:
    if keys:
        raise WeightsError(
            f"checkpoint does not fit: {what} {some(keys)}", "name the configuration it was trained with: --variant"
        )
