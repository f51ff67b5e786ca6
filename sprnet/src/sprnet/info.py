"""`python -m sprnet.info`: the model card of a weights file."""

from sprnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("info")
