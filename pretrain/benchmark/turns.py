"""Measure contenders that take turns, each in its own process.

The peak memory of a process never decreases, hence the processes. Other load on the machine affects all
contenders alike, hence the turns.
"""

import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

Work = Callable[[], None]  # what is measured: one step
STATUS = Path("/proc/self/status")


class Figures(NamedTuple):
    """The figures of a contender."""

    seconds: list[float]  # of each counted turn
    peak_mib: float  # above what the process held after its imports: model, gradients, everything

    def shown(self) -> dict[str, float]:
        """Rounded median and peak."""
        return {"seconds": round(median(self.seconds), 3), "peak_mib": round(self.peak_mib, 1)}


def ratio(ours: Figures, theirs: Figures) -> dict[str, float]:
    """Time (median of the turns' ratios) and memory, ours over theirs."""
    times = [a / b for a, b in zip(ours.seconds, theirs.seconds)]
    return {"time": round(median(times), 3), "memory": round(ours.peak_mib / theirs.peak_mib, 3)}


def in_turns(
    contenders: Mapping[str, tuple[Callable[..., Work], tuple[Any, ...]]], device: str, rounds: int
) -> dict[str, Figures]:
    """Measure all contenders.

    Args:
        contenders: name -> a module's function and its arguments; it makes the work in the contender's
            process. The module's imports do not count as memory.
        device: of torch; on CUDA memory is what torch reports.
        rounds: turns of each that count, after one that does not.

    Raises:
        UserError: from a contender.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in contenders}
        starts = [
            processes[name].submit(_start, *contender, device) for name, contender in contenders.items()
        ]
        for start in starts:
            start.result()
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, float] = {}
        for turn in range(rounds + 1):
            for name, process in processes.items():
                taken, peaks[name] = process.submit(_turn).result()
                seconds[name] += [taken] if turn else []
    return {name: Figures(seconds[name], peaks[name]) for name in contenders}


_PROCESS: dict[str, Any] = {}  # of this one, between turns


def _start(make: Callable[..., Work], arguments: tuple[Any, ...], device: str) -> None:
    where = torch.device(device)
    _PROCESS.update(where=where, held=held_mib(where), work=make(*arguments))


def _turn() -> tuple[float, float]:
    """Seconds of this turn, and the peak so far in MiB."""
    where: torch.device = _PROCESS["where"]
    started = time.perf_counter()
    _PROCESS["work"]()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, peak_mib(where) - _PROCESS["held"]


def held_mib(device: torch.device) -> float:
    """MiB in use now: by torch on CUDA, by this process elsewhere."""
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else _of_process("VmRSS")


def peak_mib(device: torch.device) -> float:
    """Peak MiB in use."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _of_process("VmHWM")


def _of_process(key: str) -> float:
    """MiB from Linux's status file: ``getrusage`` there also counts what the parent held when this process
    started."""
    if STATUS.exists():
        found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
        assert found, key
        return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
