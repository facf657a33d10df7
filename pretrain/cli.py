"""How every tool starts: bad input ends in one clear line and exit code 2, never in a traceback."""

import os
import sys
from collections.abc import Callable

from pretrain.errors import Interrupted, UserError

REQUEUE_CODE = 85  # a run was stopped from outside and can be gone on with: start it again


def run(main: Callable[[list[str]], None]) -> None:
    """Run ``main(arguments)``.

    A :class:`UserError`, or an error of the file system, is printed as one line on stderr and ends the process with code 2.
    So is a loss that is no number, with code 1. A run that was asked to stop and has saved ends with code 85. ``--traceback``
    anywhere on the command line, or ``POSFIELD_TRACEBACK=1``,
    shows where it came from.
    """
    arguments = sys.argv[1:]
    show_traceback = "--traceback" in arguments or os.environ.get("POSFIELD_TRACEBACK") == "1"
    try:
        main([a for a in arguments if a != "--traceback"])
    except (UserError, OSError) as error:  # OSError names the file: a folder that cannot be written, a full disk
        if show_traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(REQUEUE_CODE)
    except FloatingPointError as error:  # a loss is no number; the run has said where
        if show_traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
