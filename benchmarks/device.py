"""Timing and hardware of a CPU or a CUDA device: CUDA events after warm-up, interleaved as in ``common.interleave``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.common import ROUNDS, Times

NOMINAL = 790e12
"""Dense bfloat16 operations per second that an H200 reaches in practice, according to published measurements."""


def synchronize(device: str) -> None:
    """Wait until all work queued on the device is done."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _one(function: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of one call on the device's clock, and of this process's processors."""
    import torch

    processor = time.process_time()
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3, time.process_time() - processor
    wall = time.perf_counter()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def timed(
    sides: Mapping[str, Callable[[], Any]], device: str, rounds: int = ROUNDS, budget: Callable[[], float] | None = None
) -> dict[str, Times]:
    """Time every function once a round, in alternating order, after one untimed call of each.

    ``budget`` says how many seconds are left; ``TimeoutError`` when they will not do for all rounds.
    """
    if rounds < ROUNDS:
        raise ValueError(f"{rounds} rounds are too few to tell signal from noise; use at least {ROUNDS}")
    for function in sides.values():
        function()
    synchronize(device)
    if budget is not None:
        begin = time.perf_counter()
        for function in sides.values():
            function()
        synchronize(device)
        needed = rounds * (time.perf_counter() - begin)
        if needed > budget():
            raise TimeoutError(f"{rounds} rounds take {needed:.0f} s, {max(budget(), 0):.0f} s are left")
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            spent[name].append(_one(sides[name], device))
    return {name: Times(*np.array(values).T) for name, values in spent.items()}


def matmul_rate(size: int, dtype: Any, device: str = "cpu") -> float:
    """The peak rate of a square matrix product on this machine, in operations per second."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / timed({"matmul": lambda: a @ b}, device)["matmul"].best)


def peak_memory(function: Callable[[], Any], device: str) -> int | None:
    """Peak number of bytes allocated on a CUDA device while ``function`` runs; None on other devices."""
    import torch

    if not device.startswith("cuda"):
        function()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


@contextmanager
def counting_syncs(device: str) -> Iterator[list[str]]:
    """Collect the places ("file:line") where the host waits for a CUDA device inside the block; empty on other devices."""
    import torch

    places: list[str] = []
    if not device.startswith("cuda"):
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [
        f"{warning.filename.rsplit('/', 1)[-1]}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    ]


def hardware(device: str) -> dict[str, Any]:
    """Name, driver, clocks and memory of the device, and versions; None for what the driver does not report."""
    import torch

    from rawdream_env.evaluation.reporting.provenance import provenance

    out: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        out |= {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
        for name, ask in _DRIVER.items():
            try:
                out[name] = ask(device)
            except Exception:  # without NVIDIA's management library
                out[name] = None
    else:
        out["name"] = provenance()["hardware"]["cpu"]
    return out


def _driver_version(_: str) -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]


def _clock(device: str) -> int:
    import torch

    return torch.cuda.clock_rate(device)


_DRIVER: dict[str, Callable[[str], Any]] = {"driver, max clock, power limit": _driver_version, "clock_mhz": _clock}
