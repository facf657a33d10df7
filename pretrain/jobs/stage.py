"""A command, the folder that it fills, and the one rule for what is done."""

import fcntl
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pretrain.cli import REQUEUE_CODE
from pretrain.files import write_text
from pretrain.results import renamed

GRACE_S = 30  # what a command gets to save in, when its time is over
# See :attr:`Stage.state`; the first four are what a runner says of a job, too.
DONE, LEFT, FAILED, QUEUED = "done", "left", "failed", "in the queue"
RUNNING, OTHER = "running", "other settings"


@dataclass(frozen=True)
class Stage:
    """One command of a job. It leaves a ``result.json`` in its folder, and resumes when it is run again.

    Attributes:
        kind: stages of one kind take about the same time.
        identity: what its result depends on, without the number of GPUs; empty: the whole command, which itself
            refuses a folder of other settings.
        array: on SLURM, how many jobs it is, each with its number for ``{index}``; 0: one.
    """

    kind: str
    folder: Path
    command: Sequence[str]
    identity: str = ""
    array: int = 0

    @property
    def name(self) -> str:
        """``dino_vitb16/det_coco-12ep_seed0``."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def log(self) -> Path:
        """All that the command says, of every time it was run."""
        return self.note("log")

    def note(self, kind: str) -> Path:
        """A file beside the folder. ``command``: whose it is; ``run``: the last exit code; ``job``: on SLURM."""
        return self.folder.with_suffix(f".{kind}")

    @property
    def has_result(self) -> bool:
        """Whether the folder holds a result, of whatever command."""
        return (self.folder / "result.json").is_file()

    @property
    def is_done(self) -> bool:
        """Whether there is a result, and this very command left it."""
        return self.has_result and self._signed == self._asked

    @property
    def state(self) -> str:
        """``done`` | ``running`` | ``in the queue (job N)`` | ``other settings`` (another command began the
        folder) | ``failed (exit code N)`` | ``begun`` | ``left``."""
        if self.is_done:
            return DONE
        if self.log.is_file():
            with open(self.log) as log:
                if not locked(log, fcntl.LOCK_SH):
                    return RUNNING
        if number := self._queued():
            return f"{QUEUED} (job {number})"
        if self.identity and self.folder.exists() and self._signed != self._asked:
            return OTHER
        code = self.note("run").read_text() if self.note("run").is_file() else ""
        if code not in ("", str(REQUEUE_CODE)):
            return f"{FAILED} (exit code {code})"
        return "begun" if self.folder.exists() else LEFT

    @property
    def difference(self) -> str:
        """In what the settings of the folder differ from those that are asked for, and what to do."""
        before, now = shlex.split(self._signed or "unknown settings"), shlex.split(self._asked)
        gone = shlex.join(word for word in before if word not in now)
        new = shlex.join(word for word in now if word not in before)
        told = f"it was begun with {gone or 'less'}, asked for is {new or 'less'}"
        return f"{self.folder}: {told}; move it away, or give another --output"

    def sign(self) -> None:
        """Note that the folder is this command's."""
        write_text(self.note("command"), self._asked)

    @property
    def _signed(self) -> str | None:
        note = self.note("command")
        return renamed.in_command(note.read_text()) if note.is_file() else None

    @property
    def _asked(self) -> str:
        return renamed.in_command(self.identity or shlex.join(self.command))

    def _queued(self) -> str | None:
        """The number of its SLURM job, while SLURM knows that job."""
        try:
            number = self.note("job").read_text()
            asked = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True)
        except OSError:  # it has none, or there is no SLURM here
            return None
        return number if asked.returncode == 0 and asked.stdout.strip() else None


def is_to_begin(state: str) -> bool:
    """Whether to start or resume a stage of this :attr:`Stage.state`."""
    return state not in (DONE, RUNNING, OTHER) and not state.startswith(QUEUED)


def locked(log: IO[str], how: int) -> bool:
    """Lock a log; false if another process holds the lock, which lasts as long as the command: it inherits the open
    log. On a file system without locks: true."""
    try:
        fcntl.flock(log, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
