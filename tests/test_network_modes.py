"""Every package's network in the orders and modes that `onestage.engine.network` offers."""

from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from onestage.engine.network import GraphedNetwork, prepare_network
from onestage.errors import MachineError, UsageError

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
IMAGE = torch.randint(256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def small_model(package, device="cpu"):
    method = import_module(f"{package}.method").METHOD
    torch.manual_seed(0)
    return method.build(method.variants[method.demo_variant]).to(device).eval()


def tensors(raw):
    """All tensors of raw outputs, in order."""
    if isinstance(raw, torch.Tensor):
        return [raw]
    return [tensor for part in raw for tensor in tensors(part)] if isinstance(raw, (tuple, list)) else []


@pytest.mark.parametrize("package", PAPERS)
@pytest.mark.parametrize("how", [{"channels_last": True}, {"mode": "compile"}], ids=["channels last", "compiled"])
def test_outputs_are_those_of_the_eager_network(package, how, monkeypatch):
    # Tracing is what can go wrong here; code generation is torch's.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = small_model(package)
    pixels = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tensors(model.raw_outputs(pixels))
        prepare_network(model, **how)
        for ours, eager in zip(tensors(model.raw_outputs(pixels)), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert len(model.detect([IMAGE])) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("package", PAPERS)
def test_a_graph_replays_with_new_pixels(package):
    model = small_model(package, "cuda")
    eager, graphed = model.raw_outputs, GraphedNetwork(model.raw_outputs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):
            pixels = torch.randn(1, 3, 128, 160, generator=generator).cuda()
            expected = [tensor.clone() for tensor in tensors(eager(pixels))]
            for ours, once in zip(tensors(graphed(pixels)), expected, strict=True):
                torch.testing.assert_close(ours, once, rtol=2e-2, atol=2e-2)


def test_a_graph_needs_a_gpu_and_modes_have_names():
    model = small_model("sipmask")
    with pytest.raises(MachineError, match="needs a CUDA device"):
        prepare_network(model, mode="graph")
    with pytest.raises(UsageError, match="'fast' is unknown"):
        prepare_network(model, mode="fast")
