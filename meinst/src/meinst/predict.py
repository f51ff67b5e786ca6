"""`python -m meinst.predict`: finds instances in images."""

from meinst.__main__ import run_verb

if __name__ == "__main__":
    run_verb("predict")
