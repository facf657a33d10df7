"""One process at a time works in a run's folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError
from pretrain.log import log

NAME = ".lock"


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder on the first rank. The system sets it free when the process ends, however it does.

    The lock is POSIX's: processes that are started meanwhile do not hold it, and it works over NFS from version 4 on. On
    a file system without locks nothing is held, which is said.

    Raises:
        UserError: another process works there; names it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read().strip() or 'another process'} is working there; wait for it, or choose another "
                    "folder"
                ) from error
            log(f"{folder}: this file system has no locks; let one process at a time work there")
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
