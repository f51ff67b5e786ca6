"""`meinst VERB`, `python -m meinst VERB`; the verb files beside this make `python -m meinst.VERB` the same."""

from meinst.method import METHOD
from onestage.cli.app import entry

main, run_verb = entry(METHOD)

if __name__ == "__main__":
    main()
