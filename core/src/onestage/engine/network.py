"""How the network part of a model runs: step by step, compiled, or as a CUDA graph.

Every model has `raw_outputs(pixels)`, from normalised, padded pixels [B, 3, H, W] to the tensors that decoding starts
from. It has fixed shapes and most of the time goes there, so this is the part that is compiled or captured; selection
of detections has shapes that depend on values and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from onestage.errors import MachineError, UsageError

Mode = Literal["eager", "compile", "graph"]
MODES = ("eager", "compile", "graph")
WARMUP = 3  # runs before a capture: libraries choose their algorithms, kernels are compiled
MAX_GRAPHS = 64  # of a network; images of COCO have some fifty padded sizes

Network = Callable[[Tensor], Any]


def prepare_network(model: Any, *, mode: Mode = "eager", channels_last: bool = False) -> None:
    """Changes how `model.raw_outputs` runs, in place; "compile" is for training too.

    Args:
        model: A module with `raw_outputs`, on its device, in eval mode (but for "compile").
        mode: "eager"; "compile", by `torch.compile`, compiled anew for a new input size; "graph", captured as a CUDA
            graph for each input size and replayed. Graphs write their outputs into memory that they share: for one
            thread, and for outputs that are used before the next call.
        channels_last: Weights and pixels in that order, which convolutions in half types want.

    Raises:
        UsageError: another mode.
        MachineError: "graph" for a model that is not on a GPU.
    """
    if mode not in MODES:
        raise UsageError(f"mode '{mode}' is unknown", f"use one of {', '.join(MODES)}")
    network: Network = model.raw_outputs
    if channels_last:
        model.to(memory_format=torch.channels_last)
        network = _in_channels_last(network)
    if mode == "compile":
        network = torch.compile(network)
    elif mode == "graph":
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise MachineError(f"mode 'graph' needs a CUDA device, the model is on '{device}'", "use eager or compile")
        network = GraphedNetwork(network)
    object.__setattr__(model, "raw_outputs", network)


class GraphedNetwork:
    """Captures a function of one tensor as a CUDA graph for each shape and type, and replays it.

    Graphs take turns, so they share the memory of what lies between their inputs and their outputs. Of more than
    `MAX_GRAPHS` the one that was not used for longest is captured anew when its turn comes.

    Args:
        network: Without host synchronisation, its outputs in tuples, lists and named tuples.
    """

    def __init__(self, network: Network):
        self.network = network
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}  # last used last
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, pixels: Tensor) -> Any:
        """Outputs for `pixels`, in memory that the next call overwrites."""
        half = torch.is_autocast_enabled("cuda")
        key = (pixels.shape, pixels.dtype, pixels.device, half and torch.get_autocast_dtype("cuda"))
        captured = self._graphs.pop(key, None)
        if captured is None:
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            with torch.cuda.device(pixels.device):  # libraries look at the current one, which may be another
                captured = self._capture(pixels)
        graph, stored, outputs = self._graphs[key] = captured
        stored.copy_(pixels)
        graph.replay()
        return outputs

    def _capture(self, pixels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        stored = pixels.clone()
        autocast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"))
        stream = _capture_stream(pixels.device)
        stream.wait_stream(torch.cuda.current_stream(pixels.device))
        with torch.cuda.stream(stream), torch.no_grad(), autocast:
            for _ in range(WARMUP):
                self.network(stored)
        torch.cuda.current_stream(pixels.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Weights cast before the capture would be freed with an outer autocast: casting belongs into the graph.
        torch.clear_autocast_cache()
        with torch.no_grad(), autocast, torch.cuda.graph(graph, pool=self._pool, stream=stream):
            outputs = self.network(stored)
        torch.clear_autocast_cache()
        return graph, stored, outputs


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a GPU that graphs are captured on: only captures of one stream share memory."""
    return torch.cuda.Stream(device)


def _in_channels_last(network: Network) -> Network:
    def run(pixels: Tensor) -> Any:
        return network(pixels.contiguous(memory_format=torch.channels_last))

    return run
