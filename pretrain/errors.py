"""Exceptions that mean: the input is wrong, or the run was asked to stop; never that the program is wrong."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Of a file system, by what a user can do
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EROFS, errno.EACCES)

# The way on of an error that a run's folder holds more than data, and the option's help.
TRUST = "if you trust whoever made it, read it with --trust (in Python: trust=True)"
TRUST_HELP = "run the code that the run's folder holds or names: only for folders that you or yours made"


class UserError(ValueError):
    """Bad input. The message is one line and names the offending file, key or value.

    The command-line tools print it without a traceback and exit with code 2 (:mod:`pretrain.cli`).
    """


class Unwritable(OSError):
    """A file cannot be written: the disk is full, ... The message is one line and names it."""

    def __init__(self, path: object, error: Exception) -> None:
        self.path = path
        number, self.reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        if isinstance(error, Unwritable):
            self.reason = error.reason
        elif told := re.search(r"os error (\d+)", self.reason):  # by safetensors
            number, self.reason = int(told[1]), os.strerror(int(told[1]))
        self.reason = one_line(self.reason.partition("\n")[0])
        super().__init__(number, f"{path} cannot be written: {self.reason}")

    def __str__(self) -> str:
        return str(self.strerror)


class DiskError(UserError):
    """A run cannot write, or read, what it needs. The message ends with what is to be done before it is resumed."""


class Interrupted(Exception):
    """A run was asked to stop (a signal), has saved its state and ends; tools exit: ``cli.REQUEUE_CODE``."""


# {package: the extra of posfield that brings it}; the rest comes with posfield itself
EXTRAS = {
    **dict.fromkeys(("pycocotools", "faster_coco_eval", "shapely"), "det"),
    **dict.fromkeys(("mmseg", "mmengine", "mmcv"), "seg"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "timm", "transformers"), "export"),
    **dict.fromkeys(("skimage", "sklearn"), "demo"),
    "matplotlib": "figures",
    "submitit": "cluster",
    "tensorboard": "tensorboard",
}


def missing_package(name: str) -> str:
    """What is missing, with the way on; of a package of no extra nothing."""
    extra = EXTRAS.get(name.partition(".")[0])
    return f"{name} is not installed: pip install 'posfield[{extra}]'" if extra else ""


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
def explained_shortage(memory: str, workers: str = "fewer --workers") -> Iterator[None]:
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


def one_line(text: object) -> str:
    """What a terminal shows as one line: names of files and methods may hold what it would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def disk_problem(error: OSError) -> str:
    """What is wrong with the disk and what to do, in one line; nothing where it is another error."""
    if error.errno not in FULL + BROKEN and not isinstance(error, Unwritable):
        return ""
    told = (
        str(error)
        if isinstance(error, Unwritable) or not error.filename
        else f"{error.filename}: {error.strerror}"
    )
    return f"{told}; {'free space' if error.errno in (*FULL, None) else 'mend that'}"
