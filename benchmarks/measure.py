"""What the benchmarks share: interleaved rounds, ratios with their spread, peak memory, facts of the machine; knows no
model and nothing of what is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

Summary = dict[str, float]
# A turn of a contender takes at least this long, so that the clock's own jitter does not count.
SHORTEST_TURN = 0.01


class Timer:
    """Seconds of a call, until an accelerator has done its part."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def wait(self) -> None:
        """Until everything that was launched is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, run: Callable[[], Any], times: int = 1) -> float:
        """Seconds of a call, the mean of `times` calls."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self.wait()
        return (time.perf_counter() - start) / times


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, timer: Timer, shortest: float = SHORTEST_TURN
) -> dict[str, list[float]]:
    """
    Seconds a call of each contender in each round, in which each has one turn; who begins changes from round to round.

    Before the first round each runs once for nothing, and a quick one once more, to see how many calls make a turn of
    `shortest` seconds.
    """
    names, times = list(contenders), dict.fromkeys(contenders, 1)
    for name, run in contenders.items():
        if timer(run) < shortest:
            times[name] = max(1, int(shortest / max(timer(run), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in rotated(names, number):
            seconds[name].append(timer(contenders[name], times[name]))
    return seconds


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The names, another one first in every second round and the other way round in between: neighbours change too."""
    turn = number // 2 % len(names)
    order = [*names[turn:], *names[:turn]]
    return order[::-1] if number % 2 else order


def spread(values: Sequence[float], digits: int = 4) -> Summary:
    """Median, quartiles and range, to so many significant digits, and the number of values."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    found = {"median": median, "min": min(values), "max": max(values), "q25": low, "q75": high}
    return {name: float(f"{value:.{digits}g}") for name, value in found.items()} | {"n": len(values)}


def ratio(seconds: Mapping[str, Sequence[float]], over: str, under: str, seed: int = 0) -> Summary:
    """The rounds' own ratios of two contenders, with a 95 % bootstrap interval of their median."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, high = median_interval(ratios, seed)
    return spread(ratios) | {"low": float(f"{low:.4g}"), "high": float(f"{high:.4g}")}


def median_interval(values: Sequence[float], seed: int = 0, resamples: int = 4000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (resamples, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def log_slope(amounts: Sequence[float], costs: Sequence[float]) -> float:
    """Least-squares slope of log cost over log amount: 1 is linear growth, 0 none."""
    return round(float(np.polyfit(np.log(amounts), np.log(costs), 1)[0]), 3)


class PeakMemory:
    """Bytes by which memory peaked above its start within the block: of the device, or the process's resident set."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is counted again when it is taken again
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_error: object) -> None:
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else resident("VmHWM")
        self.bytes = peak - self._before


def resident(field: str) -> int:
    """A field of this process's memory accounting, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can only be measured on Linux.")


def available_bytes(device: str | torch.device = "cpu") -> int:
    """Memory that can still be taken."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: memory can only be measured on Linux.")


def faster_dtype(width: int, rows: int, device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 or float32, whichever multiplies `rows` by a matrix of a model of this width faster here."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, width, generator=generator).to(device) for size in (rows, 3 * width))
    runs = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = left.to(dtype), right.to(dtype)
        runs[str(dtype)] = lambda a=a, b=b: a @ b.t()
    seconds = interleaved(runs, 9, Timer(device), shortest=0.002)
    fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return getattr(torch, fastest.removeprefix("torch."))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it new tensors are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def processor_name() -> str:
    """The processor as the system calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str | torch.device) -> str:
    """The accelerator's name, or the processor's."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor_name()


def machine(device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
    """What has to be known of where a measurement was made."""
    libraries = ("torch", "transformers", "numpy")
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in libraries},
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "seed": seed,
    }


def add_arguments(parser: argparse.ArgumentParser, rounds: int, threads: int = 2) -> None:
    """The arguments of every benchmark."""
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds; default: %(default)s")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--seed", type=int, default=0)


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Sets threads and seed; gives what a result file begins with."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    hidden = ("json", "seed", "threads")
    settings = {name: plain(value) for name, value in vars(args).items() if name not in hidden}
    return {"about": machine(args.device, args.seed), "settings": settings}


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def target(ratio_name: str, **bound: Any) -> dict[str, Any]:
    """
    What a ratio ought to be: `at_least` or `at_most`, in the cells where the fields `where` have these values.

    A report looks for the ratio in each cell and says whether its median keeps to the bound.
    """
    return {"ratio": ratio_name, **bound}


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result file, if one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def shown(summary: Mapping[str, float], digits: int = 3) -> str:
    """A summary as text: median and range."""
    return f"{summary['median']:.{digits}f} ({summary['min']:.{digits}f} to {summary['max']:.{digits}f})"
