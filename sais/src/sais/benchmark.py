"""`python -m sais.benchmark`: latency, memory and instances per image."""

from sais.__main__ import run_verb

if __name__ == "__main__":
    run_verb("benchmark")
