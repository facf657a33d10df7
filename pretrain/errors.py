"""Exceptions that mean: the input is wrong, or the run was asked to stop; never that the program is wrong."""

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


def one_line(text: object) -> str:
    """What a terminal shows as one line: names of files and methods may hold what it would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
