"""`python -m sais.convert`: says that there is nothing to convert."""

from sais.__main__ import run_verb

if __name__ == "__main__":
    run_verb("convert")
