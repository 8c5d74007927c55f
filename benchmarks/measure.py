"""How things are measured: interleaved runs, medians and spread, what the machine can do at most, tables.

Two things that are compared are run in turns, so that a busy or throttling machine hits both alike. A ratio is the
median over the rounds of the ratio within each round; its spread is the interquartile range (IQR) of those.
"""

import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


logger = logging.getLogger(__name__)

# Dense bfloat16 peak in FLOP/s by the makers' data sheets, for MFU only; every other limit is measured.
DATASHEET_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class Place:
    """Where and in which dtype a benchmark runs."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()


def choose_place(device: str) -> Place:
    """float32 on the CPU, bfloat16 on a GPU.

    Raises:
        ValueError: another device, or CUDA that torch does not see.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not one of cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no CUDA device on this machine")
    return Place(torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)


def describe_machine(place: Place) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    facts: dict[str, Any] = {
        "device": place.device.type,
        "dtype": str(place.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if place.is_cuda:
        properties = torch.cuda.get_device_properties(place.device)
        facts |= {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    else:
        facts["name"] = facts["cpu"]
    return facts


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def recorded(notes: dict[str, str], name: str) -> Iterator[None]:
    """What goes wrong in one of several measurements is written down, and must not cost the others' figures."""
    try:
        yield
    except Exception as error:
        logger.info("%s failed", name, exc_info=True)
        notes[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# -------------------------------------------------------------------------------------------------------------- timing


Times = dict[str, list[float]]


def interleave(
    functions: dict[str, Callable[[], Any]],
    place: Place,
    *,
    rounds: int = 7,
    seconds: float = 60.0,
    warm_up: int = 1,
    calls: int = 1,
) -> Times:
    """Seconds of each function, run in turns; the order turns round from one round to the next.

    Args:
        rounds: at most so many rounds; at least three are made, whatever they take.
        seconds: no new round begins after so long.
        calls: calls per measurement, for functions too short for the clock.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    place.wait()
    times: Times = {name: [] for name in functions}
    names = list(functions)
    begin = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(_time(functions[name], place, calls))
    return times


def _time(function: Callable[[], Any], place: Place, calls: int) -> float:
    place.wait()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    place.wait()
    return (time.perf_counter() - begin) / calls


def median(values: list[float]) -> float:
    return statistics.median(values)


def quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, high


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median and IQR of over / under, round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": median(ratios), "iqr": list(quartiles(ratios)), "rounds": len(ratios)}


def row(what: str, against: str, over: list[float], under: list[float], **more: Any) -> dict[str, Any]:
    """One line of a result: `what` costs `ratio` times what `against` costs. `goal`: at most (or at_least) so much."""
    return {"what": what, "against": against, **ratio(over, under), "seconds": median(over), **more}


def run_child(module: str, mode: str, *arguments: str) -> dict[str, Any]:
    """`python -m MODULE MODE ARGUMENTS` in a process of its own, whose memory it gives back; its last line, as JSON.

    Raises:
        RuntimeError: it failed; with its last word.
    """
    done = subprocess.run([sys.executable, "-m", module, mode, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, out of memory perhaps"]
        raise RuntimeError(f"{module} {mode} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------- what is possible


def peak_flops(place: Place, tokens: int, shapes: list[tuple[int, int]], seconds: float = 3.0) -> float:
    """FLOP/s of the fastest of the products [tokens, inputs] x [inputs, outputs] that a model makes of `shapes`."""
    best = 0.0
    for inputs, outputs in shapes:
        flops = 2 * tokens * inputs * outputs
        calls = max(1, int(2e12 / flops)) if place.is_cuda else 1
        with torch.no_grad():
            times = interleave(
                {"product": product_of(place, tokens, inputs, outputs)},
                place,
                rounds=9,
                seconds=seconds / len(shapes),
                calls=calls,
            )
        best = max(best, flops / min(times["product"]))
    return best


def product_of(place: Place, tokens: int, inputs: int, outputs: int) -> Callable[[], torch.Tensor]:
    """The product [tokens, inputs] x [inputs, outputs] of random matrices."""
    x = torch.randn(tokens, inputs, device=place.device, dtype=place.dtype)
    w = torch.randn(outputs, inputs, device=place.device, dtype=place.dtype)
    return lambda: F.linear(x, w)


def peak_bandwidth(place: Place, gigabytes: float = 1.0) -> float:
    """Bytes/s of the fastest of: summing a large tensor, multiplying a large matrix by a vector, copying."""
    rows = int(gigabytes * 1e9 / 4 / 8192)
    matrix = torch.ones(rows, 8192, device=place.device)
    vector = torch.ones(8192, device=place.device)
    target = torch.empty_like(matrix)
    size = matrix.numel() * 4
    times = interleave(
        {"sum": matrix.sum, "product": lambda: matrix @ vector, "copy": lambda: target.copy_(matrix)}, place, rounds=9
    )
    moved = {"sum": size, "product": size, "copy": 2 * size}
    return max(moved[name] / min(values) for name, values in times.items())


# ------------------------------------------------------------------------------------------------------- CUDA graphs


def captured(function: Callable[[], Any], place: Place) -> Callable[[], Any]:
    """The function as one CUDA graph, so that the host's launches cost nothing; on the CPU the function itself."""
    if not place.is_cuda:
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()  # its memory belongs to the graph

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


# ------------------------------------------------------------------------------------------------------------- tables


def goal_text(entry: dict[str, Any]) -> str:
    """'<= 1.03 yes': the goal of a row and whether its median meets it."""
    if "at_most" in entry:
        return f"<= {entry['at_most']:g} {'yes' if entry['ratio'] <= entry['at_most'] else 'no'}"
    if "at_least" in entry:
        return f">= {entry['at_least']:g} {'yes' if entry['ratio'] >= entry['at_least'] else 'no'}"
    return ""


def readable_seconds(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.0f} us"
    )
