"""Exceptions that mean: the input is wrong, or the run was asked to stop; never that the program is wrong."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# The way on of an error that a run's folder holds more than data, and the option's help.
TRUST = "if you trust whoever made it, read it with --trust (in Python: trust=True)"
TRUST_HELP = "run the code that the run's folder holds or names: only for folders that you or yours made"


class UserError(ValueError):
    """Bad input. The message is one line and names the offending file, key or value.

    The command-line tools print it without a traceback and exit with code 2 (:mod:`pretrain.cli`).
    """


class Interrupted(Exception):
    """A run was asked to stop (a signal), has saved its state and ends; tools exit: ``cli.REQUEUE_CODE``."""


def ensure(holds: object, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not holds:
        raise UserError(message)


# What torch, its workers and Python say where a machine has too little; what that means; which way on helps.
RAN_OUT = (
    (r"DataLoader worker .*Bus error", "shared memory (/dev/shm) is full", "shared"),
    (
        r"DataLoader worker \(pid",
        "a data worker was killed, most often by the system for want of memory",
        "workers",
    ),
    (r"received \d+ items of ancdata|Too many open files", "too many files are open", "files"),
    (r"DefaultCPUAllocator|(\b|Array)MemoryError", "this machine ran out of memory", "memory"),
    (r"out of memory|STATUS_ALLOC_FAILED", "the device ran out of memory", "memory"),
)


@contextmanager
def enough(memory: str, workers: str = "fewer --workers") -> Iterator[None]:
    """Inside, an error that says that memory, shared memory or open files ran out becomes a UserError of one line.

    Args:
        memory: the way on for want of memory: what to set.
        workers: the way on for a data worker that was killed.
    """
    ways = {
        "memory": memory,
        "workers": f"{workers}, or smaller images",
        "shared": f"make it larger (Docker: --shm-size), or {workers}",
        "files": f"raise the limit (ulimit -n), or {workers}",
    }
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = f"{type(error).__name__}: {error}"
        for pattern, meaning, way in RAN_OUT:
            if re.search(pattern, told):
                raise UserError(f"{meaning}: {ways[way]} ({_first_line(error)})") from error
        raise


def _first_line(error: BaseException) -> str:
    # of an error that a worker passed on, the last line is its own
    lines = str(error).strip().splitlines()
    return (lines[-1 if lines[0].startswith("Caught ") else 0] if lines else type(error).__name__)[:200]
