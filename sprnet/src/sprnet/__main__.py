"""`sprnet VERB`, `python -m sprnet VERB`; the verb files beside this make `python -m sprnet.VERB` the same."""

from onestage.cli.app import entry
from sprnet.method import METHOD

main, run_verb = entry(METHOD)

if __name__ == "__main__":
    main()
