"""Parameters and multiply-adds of every variant of the five methods; nothing is computed and no memory is taken.

An image of 640 x 480 goes through each variant's own resizing and padding, and the network runs on fake tensors of that
size, in training mode: mask coefficients or codes at every location, as the papers have it, where prediction computes
them for kept objects only. Not counted: what follows the dense maps (NMS, assembling and decoding masks, SPRNet's
decoder, which runs once per object) and the sampling of deformable convs. torch counts two FLOP for a multiply-add;
papers call one a FLOP, so the table has multiply-adds. Writes one record to results/networks/ and prints a table.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from onestage.method import Method
from onestage.tables.record import write_record
from onestage.transforms import prepare_batch

PACKAGES = ("sprnet", "meinst", "sais", "rdsnet", "sipmask")
IMAGE = (480, 640)  # height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "networks")
    options = parser.parse_args()
    print("| network | input | parameters, M | multiply-adds, G |\n| --- | --- | --- | --- |")
    results = []
    for package in options.packages or PACKAGES:
        method: Method = importlib.import_module(f"{package}.method").METHOD
        for variant, config in method.variants.items():
            found = {"package": package, "variant": variant, **cost(method, config)}
            results.append(found)
            size = " x ".join(map(str, found["input"]))
            numbers = f"{found['parameters'] / 1e6:.1f} | {found['multiply_adds'] / 1e9:.1f}"
            print(f"| {package} {variant} | {size} | {numbers} |", flush=True)
    protocol = {"image": IMAGE, "mode": "training", "counter": "torch.utils.flop_counter, halved"}
    configuration = {"protocol": protocol, "networks": [[r["package"], r["variant"]] for r in results]}
    path = write_record(options.results, "networks", configuration, {"kind": "networks", "results": results})
    print(f"record: {path}")


def cost(method: Method, config: Any) -> dict[str, Any]:
    """Size of the network's input (height, width), number of parameters, and multiply-adds of one image."""
    shape = prepare_batch([torch.zeros(3, *IMAGE, dtype=torch.uint8)], None, config.input, training=False).pixels.shape
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: deformable})
    with FakeTensorMode():
        model: Any = method.build(config).train()
        with torch.no_grad(), counter:
            model.raw_outputs(torch.zeros(shape))
    return {
        "input": tuple(shape[2:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def deformable(x_shape: Any, weight_shape: Any, *rest: Any, out_shape: Any, **names: Any) -> int:
    """FLOP of a deformable conv, counted as a plain one."""
    return conv_flop_count(x_shape, weight_shape, out_shape)


if __name__ == "__main__":
    main()
