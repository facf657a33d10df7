"""Jobs of several commands each, run until they are done or the time is over; what is done is not run again."""

import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import REQUEUE_CODE

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


def launch(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command, what it says appended to ``log``. When its time is over it is asked to save and leave, then made to.

    Returns:
        its exit code; None where its time was over.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return None


def run_jobs(jobs: Mapping[str, Sequence[Stage]], n_at_once: int, seconds: float, launch: Launch = launch) -> dict[str, str]:
    """Run the stages of every job that are not done, in order; a job that fails does not stop the others.

    A stage is not begun when less time is left than the longest of its kind took. Every call of ``launch`` that is cut off by the
    end of the time may take GRACE_S longer.

    Args:
        jobs: {name: its stages}; they are begun in this order.
        n_at_once: jobs that run at a time.
        seconds: the time that all have together.
        launch: runs a command.

    Returns:
        {name: ``done`` | ``left`` (there was no time) | ``failed``}.
    """
    end, took = time.monotonic() + seconds, dict[str, float]()

    def run_job(name: str) -> str:
        for stage in jobs[name]:
            if stage.is_done:
                continue
            begun = time.monotonic()
            if end - begun <= took.get(stage.kind, 0.0):
                return "left"
            code = launch(stage.command, stage.log, end - begun)
            needed = time.monotonic() - begun
            print(f"{name} {stage.kind}: {'no time' if code is None else f'exit code {code}'} after {needed:.0f} s", flush=True)
            if code in (None, REQUEUE_CODE):
                return "left"
            if code or not stage.has_result:
                return "failed"
            stage.mark_done()
            took[stage.kind] = max(took.get(stage.kind, 0.0), needed)
        return "done"

    with ThreadPoolExecutor(n_at_once) as pool:
        return dict(zip(jobs, pool.map(run_job, jobs)))
