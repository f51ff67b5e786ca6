"""`python -m rdsnet.predict`: finds instances in images."""

from rdsnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("predict")
