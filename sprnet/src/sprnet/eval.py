"""`python -m sprnet.eval`: AP of weights or of a results file."""

from sprnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("eval")
