"""What a run tells its user: lines from the first rank alone, and one progress bar.

Lines go through :mod:`logging`: the logger ``posfield`` to stderr (:func:`log`), ``posfield.results`` to
stdout (:func:`say`). Whoever embeds posfield sets these loggers' handlers.
"""

import logging
import os
import sys
import time
import weakref
from collections.abc import Iterator

import torch.distributed as dist
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from pretrain.errors import Interrupted
from pretrain.signals import StopSignals

QUIET_S = 20  # between progress lines where there is no terminal
SAY_EVERY_S = 10.0  # the same, of an evaluation


class _Lines(logging.Handler):
    """Plain lines to what ``sys.stdout`` or ``sys.stderr`` is at that moment."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self.stream), flush=True)


def _is_first_rank(record: logging.LogRecord) -> bool:
    """The ranks may not have met yet: torchrun has numbered them."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def _logger(name: str, stream: str) -> logging.Logger:
    logger, handler = logging.getLogger(name), _Lines(stream)
    handler.addFilter(_is_first_rank)
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False
    return logger


log = _logger("posfield", "stderr").info
say = _logger("posfield.results", "stdout").info


def in_words(seconds: float) -> str:
    """A duration for people: ``2 d 03 h``, ``1 h 02 min``, ``3 min 20 s``, ``12 s``."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


class _Display(RichProgress):
    """A bar, and a line of text below it."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """What rich draws."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.note)


class ProgressLine:
    """How far a run is: a bar and a line of numbers on a terminal, a plain line now and then elsewhere.

    Args:
        console: where to; stderr without.
    """

    def __init__(self, title: str, total: int, done: int = 0, console: Console | None = None) -> None:
        self.total, self.title, self.told = total, title, 0.0
        self.console = console or Console(stderr=True)
        self.bar: _Display | None = None
        if self.console.is_terminal:
            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"))
            self.bar = _Display(*columns, console=self.console)
            self.bar.start()
            weakref.finalize(self, self.bar.stop)
            self.task = self.bar.add_task(title, total=total, completed=done, eta="")

    def update(self, done: int, note: str, eta_s: float) -> None:
        """``done`` steps are done. Shown every second, or every ``QUIET_S`` off a terminal, and at the end."""
        pause_s = 1 if self.bar is not None else QUIET_S
        if done < self.total and time.time() - self.told < pause_s:
            return
        self.told = time.time()
        left = f"{in_words(eta_s)} left" if done < self.total else "done"
        if self.bar is not None:
            self.bar.note = note
            self.bar.update(self.task, completed=done, eta=left)
        else:
            print(f"{self.title} {done}/{self.total}  {note}  {left}", file=self.console.file, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


class Progress(ProgressLine):
    """How far an evaluation is: a bar on a terminal, elsewhere a line on stdout every ten seconds and at the
    end. A signal stops the work."""

    def __init__(
        self, label: str, total: int, signals: StopSignals | None = None, unit: str = "images"
    ) -> None:
        super().__init__(label, total, console=Console())
        self.signals, self.unit = signals, unit
        self.done, self.started = 0, time.monotonic()
        self.said = self.started

    def __call__(self, n: int = 1) -> None:
        """``n`` more are done.

        Raises:
            Interrupted: there was a signal, and something is left to do.
        """
        self.done += n
        now, so_far = time.monotonic(), f"{self.done} of {self.total} {self.unit}"
        each_s = (now - self.started) / self.done
        is_stopped = self.signals is not None and self.signals.received
        if self.bar is not None:
            self.update(self.done, f"{each_s:.2f} s each", (self.total - self.done) * each_s)
        elif now - self.said > SAY_EVERY_S or self.done == self.total:
            say(f"{self.title}: {so_far}, {each_s:.2f} s each")
            self.said = now
        if self.done >= self.total or is_stopped:
            self.close()
        if is_stopped and self.done < self.total:
            raise Interrupted(f"{is_stopped} at {self.title}, after {so_far}; the same command goes on")
