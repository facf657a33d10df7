"""Jobs of several commands each, run until they are done or the time is over; what is done is not run
again."""

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import IO

from pretrain.cli import REQUEUE_CODE
from pretrain.errors import Interrupted, UserError
from pretrain.results import renamed
from pretrain.signals import SIGNALS

GRACE_S = 30  # what a command gets to save in, when its time is over

Launch = Callable[
    [Sequence[str], Path, float], int | None
]  # command, log, seconds -> exit code; None: its time was over


@dataclass(frozen=True)
class Stage:
    """One command of a job. It leaves a ``result.json`` in its folder, and resumes when it is run again.

    identity  what its result depends on, without the number of GPUs; empty: the whole command.
    """

    kind: str
    folder: Path
    command: list[str]
    identity: str = ""

    @property
    def log(self) -> Path:
        """All that the command says, of every time it was run."""
        return self.folder.with_suffix(".log")

    @property
    def is_done(self) -> bool:
        """Whether there is a result, and this very command left it."""
        return self.has_result and self.signed == self._asked

    @property
    def is_of_another(self) -> bool:
        """Whether another command, or an unknown one, started the folder."""
        return self.folder.exists() and self.signed != self._asked

    @property
    def has_result(self) -> bool:
        """Whether the folder holds a result."""
        return (self.folder / "result.json").is_file()

    @property
    def signed(self) -> str | None:
        """The command that the note beside the folder names."""
        note = self.folder.with_suffix(".command")
        return renamed.in_command(note.read_text()) if note.is_file() else None

    @property
    def _asked(self) -> str:
        return renamed.in_command(self.identity or shlex.join(self.command))

    def sign(self) -> None:
        """Note that the folder is this command's."""
        note = self.folder.with_suffix(".command")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(self._asked)


class Processes:
    """Commands that run in parallel, each started by its own thread. :meth:`stop` ends them all."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = Lock()  # nothing starts once all that runs is being ended

    def launch(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        """Run a command and append its output to ``log``. When its time is over it gets a SIGTERM, so that it
        can save, then a SIGKILL. A command whose log another process has locked is not started.

        Returns:
            its exit code; None where its time was over, or all were stopped.

        Raises:
            OSError: the command or its log cannot be opened.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file, self._lock:
            if self._stopped:
                return None
            if not locked(file, fcntl.LOCK_EX):
                print(f"{log.with_suffix('')}: another process runs it", flush=True)
                return REQUEUE_CODE
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            self._running.add(process)
        try:
            code = process.wait(max(seconds, 0.0))
            return (
                None if self._stopped and code else code
            )  # it could not save any more, or torchrun says 1 of all
        except subprocess.TimeoutExpired:
            end([process])
            return None
        finally:
            with self._lock:
                self._running.remove(process)

    def stop(self) -> None:
        """Start nothing any more, and end what runs."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end(running)


def by_turns(launch: Launch, prefixes: Sequence[Sequence[str]]) -> Launch:
    """``launch`` with one of the prefixes before each command, one that no other command has just now."""
    free: SimpleQueue[Sequence[str]] = SimpleQueue()
    for prefix in prefixes:
        free.put(prefix)

    def launch_on_free(command: Sequence[str], log: Path, seconds: float) -> int | None:
        prefix = free.get()
        try:
            return launch([*prefix, *command], log, seconds)
        finally:
            free.put(prefix)

    return launch_on_free


def gpu_prefixes(n_at_once: int, n_each: int = 1) -> list[list[str]]:
    """For each of ``n_at_once`` commands the words that give it ``n_each`` GPUs; no words where there is no
    choice.

    Raises:
        UserError: there are fewer than a command needs.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if n_each > max(1, len(names)):
        raise UserError(f"a run on {n_each} GPUs: there are {len(names)} here")
    if len(names) <= n_each:
        return [[] for _ in range(n_at_once)]
    groups = [",".join(names[i : i + n_each]) for i in range(0, len(names) - n_each + 1, n_each)]
    return [["env", f"CUDA_VISIBLE_DEVICES={groups[slot % len(groups)]}"] for slot in range(n_at_once)]


def recorded(launch: Launch) -> Launch:
    """``launch``, with a file ``.run`` beside the log that holds the command's last exit code."""

    def launch_and_note(command: Sequence[str], log: Path, seconds: float) -> int | None:
        record = log.with_suffix(".run")
        record.unlink(missing_ok=True)
        code = launch(command, log, seconds)
        record.write_text(str(REQUEUE_CODE if code is None else code))
        return code

    return launch_and_note


def recorded_code(log: Path) -> int | str | None:
    """What is known of a command by its log: ``running``, its last exit code (:func:`recorded`), or None."""
    if log.is_file():
        with open(log) as file:
            if not locked(file, fcntl.LOCK_SH):
                return "running"
    record = log.with_suffix(".run")
    said = record.read_text() if record.is_file() else ""
    return int(said) if said else None


def locked(log: IO[str], how: int) -> bool:
    """Lock a log; false if another process holds the lock. The command inherits the open log, so the lock
    lasts as long as the command, even if the process that started it was killed. On a file system without
    locks: true."""
    try:
        fcntl.flock(log, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate processes, kill those that still run after GRACE_S, and wait for all."""
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
    """Inside, the first of :data:`SIGNALS` raises Interrupted in the main thread, so that it can end what
    it started. Further ones do nothing. (They are not ignored: a command that starts now would inherit
    that.)"""

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

    A stage is not started when less time is left than the longest of its kind took. A call of ``launch`` that
    the end of the time cuts off may take GRACE_S longer. An exception in the main thread (Ctrl-C,
    :func:`interruptible`) ends what runs.

    Args:
        jobs: {name: its stages}; they are begun in this order.
        n_at_once: jobs that run at a time.
        seconds: the time that all have together.
        launch: runs a command; None: :meth:`Processes.launch`.
        processes: those that ``launch`` begins, if it begins any; they are ended with the rest.

    Returns:
        {name: ``done`` | ``left`` (there was no time) | ``failed``}.
    """
    if n_at_once > 1:  # they share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_at_once)))
    processes = processes or Processes()
    until, took = time.monotonic() + seconds, dict[str, float]()

    def run_job(name: str) -> str:
        for stage in jobs[name]:
            if stage.is_done:
                continue
            begun = time.monotonic()
            if until - begun <= took.get(stage.kind, 0.0):
                return "left"
            code = (launch or processes.launch)(stage.command, stage.log, until - begun)
            needed = time.monotonic() - begun
            how = "no time" if code is None else f"exit code {code}"
            print(f"{name} {stage.kind}: {how} after {needed:.0f} s", flush=True)
            if code in (None, REQUEUE_CODE):
                return "left"
            if code or not stage.has_result:
                return "failed"
            stage.sign()
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
