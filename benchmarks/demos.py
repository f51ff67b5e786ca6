"""Keeps a demo's outcome as a record: `python -m sipmask.demo --json | python benchmarks/demos.py`.

The numbers are AP on generated shapes: they say that a method learns, nothing about photographs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "demos"


def main() -> None:
    outcome = json.loads(sys.stdin.readlines()[-1])
    run = Path(outcome.pop("run"))
    outcome.pop("page")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    package = environment["command"].split("-m ")[1].split(".")[0]
    digest = hashlib.sha256(json.dumps(config["model"], sort_keys=True).encode()).hexdigest()
    record = {
        "schema": 1,
        "kind": "accuracy",
        "package": package,
        "smoke": True,
        "data": "generated shapes, not COCO: 3 categories, 128 px, 100 held-out images",
        "ours": outcome,
        "config": config["model"],
        "config_sha256": digest,
        "environment": environment,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{package}-{digest[:12]}-{environment['commit'][:7]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
