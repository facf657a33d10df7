"""The one exception that means: the input is wrong, not the program."""


class UserError(ValueError):
    """Bad input. The message is one line and names the offending file, key or value.

    The command-line tools print it without a traceback and exit with code 2 (:mod:`pretrain.cli`).
    """
