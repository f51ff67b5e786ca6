"""`python -m sais.predict`: finds instances in images."""

from sais.__main__ import run_verb

if __name__ == "__main__":
    run_verb("predict")
