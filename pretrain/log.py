"""What a run tells its user: lines from the first rank alone, one progress bar, and a file of what libraries warn of.

Lines go through :mod:`logging`: the logger ``posfield`` to stderr (:func:`log`), ``posfield.results`` to
stdout (:func:`say`). Whoever embeds posfield sets these loggers' handlers. Nothing here loads torch.
"""

import logging
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from pretrain.errors import Interrupted, UserError

if TYPE_CHECKING:
    from pretrain.signals import StopSignals

QUIET_S = 15.0  # between progress lines where there is no terminal
QUIET = "POSFIELD_PROGRESS_S"  # an environment variable that says it otherwise
SAY_EVERY_S = 10.0  # the same, of an evaluation
WARNINGS = "warnings.txt"


class _Lines(logging.Handler):
    """Plain lines to what ``sys.stdout`` or ``sys.stderr`` is at that moment."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self.stream), flush=True)


def _is_first_rank(record: logging.LogRecord) -> bool:
    """The ranks may not have met yet: torchrun has numbered them."""
    dist = sys.modules.get("torch.distributed")
    have_met = dist is not None and dist.is_initialized()
    return (dist.get_rank() if dist and have_met else int(os.environ.get("RANK", "0"))) == 0


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


@contextmanager
def warnings_into(folder: Path) -> Iterator[None]:
    """Inside, what libraries warn of goes into ``warnings.txt`` in a run's folder, each line once, and not on the
    terminal, whose bar it would tear. A line says so when there is the first."""
    handler, root = _Warnings(folder / WARNINGS), logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


class _Warnings(logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True)
        self.setLevel(logging.WARNING)
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        told = record.getMessage().strip()
        if told not in self.seen and Path(self.baseFilename).parent.is_dir():
            if not self.seen:
                log(f"libraries warn of something: {self.baseFilename}")
            self.seen.add(told)
            super().emit(
                logging.makeLogRecord({**vars(record), "msg": f"{record.name}: {told}", "args": None})
            )


def quiet_s() -> float:
    """Seconds between progress lines where there is no terminal.

    Raises:
        UserError: ``POSFIELD_PROGRESS_S`` is no number of seconds.
    """
    said = os.environ.get(QUIET, "")
    try:
        return float(said or QUIET_S)
    except ValueError as error:
        raise UserError(f"{QUIET}={said!r} is no number of seconds") from error


def in_columns(terms: Mapping[str, float], columns: int) -> str:
    """Losses by name in one line of at most so many columns: of names stays what is behind the last dot and ``loss_``, and of
    that as many letters as fit."""
    named = [(name.rpartition(".")[2].removeprefix("loss_"), value) for name, value in terms.items()]
    for letters in range(max((len(name) for name, _ in named), default=0), 0, -1):
        line = "  ".join(f"{name[:letters]} {value:.3f}" for name, value in named)
        if len(line) <= columns:
            return line
    return "  ".join(f"{value:.3g}" for _, value in named)[:columns]


def in_lines(note: str, columns: int) -> list[str]:
    """A note, whose parts stand two spaces apart, in lines of at most so many columns, if a part allows it."""
    lines = list[str]()
    for part in note.split("  "):
        if lines and len(lines[-1]) + 2 + len(part) <= columns:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


class _Display(RichProgress):
    """A bar, and lines of text below it, each cut at the terminal's edge."""

    lines: tuple[str, ...] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        """What rich draws."""
        yield self.make_tasks_table(self.tasks)
        for line in self.lines:
            yield Text(line, no_wrap=True, overflow="ellipsis")


class ProgressLine:
    """How far a run is: on a terminal a bar that moves with every step, its losses and its numbers below it; elsewhere a
    plain line now and then.

    Args:
        console: where to; stderr without.
    """

    def __init__(self, title: str, total: int, done: int = 0, console: Console | None = None) -> None:
        self.total, self.title, self.told = total, title, 0.0
        self.started, self.pause_s = time.time(), quiet_s()
        self.console = console or Console(stderr=True)
        self.bar: _Display | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            columns = (
                TextColumn(title),
                BarColumn(None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[time]}"),
            )
            # what goes into a file or a pipe must not come out above the bar
            lines: dict[str, Any] = {
                "redirect_stdout": sys.stdout.isatty(),
                "redirect_stderr": sys.stderr.isatty(),
            }
            self.bar = _Display(*columns, console=self.console, expand=True, **lines)
            self.bar.start()
            weakref.finalize(self, self.bar.stop)
            self.task = self.bar.add_task(title, total=total, completed=done, time="")

    def update(
        self, done: int, note: str, eta_s: float | None, terms: Mapping[str, float] | None = None
    ) -> None:
        """``done`` steps are done. Off a terminal shown every ``QUIET_S``, and at the end, when nothing is left.

        Args:
            note: numbers, in a line.
            eta_s: seconds that the rest will take; None: not known yet.
            terms: losses by name, in a line of their own, which is shortened to fit.
        """
        is_last = done >= self.total and not eta_s
        if self.bar is None and not is_last and time.time() - self.told < self.pause_s:
            return
        times = [in_words(time.time() - self.started)]
        times += ["done"] if is_last else [] if eta_s is None else [f"{in_words(eta_s)} left"]
        self.told = time.time()
        if self.bar is not None:
            width = self.console.width
            lines = [in_columns(terms or {}, width), *in_lines(note, width)]
            self.bar.lines = tuple(line for line in lines if line)
            self.bar.update(self.task, completed=done, total=self.total, time=", ".join(times))
        else:
            told = [
                f"{self.title} {done}/{self.total}",
                in_columns(terms or {}, 1000),
                note,
                ", ".join(times),
            ]
            print("  ".join(part for part in told if part), file=self.console.file, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


class Progress(ProgressLine):
    """How far an evaluation is: a bar on a terminal, elsewhere a line on stdout every ten seconds and at the
    end. A signal stops the work."""

    def __init__(
        self, label: str, total: int, signals: "StopSignals | None" = None, unit: str = "images"
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
