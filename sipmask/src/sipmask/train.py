"""`python -m sipmask.train`: trains on a data set in COCO format, the video variants on one in YouTube-VIS
format.
"""

from sipmask.__main__ import run_verb

if __name__ == "__main__":
    run_verb("train")
