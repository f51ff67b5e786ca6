"""`sais VERB`, `python -m sais VERB`; the verb files beside this make `python -m sais.VERB` the same."""

from onestage.cli.app import entry
from sais.method import METHOD

main, run_verb = entry(METHOD)

if __name__ == "__main__":
    main()
