"""`python -m sprnet.train`: trains on a data set in COCO format."""

from sprnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("train")
