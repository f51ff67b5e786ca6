"""`python -m sprnet.demo`: trains on generated shapes and writes a page."""

from sprnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("demo")
