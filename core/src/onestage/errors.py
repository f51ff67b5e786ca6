"""Errors a user can act on: one line says what and why, one line says what to do.

The command line prints `error: {what}` and `  fix: {fix}` and leaves with `exit_code`; nothing else may
be raised for a mistake that is the user's (bad paths, bad files, bad values, a full disk).
"""


class UserError(Exception):
    """A failure its reader can mend.

    Args:
        what: One line: which file, key or index, and why (found, expected).
        fix: One line: what to do; names a command only if that command exists.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.what, self.fix)  # loader workers send errors to the main process


class UsageError(UserError):
    """A flag or argument that cannot be used as given."""

    exit_code = 2


class DatasetError(UserError):
    """Annotations or images that cannot be used as they are."""

    exit_code = 3


class WeightsError(UserError):
    """A weights file or checkpoint that is damaged, foreign or does not fit."""

    exit_code = 4


class MachineError(UserError):
    """Device, memory, disk or installation cannot do what was asked."""

    exit_code = 5


class CheckFailed(UserError):
    """A comparison or check that the user asked for did not hold."""

    exit_code = 6


def some(items: list[str], limit: int = 5) -> str:
    """Joins at most `limit` items and counts the rest: `a, b and 37 more`."""
    shown = ", ".join(items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
