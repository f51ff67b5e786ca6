"""`python -m sipmask.predict`: finds instances in images."""

from sipmask.__main__ import run_verb

if __name__ == "__main__":
    run_verb("predict")
