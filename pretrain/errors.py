"""Exceptions that mean: the input is wrong, or the run was asked to stop; never that the program is wrong."""


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
