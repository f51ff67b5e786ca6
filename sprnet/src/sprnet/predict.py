"""`python -m sprnet.predict`: finds instances in images."""

from sprnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("predict")
