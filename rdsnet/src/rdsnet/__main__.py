"""`rdsnet VERB`, `python -m rdsnet VERB`; the verb files beside this make `python -m rdsnet.VERB` the same."""

from onestage.cli.app import entry
from rdsnet.method import METHOD

main, run_verb = entry(METHOD)

if __name__ == "__main__":
    main()
