"""Where a run's numbers go: ``metrics.jsonl`` (what the run computed), ``speed.jsonl`` (how fast), TensorBoard, and the terminal.

``metrics.jsonl`` holds nothing that depends on the machine's speed, so a resumed run leaves the same bytes as an uninterrupted one.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_S = 20  # between progress lines where there is no terminal


def truncate_lines(path: Path, before_it: int) -> None:
    """Drop a log's lines of iterations >= ``before_it`` (they will be computed again), and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] < before_it:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


class MetricsLog:
    """Writes the logs of one run from iteration ``start_it`` on; only the main process should hold one."""

    def __init__(self, folder: Path, start_it: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, TextIO] = {}
        for name in ("metrics", "speed"):
            path = folder / f"{name}.jsonl"
            truncate_lines(path, start_it)
            self.files[name] = open(path, "a")
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_it)

    def write(self, name: str, iteration: int, values: Mapping[str, float]) -> None:
        """One line of ``metrics`` or ``speed``, and the same as TensorBoard scalars."""
        self.files[name].write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(f"{name}/{key}", value, iteration)

    def flush(self) -> None:
        """Everything so far reaches the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in self.files.values():
            file.close()
        if self.writer is not None:
            self.writer.close()


class ProgressLine:
    """Progress with ETA, img/s and the loss: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, title: str, total_it: int, start_it: int) -> None:
        self.total_it, self.title, self.told = total_it, title, 0.0
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(title, total=total_it, completed=start_it, note="")

    def update(self, done_it: int, note: str, eta_s: float) -> None:
        """``done_it`` iterations are done. Shown at most every second, or every ``QUIET_S`` off a terminal; the last one always."""
        pause_s = 1 if self.bar is not None else QUIET_S
        if done_it < self.total_it and time.time() - self.told < pause_s:
            return
        self.told = time.time()
        if self.bar is not None:
            self.bar.update(self.task, completed=done_it, note=note)
        else:
            print(f"{self.title} {done_it}/{self.total_it} {note} eta {eta_s:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
