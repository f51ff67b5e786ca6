"""`meinst VERB`, `python -m meinst VERB`; the verb files beside this make `python -m meinst.VERB` the same."""

import sys

from meinst.method import METHOD
from onestage.cli.app import main as run


def main() -> None:
    """Runs the verb that the command line names and leaves with its exit code."""
    sys.exit(run(METHOD))


def run_verb(verb: str) -> None:
    """Runs one verb with the process's command line and leaves with its exit code."""
    sys.exit(run(METHOD, verb))


if __name__ == "__main__":
    main()
