"""`python -m onestage.tables table1 sipmask --profile smoke`: repeats tables of the papers."""

import sys

from onestage.cli.tables import main

if __name__ == "__main__":
    sys.exit(main())
