"""`python -m meinst.export`: the network for other runtimes, compared with the model."""

from meinst.__main__ import run_verb

if __name__ == "__main__":
    run_verb("export")
