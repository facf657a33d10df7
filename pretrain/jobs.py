"""Jobs of several commands each, run until they are done or the time is over; what is done is not run again."""

import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from pretrain.cli import REQUEUE_CODE
from pretrain.errors import Interrupted
from pretrain.signals import SIGNALS

GRACE_S = 30  # what a command gets to save in, when its time is over

Launch = Callable[[Sequence[str], Path, float], int | None]  # command, log, seconds -> exit code; None: its time was over


@dataclass(frozen=True)
class Stage:
    """One command of a job, which leaves a ``result.json`` in its folder and goes on where it stopped when it is run again."""

    kind: str
    folder: Path
    command: list[str]

    @property
    def log(self) -> Path:
        """All that the command says, of every time it was run."""
        return self.folder.with_suffix(".log")

    @property
    def is_done(self) -> bool:
        """Whether there is a result, and this very command left it."""
        return self.has_result and self._left_by.is_file() and self._left_by.read_text() == shlex.join(self.command)

    @property
    def has_result(self) -> bool:
        """Whether the folder holds a result."""
        return (self.folder / "result.json").is_file()

    @property
    def _left_by(self) -> Path:
        return self.folder.with_suffix(".command")

    def mark_done(self) -> None:
        """Note the command that left the result."""
        self._left_by.write_text(shlex.join(self.command))


class Processes:
    """Commands that run beside each other, each started by a thread of its own, and all ended by :meth:`stop`."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = Lock()  # nothing starts once all that runs is being ended

    def launch(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        """Run a command, what it says appended to ``log``. When its time is over it is asked to save and leave, then made to.

        Returns:
            its exit code; None where its time was over, or all were stopped before it began.

        Raises:
            OSError: the command or its log cannot be opened.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file, self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            self._running.add(process)
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            end([process])
            return None
        finally:
            with self._lock:
                self._running.remove(process)

    def stop(self) -> None:
        """Let nothing begin any more, and end what runs."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end(running)


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to save and leave, make those leave that have not after GRACE_S, and wait for them all."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it the first of :data:`SIGNALS` raises Interrupted in the main thread, so that what was begun can be ended; others
    do nothing. (They are not ignored: a command that is begun just now would inherit that.)"""

    def stop(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, lambda *_: None)
        raise Interrupted(f"by a {signal.Signals(number).name}: start it again")

    before = [signal.signal(number, stop) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


def run_jobs(
    jobs: Mapping[str, Sequence[Stage]],
    n_at_once: int,
    seconds: float,
    launch: Launch | None = None,
    processes: Processes | None = None,
) -> dict[str, str]:
    """Run the stages of every job that are not done, in order; a job that fails does not stop the others.

    A stage is not begun when less time is left than the longest of its kind took. Every call of ``launch`` that is cut off by the
    end of the time may take GRACE_S longer. An exception in the main thread (Ctrl-C, :func:`interruptible`) ends what runs.

    Args:
        jobs: {name: its stages}; they are begun in this order.
        n_at_once: jobs that run at a time.
        seconds: the time that all have together.
        launch: runs a command; None: :meth:`Processes.launch`.
        processes: those that ``launch`` begins, if it begins any; they are ended with the rest.

    Returns:
        {name: ``done`` | ``left`` (there was no time) | ``failed``}.
    """
    processes = processes or Processes()
    launch_command = launch or processes.launch
    until, took = time.monotonic() + seconds, dict[str, float]()

    def run_job(name: str) -> str:
        for stage in jobs[name]:
            if stage.is_done:
                continue
            begun = time.monotonic()
            if until - begun <= took.get(stage.kind, 0.0):
                return "left"
            code = launch_command(stage.command, stage.log, until - begun)
            needed = time.monotonic() - begun
            print(f"{name} {stage.kind}: {'no time' if code is None else f'exit code {code}'} after {needed:.0f} s", flush=True)
            if code in (None, REQUEUE_CODE):
                return "left"
            if code or not stage.has_result:
                return "failed"
            stage.mark_done()
            took[stage.kind] = max(took.get(stage.kind, 0.0), needed)
        return "done"

    def outcome(name: str) -> str:
        try:
            return run_job(name)
        except OSError as error:  # a command or a log that cannot be opened, a full disk
            print(f"{name}: {error}", flush=True)
            return "failed"

    with ThreadPoolExecutor(n_at_once) as pool:
        try:
            return dict(zip(jobs, pool.map(outcome, jobs)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
