"""Exports one R-50 of each method to ONNX and torch.export, runs both and keeps what differs, as a record a package.

Random parameters: it shows that the runtimes compute what the model computes, and says nothing about accuracy. Inputs
are 480 x 640 and 640 x 480 (SAIS, whose inputs are square: 480 x 480). `python -m PACKAGE.export` does the work and the
comparing; a record says whether all differences were as small as they have to be (`held`).

    python benchmarks/export.py rdsnet --weights runs/rdsnet/demo/.../best.safetensors

does the same with a network that has learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from onestage.errors import CheckFailed
from onestage.files import file_digest
from onestage.method import Method
from onestage.tables.record import write_record

PACKAGES = ("sprnet", "meinst", "sais", "rdsnet", "sipmask")
SIZE = 480  # px, shorter side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "export")
    parser.add_argument("--weights", type=Path, help="of one package; default: random parameters of an R-50")
    options = parser.parse_args()
    if options.weights and len(options.packages) != 1:
        parser.error("--weights needs the one PACKAGE whose they are")
    for package in options.packages or PACKAGES:
        method: Method = import_module(f"{package}.method").METHOD
        network = ["--weights", str(options.weights)] if options.weights else ["--variant", method.default_variant]
        print(f"record: {write(package, network, options.results)}", flush=True)


def write(package: str, network: list[str], results: Path, *flags: str) -> Path:
    """Exports one network, a variant or weights, in a process of its own and writes its record."""
    words = [*network, "--size", str(SIZE), "--format", "both", *flags]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"{package}.export", *words, "--output", folder, "--json"]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if code not in (0, CheckFailed.exit_code):
            raise SystemExit(code)
        found = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8")) | {"held": code == 0}
    libraries = {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    name, weights = f"export-{package}", "random"
    if network[0] == "--weights":
        name, weights = f"{name}-trained", file_digest(network[1])
        words[1] = found["weights"] = weights  # wherever the file lay
    body = {"kind": "export", "weights": weights, "results": found, "libraries": libraries}
    return write_record(results, name, {"package": package, "flags": words}, body)


if __name__ == "__main__":
    main()
