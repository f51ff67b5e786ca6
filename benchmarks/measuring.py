"""Times, peak memory and the machine's ceilings, for the benchmarks beside this; on the CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onestage.errors import UserError

try:
    from triton.errors import TritonError
except ImportError:  # no kernels on this platform
    TritonError = RuntimeError

Call = Callable[[], Any]

# What one measurement may raise while the others go on, and are recorded: a limit of the machine, or unequal results.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    TritonError,
    UserError,
)

L2_BYTES = 256 << 20  # written between two timed calls: more than any GPU's cache
SAMPLES = 20  # of a ceiling
LAUNCHES = 1000  # more than the host is ahead of a GPU that fills its cache


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def call_timer(device: torch.device, threads: int) -> Callable[[Call], float]:
    """A function that runs a call and says how many milliseconds it took.

    On a GPU between two events, with a cold cache; on the CPU CPU time with one thread, else wall time.
    """
    if device.type == "cuda":
        cold = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
        return lambda call: _between_events(call, cold)
    clock = time.process_time if threads == 1 else time.perf_counter

    def timed(call: Call) -> float:
        start = clock()
        call()
        return 1e3 * (clock() - start)

    return timed


def _between_events(call: Call, cold: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cold.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def graphed(call: Call) -> tuple[Call | None, str]:
    """A function that replays `call` as a CUDA graph; or None, and why it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    held: list[Any] = []  # outputs lie in the graph's memory
    try:
        with torch.cuda.graph(graph):
            held.append(call())
    except RuntimeError as error:  # what needs the host in between, such as a size that depends on values
        torch.cuda.synchronize()
        return None, str(error).splitlines()[0]

    def replay() -> Any:
        graph.replay()
        return held[0]

    return replay, ""


def num_launches(call: Call) -> int:
    """Kernels, copies and fills that a call starts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_megabytes(call: Call, device: torch.device) -> float:
    """How far a run exceeds what is there before it, MB: of the GPU's allocator, or of the process (Linux)."""
    if device.type == "cuda":
        call()  # what is made once and kept is no part of it
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status_megabytes("VmRSS")
    result = call()
    peak = _status_megabytes("VmHWM")
    del result
    return peak - before


def _status_megabytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(key))
    return int(line.split()[1]) / 1024


def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU does at best, measured: rates that floors are counted with, and the price of a launch."""
    timed = call_timer(device, 1)

    def best(call: Call) -> float:
        for _ in range(3):
            call()
        return statistics.median(timed(call) for _ in range(SAMPLES))

    found = {**_rates(device, best), **_launches(device, best)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"{name}_tflop_per_s"] = _products(device, dtype, best)
    return {name: round(value, 2) for name, value in found.items()}


def _rates(device: torch.device, best: Callable[[Call], float]) -> dict[str, float]:
    """GB/s; a copy reads and writes."""
    size = 1 << 30
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    part = source[: size >> 2]
    pinned = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
    return {
        "copy_gb_per_s": 2 * size / best(lambda: target.copy_(source)) / 1e6,
        "fill_gb_per_s": size / best(lambda: target.fill_(1)) / 1e6,
        "to_host_gb_per_s": len(part) / best(lambda: pinned.copy_(part, non_blocking=True)) / 1e6,
    }


def _launches(device: torch.device, best: Callable[[Call], float]) -> dict[str, float]:
    """Microseconds of a kernel that does nothing, launched and as a node of a graph."""
    one = torch.zeros(1, device=device)

    def burst() -> None:
        for _ in range(LAUNCHES):
            one.zero_()

    replay, refused = graphed(burst)
    assert replay is not None, refused
    return {"launch_us": 1e3 * best(burst) / LAUNCHES, "graph_node_us": 1e3 * best(replay) / LAUNCHES}


def _products(device: torch.device, dtype: torch.dtype, best: Callable[[Call], float]) -> float:
    """TFLOP/s of a large matrix product."""
    side = 8192
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / best(lambda: matrix @ matrix) / 1e9
