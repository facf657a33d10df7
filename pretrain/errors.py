"""Exceptions that mean: the input is wrong, or the run was asked to stop; never that the program is wrong."""

import errno
import os
import re

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


def ensure(holds: object, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not holds:
        raise UserError(message)


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
