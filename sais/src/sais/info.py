"""`python -m sais.info`: the model card of a weights file."""

from sais.__main__ import run_verb

if __name__ == "__main__":
    run_verb("info")
