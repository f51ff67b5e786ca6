"""What a capture is asked of torch, on a machine without a GPU; and on one with two, graphs of both."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from onestage.engine import network
from onestage.engine.network import GraphedNetwork


@dataclass
class Captures:
    """The current device, and of each capture: that device, its stream and its pool; and what was replayed."""

    device: torch.device | None = None
    made: list = field(default_factory=list)
    replayed: list = field(default_factory=list)


@pytest.fixture
def captures(monkeypatch):
    """Stands in for the part of `torch.cuda` that captures graphs; tensors are on the CPU."""
    seen = Captures()

    @contextmanager
    def on_device(device):
        seen.device = device
        yield
        seen.device = None

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            seen.replayed.append(self)

    @contextmanager
    def capture(graph, pool=None, stream=None):
        seen.made.append((seen.device, stream, pool))
        yield

    @contextmanager
    def on_stream(stream):
        yield

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    network._capture_stream.cache_clear()
    yield seen
    network._capture_stream.cache_clear()


def test_a_graph_is_captured_on_the_device_of_its_pixels(captures):
    GraphedNetwork(lambda pixels: pixels * 2)(torch.ones(2))
    ((current, stream, _),) = captures.made
    assert current == stream.device == torch.device("cpu")
    assert captures.device is None


def test_graphs_of_a_network_share_their_memory(captures):
    graphed = GraphedNetwork(lambda pixels: pixels * 2)
    for size in (1, 2, 3):
        assert torch.equal(graphed(torch.ones(size)), torch.full((size,), 2.0))
    (first, *others) = captures.made
    assert first[2] == "pool"
    assert others == [first, first]


def test_the_graph_that_was_not_used_for_longest_makes_room(captures, monkeypatch):
    monkeypatch.setattr(network, "MAX_GRAPHS", 2)
    graphed = GraphedNetwork(lambda pixels: pixels * 2)
    for size in (1, 2, 1, 3, 1):  # 2 goes when 3 comes
        graphed(torch.ones(size))
    assert len(captures.made) == 3
    graphed(torch.ones(2))
    assert len(captures.made) == 4
    assert len(captures.replayed) == 6


@pytest.mark.gpu
def test_a_graph_of_another_gpu_than_the_current_one_replays():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    graphed = GraphedNetwork(lambda pixels: pixels * 2)
    for number in (1, 0, 1):
        pixels = torch.rand(3, device=f"cuda:{number}")
        assert torch.equal(graphed(pixels), pixels * 2)
