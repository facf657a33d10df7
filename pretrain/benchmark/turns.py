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

Work = Callable[[], object]  # what is measured: one step
Contender = tuple[Callable[..., Work], tuple[Any, ...]]  # a module's function and its arguments
STATUS = Path("/proc/self/status")


class Figures(NamedTuple):
    """The figures of a contender."""

    seconds: list[float]  # of each counted turn
    peak_mib: float  # above what the process held after its imports: model, gradients, everything


def report(found: Mapping[str, Figures], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What a result says of contenders: ratios, and the ``seconds`` (medians) and ``peak_mib`` of each.

    Args:
        ratios: name with ``{}`` for ``time`` (median of the turns' ratios) and ``memory``; the contender above
            and the one below.
    """
    told: dict[str, Any] = {}
    for name, (a, b) in ratios.items():
        times = [x / y for x, y in zip(found[a].seconds, found[b].seconds)]
        told[name.format("time")] = round(median(times), 3)
        told[name.format("memory")] = round(found[a].peak_mib / found[b].peak_mib, 3)
    told["seconds"] = {name: round(median(figures.seconds), 4) for name, figures in found.items()}
    told["peak_mib"] = {name: round(figures.peak_mib, 1) for name, figures in found.items()}
    return told | {"threads": torch.get_num_threads()}


def in_turns(
    contenders: Mapping[str, Contender], device: str, rounds: int, warm_up: int = 1, steps: int = 1
) -> dict[str, Figures]:
    """Measure all contenders.

    Args:
        contenders: by name; the function makes the work in the contender's process. Its module's imports do
            not count as memory.
        device: of torch; on CUDA memory is what torch reports.
        rounds: turns of each that count, after ``warm_up`` that do not.
        steps: of the work in a turn; seconds are those of one.

    Raises:
        UserError: from a contender.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in contenders}
        for start in [processes[name].submit(_start, *how, device) for name, how in contenders.items()]:
            start.result()
        turns = [
            {name: process.submit(_turn, steps).result() for name, process in processes.items()}
            for _ in range(warm_up + rounds)
        ]
    return {
        name: Figures([turn[name][0] for turn in turns[warm_up:]], turns[-1][name][1]) for name in contenders
    }


_PROCESS: dict[str, Any] = {}  # of this one, between turns


def _start(make: Callable[..., Work], arguments: tuple[Any, ...], device: str) -> None:
    where = torch.device(device)
    _PROCESS.update(where=where, held=_used_mib(where), work=make(*arguments))


def _turn(steps: int) -> tuple[float, float]:
    """Seconds of a step, and the peak so far in MiB."""
    where: torch.device = _PROCESS["where"]
    settle(where)
    started = time.perf_counter()
    for _ in range(steps):
        _PROCESS["work"]()
    settle(where)
    return (time.perf_counter() - started) / steps, _used_mib(where, peak=True) - _PROCESS["held"]


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _used_mib(device: torch.device, peak: bool = False) -> float:
    """In use now or at most: by torch on CUDA, elsewhere by this process, from Linux's status file:
    ``getrusage`` there also counts what the parent held when this process started."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if STATUS.exists():
        found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", STATUS.read_text())
        assert found
        return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
