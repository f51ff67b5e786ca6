"""`python -m sprnet.benchmark`: latency, memory and instances per image."""

from sprnet.__main__ import run_verb

if __name__ == "__main__":
    run_verb("benchmark")
